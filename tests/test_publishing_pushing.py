import itertools

import pytest

from hub_magmax.errors import OutputError, PublishError
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import run
from hub_magmax.publishing.pushing import push
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.reporting.card_file import is_edited
from tests.families import write_recipe

_numbers = itertools.count()


@pytest.fixture
def repo():
    return f"me/published{next(_numbers)}"


def merged(family, **output):
    recipe = load_recipe(write_recipe(family, output={"path": "merged", **output}))
    run(recipe)
    return family / "merged"


def test_push_publishes_every_file_in_one_commit(family, hub, repo):
    folder = merged(family, shard_size="1KB")
    published = push(folder, repo)
    assert published.commit == hub.head(repo)
    names = {path.name for path in folder.iterdir()}
    assert names <= set(hub.files(repo))
    unchanged = names - {"README.md"}  # the card on the Hub names its repository
    assert all(hub.read(repo, name) == (folder / name).read_bytes() for name in unchanged)
    assert hub.counts["POST commit"] == 1


def test_run_pushes_what_the_recipe_asks_for(family, hub, repo):
    folder = merged(family, push_to_hub=repo)
    assert hub.read(repo, "model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert hub.read(repo, "README.md").startswith(b"---\n")


def test_what_a_killed_command_left_of_a_file_is_not_published_and_the_same_command_removes_it(
    family, hub, repo
):
    folder = merged(family)
    left = folder / "merge_report.json.tmp"
    for name in (left.name, "notes.tmp"):  # nothing of ours is called like the second
        (folder / name).write_text("{")
    push(folder, repo)
    assert left.name not in hub.files(repo) and "notes.tmp" in hub.files(repo)
    merged(family)
    assert not left.exists() and (folder / "notes.tmp").exists()


def test_weights_of_an_earlier_push_do_not_stay(family, hub, repo, tmp_path):
    push(merged(family, shard_size="1KB"), repo)
    (family / "merged").rename(tmp_path / "old")
    push(merged(family), repo)
    weights = [name for name in hub.files(repo) if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_pull_request_leaves_the_branch_alone(family, hub, repo):
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    head = hub.head(repo)
    published = push(merged(family), repo, create_pr=True)
    assert hub.head(repo) == head
    assert "discussions/1" in published.url
    assert "model.safetensors" in hub.files(repo, "refs/pr/1")


def test_branch_is_committed_to(family, hub, repo):
    hub.add_repo(repo, files={"notes.txt": b"mine"}, revision="trial")
    push(merged(family), repo, revision="trial")
    assert "model.safetensors" in hub.files(repo, "trial")
    assert "model.safetensors" not in hub.files(repo)


def test_other_files_of_the_repository_stay(family, hub, repo):
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    push(merged(family), repo)
    assert hub.read(repo, "notes.txt") == b"mine"


def test_published_model_is_verified(family, hub, repo):
    folder = merged(family)
    push(folder, repo)
    assert verify(repo) == verify(str(folder))
    hub.add_repo(repo, files={"model.safetensors": b"something else"})
    with pytest.raises(PublishError, match="the merge report says"):
        verify(repo)


def test_repository_that_no_merge_made_is_not_verified(hub, repo):
    hub.add_repo(repo, files={"model.safetensors": b"x"})
    with pytest.raises(PublishError, match=r"there is no merge_report\.json"):
        verify(repo)


def test_no_right_to_write_is_known_before_the_merge(family, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("stranger"))
    recipe = load_recipe(write_recipe(family, output={"path": "merged", "push_to_hub": "me/not-yours"}))
    with pytest.raises(PublishError):
        run(recipe)
    assert not (family / "merged").exists()


def test_branch_that_moves_during_the_push_is_not_overwritten(family, hub, repo):
    folder = merged(family)
    hub.add_repo(repo, files={"notes.txt": b"mine"})
    hub.faults.add("*/commit/*", "status", status=412, method="POST")
    with pytest.raises(PublishError, match="412"):
        push(folder, repo)
    assert hub.files(repo) == (".gitattributes", "notes.txt") or "model.safetensors" not in hub.files(repo)


def test_folder_without_a_merge_is_not_pushed(family, hub, repo):
    with pytest.raises(OutputError, match=r"no merge_report\.json"):
        push(family / "base", repo)


def test_bad_repository_name_is_one_sentence(family):
    with pytest.raises(PublishError, match="is no repository id"):
        push(merged(family), "not/a/name")


def test_private_repository_is_made_private(family, hub, repo, monkeypatch):
    push(merged(family), repo, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_user(f"stranger{next(_numbers)}"))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(repo)


def test_card_on_the_hub_names_the_repository_it_is_in(family, hub, repo):
    folder = merged(family)
    push(folder, repo)
    assert f"# `{repo}`" in hub.read(repo, "README.md").decode()
    assert "# `merged`" in (folder / "README.md").read_text()


def test_card_that_a_person_changed_is_pushed_as_it_is(family, hub, repo):
    folder = merged(family)
    card = (folder / "README.md").read_text() + "\nMy own words.\n"
    (folder / "README.md").write_text(card)
    push(folder, repo)
    assert hub.read(repo, "README.md").decode() == card


def test_card_of_an_older_template_is_rendered_for_the_repository(family, hub, repo, monkeypatch, tmp_path):
    with monkeypatch.context() as earlier:
        earlier.setattr(
            "hub_magmax.reporting.card_file.render_card", lambda *facts, **beside: "# Old words\n"
        )
        folder = merged(family)
    assert (folder / "README.md").read_text().startswith("# Old words\n")
    push(folder, repo)
    assert f"# `{repo}`" in hub.read(repo, "README.md").decode()


def test_card_without_a_digest_may_be_a_persons_and_is_pushed_as_it_is(family, hub, repo):
    folder = merged(family)
    earlier = "".join((folder / "README.md").read_text().splitlines(keepends=True)[:-1])
    (folder / "README.md").write_text(earlier)
    push(folder, repo)
    assert hub.read(repo, "README.md").decode() == earlier


def test_run_again_keeps_an_edited_card_and_renews_another(family):
    recipe = load_recipe(write_recipe(family, output={"path": "merged"}))
    run(recipe)
    card, said = family / "merged" / "README.md", []
    written = card.read_text()
    run(recipe, report=said.append)
    assert card.read_text() == written
    assert not any("edited" in line for line in said)
    card.write_text(written.replace("merged", "my own", 1))
    run(recipe, report=said.append)
    assert card.read_text() == written.replace("merged", "my own", 1)
    assert any("README.md was edited" in line for line in said)


@pytest.mark.parametrize("change", [
    lambda text: text + "\n",
    lambda text: text.replace("# ", "#  ", 1),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text[: text.rindex("<!--")],
    lambda text: text.replace("sha256:", "sha256:0", 1),
    lambda text: "",
])  # fmt: skip
def test_every_change_of_a_card_is_seen(family, change):
    card = merged(family) / "README.md"
    assert not is_edited(card)
    card.write_bytes(change(card.read_text()).encode())
    assert is_edited(card)


def test_what_pushes_leave_behind_counts_as_unedited(family, hub, repo, tmp_path):
    push(merged(family), repo)
    (tmp_path / "README.md").write_bytes(hub.read(repo, "README.md"))
    assert not is_edited(tmp_path / "README.md")
    assert not is_edited(tmp_path / "absent.md")
