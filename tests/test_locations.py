import pytest

from hub_magmax.checkpoints.locations import HubModel, LocalFolder, ModelPlace
from hub_magmax.checkpoints.weight_files import split_part
from hub_magmax.errors import RecipeError
from hub_magmax.recipe.references import parse_reference

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


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("hf://me/model/unet", HubModel("me/model", None, "unet")),
        ("hf://me/model@v1.0/a/b", HubModel("me/model", "v1.0", "a/b")),
        ("hf://me/model@refs/pr/3/unet", HubModel("me/model", "refs/pr/3", "unet")),
        ("hf://me/model@feature%2Fx/unet", HubModel("me/model", "feature/x", "unet")),
        ("hf://me/model/model.fp16.safetensors", HubModel("me/model", None, "model.fp16.safetensors")),
        ("https://huggingface.co/me/model/tree/dev/unet", HubModel("me/model", "dev", "unet")),
        ("https://huggingface.co/me/model/tree/refs%2Fpr%2F3", HubModel("me/model", "refs/pr/3")),
        (
            "https://huggingface.co/me/model/blob/main/model.fp16.safetensors",
            HubModel("me/model", "main", "model.fp16.safetensors"),
        ),
    ],
)
def test_parts_of_repositories(tmp_path, written, expected):
    assert parse_reference(written, tmp_path) == expected


@pytest.mark.parametrize(
    ("part", "split", "variant"),
    [
        ("", ("", ""), None),
        ("unet", ("unet", ""), None),
        ("model.safetensors", ("", "model.safetensors"), None),
        ("a/b/model.fp16.safetensors", ("a/b", "model.fp16.safetensors"), "fp16"),
        ("model.safetensors.index.json", ("", "model.safetensors.index.json"), None),
        ("unet/model.safetensors.index.fp16.json", ("unet", "model.safetensors.index.fp16.json"), "fp16"),
    ],
)
def test_part_is_a_folder_or_a_file_of_weights_in_one(part, split, variant):
    assert split_part(part) == split
    assert ModelPlace("me/model", part=part).variant == variant


def test_path_may_end_in_a_file_of_weights(tmp_path):
    written = "./x/model.fp16.safetensors"
    assert parse_reference(written, tmp_path) == LocalFolder(
        tmp_path / "x", written, "model.fp16.safetensors"
    )
    (tmp_path / "odd.safetensors").mkdir()
    assert parse_reference("./odd.safetensors", tmp_path).part == ""


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
        "hf://me/x/../y",
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
