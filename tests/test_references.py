import pytest

from hub_magmax.errors import RecipeError
from hub_magmax.references import HubModel, LocalFolder, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("written", "repo_id", "revision"),
    [
        ("me/model", "me/model", None),
        ("gpt2", "gpt2", None),
        ("me/model@v1.0", "me/model", "v1.0"),
        (f"me/model@{COMMIT}", "me/model", COMMIT),
        ("me/model@refs/pr/3", "me/model", "refs/pr/3"),
        ("hf://me/model", "me/model", None),
        ("hf://me/model@dev", "me/model", "dev"),
        ("https://huggingface.co/me/model", "me/model", None),
        ("https://huggingface.co/me/model/tree/dev", "me/model", "dev"),
        ("https://huggingface.co/me/model/", "me/model", None),
    ],
)
def test_names_of_repositories(tmp_path, written, repo_id, revision):
    assert parse_reference(written, tmp_path) == HubModel(repo_id, revision)


def test_an_existing_folder_wins_over_a_repository(tmp_path):
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert parse_reference("me/model", tmp_path) == LocalFolder(tmp_path / "me" / "model", "me/model")


@pytest.mark.parametrize("written", ["./x", "../x", "/x", "~/x", "."])
def test_what_starts_like_a_path_is_a_path(tmp_path, written):
    assert isinstance(parse_reference(written, tmp_path), LocalFolder)


@pytest.mark.parametrize(
    "written",
    [
        "a/b/c",
        "me/mo del",
        "me/model@",
        "-x",
        "hf://datasets/me/x",
        "hf://",
        "me/../x",
        "me//x",
        "https://me:secret@host/me/x",
    ],
)
def test_what_names_nothing_is_refused_or_read_as_the_default(tmp_path, written):
    if written == "me/model@":
        assert parse_reference(written, tmp_path) == HubModel("me/model", None)
        return
    with pytest.raises(RecipeError):
        parse_reference(written, tmp_path)
