"""Data sets on the Hub are pinned like models, through faults, and read at what was pinned."""

import itertools

import pytest

from hub_magmax.data import load_examples, pin_datasets, pinned
from hub_magmax.errors import EvaluationError
from hub_magmax.recipe import parse_recipe
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
