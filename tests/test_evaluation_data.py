"""Data sets on the Hub are pinned like models, through faults, and read at what was pinned."""

import hashlib
import itertools
import os

import pytest

from hub_magmax.errors import EvaluationError, LockError
from hub_magmax.evaluation.data import (
    changed_local_data,
    check_local_data,
    load_examples,
    pin_datasets,
    pin_local_data,
    pinned,
)
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values

_numbers = itertools.count()


@pytest.fixture
def repo(hub):
    """A data set with two rows."""
    name = f"me/rows{next(_numbers)}"
    hub.add_repo(name, repo_type="dataset", files={"train.csv": b"label,x\n1,2\n3,4\n"})
    return name


def recipe_with(repo, **changes):
    data = {"dataset": repo, "split": "train"} | changes
    return parse_recipe(recipe_values(evaluation={"tasks": {"a": data}}))


def test_data_set_is_read_at_the_commit_that_was_pinned(hub, repo, tmp_path):
    recipe = recipe_with(repo)
    pins = pin_datasets(recipe)
    assert pins == {f"{repo}@main": hub.head(repo, repo_type="dataset")}
    hub.add_repo(repo, repo_type="dataset", files={"train.csv": b"label,x\n5,6\n"})
    spec = recipe.evaluation.tasks["a"]
    assert load_examples(pinned(spec, pins), tmp_path)["label"][:] == [1, 3]
    assert load_examples(spec, tmp_path)["label"][:] == [5]


def test_target_of_a_preference_is_pinned_too(hub, repo):
    target = {"dataset": repo, "split": "train"}
    preference = {"labels": {"target": target, "classes": {"a": [1], "b": [3]}}}
    recipe = parse_recipe(recipe_values(preference=preference))
    assert pin_datasets(recipe) == {f"{repo}@main": hub.head(repo, repo_type="dataset")}


@pytest.mark.parametrize(
    "fault",
    [{"kind": "status", "status": 503}, {"kind": "status", "status": 429}, {"kind": "lose_response"},
     {"kind": "reset"}, {"kind": "truncate"}, {"kind": "short"}],
    ids=str,
)  # fmt: skip
def test_pinning_goes_on_after_what_passes(hub, repo, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.add("/api/datasets/*", times=2, **fault)
    assert pin_datasets(recipe_with(repo)) == {f"{repo}@main": hub.head(repo, repo_type="dataset")}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "reset"}, "the data set cannot be reached"),
        ({"kind": "status", "status": 403}, "hf auth whoami"),
    ],
    ids=str,
)
def test_data_set_that_cannot_be_reached_is_one_paragraph(hub, repo, fault, reason, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.add("/api/datasets/*", **fault)
    with pytest.raises(EvaluationError, match=reason) as caught:
        pin_datasets(recipe_with(repo))
    assert "\n" not in str(caught.value)


def test_revision_that_is_missing_is_named(repo):
    with pytest.raises(EvaluationError, match=rf"{repo}, revision none"):
        pin_datasets(recipe_with(repo, revision="none"))


def local_recipe(folder, *names):
    tasks = {task: {"dataset": name} for task, name in zip("abc", names, strict=False)}
    return parse_recipe(recipe_values(evaluation={"tasks": tasks}), folder=folder)


def test_local_data_is_pinned_by_the_content_of_its_files(tmp_path):
    (tmp_path / "rows.csv").write_text("label\n1\n")
    (tmp_path / "rows" / "test").mkdir(parents=True)
    (tmp_path / "rows" / "test" / "1.csv").write_text("label\n1\n")
    recipe = local_recipe(tmp_path, "./rows.csv", str(tmp_path / "rows"), "./none")
    first = pin_local_data(recipe)
    assert first == {
        "./rows.csv": f"sha256:{hashlib.sha256((tmp_path / 'rows.csv').read_bytes()).hexdigest()}",
        "./rows": first["./rows"],
    }
    assert first["./rows"].startswith("tree:")
    (tmp_path / "rows" / ".hidden").touch()
    assert pin_local_data(recipe) == first
    assert changed_local_data(recipe, first) == ()
    (tmp_path / "rows" / "test" / "1.csv").rename(tmp_path / "rows" / "test" / "2.csv")
    assert changed_local_data(recipe, first) == ("./rows",)
    check_local_data([recipe.evaluation.tasks["a"]], recipe, first)
    with pytest.raises(LockError, match=r"\./rows: this data is no longer what was locked"):
        check_local_data(recipe.evaluation.tasks.values(), recipe, first)


def test_folder_of_data_that_holds_a_link_to_itself_or_an_odd_name_is_pinned(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "self").symlink_to(folder)
    (folder / "x.csv").write_text("label\n1\n")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "rows").symlink_to(folder)
    recipe = local_recipe(tmp_path, "./rows", "./linked")
    first = pin_local_data(recipe)
    (folder / os.fsdecode(b"\xff.csv")).touch()
    assert changed_local_data(recipe, first) == ("./rows", "./linked")


def test_local_data_that_cannot_be_read_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").touch()

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hub_magmax.evaluation.data.sha256_of", refuse)
    with pytest.raises(EvaluationError, match=r"rows\.csv: the data cannot be read \(Permission denied\)"):
        pin_local_data(local_recipe(tmp_path, "./rows.csv"))


@pytest.mark.parametrize("name", ["~nobody-at-all/rows", "./" + "x" * 400])
def test_data_that_no_place_can_hold_is_not_pinned(tmp_path, name):
    assert pin_local_data(local_recipe(tmp_path, name)) == {}
