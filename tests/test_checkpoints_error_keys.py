"""Errors about a checkpoint: file, line and key of the recipe that names it, for people and programs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import recipe_values, write_recipe
from tests.test_cli import call


def problem_of(*arguments):
    code, out, _ = call(*arguments, "--json")
    assert code == 1
    (problem,) = json.loads(out)["error"]["problems"]
    return problem["file"], problem["line"], problem["key"]


def change(folder, how):
    path = folder / "model.safetensors"
    save_file(how(load_file(path)), path, metadata={"format": "pt"})


def remove(folder):
    shutil.rmtree(folder / "b")


def truncate(folder):
    path = folder / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def reshape(folder):
    change(folder / "b", lambda tensors: tensors | {"scale": torch.zeros(3)})


def spoil(folder):
    change(folder / "b", lambda tensors: tensors | {"scale": torch.tensor(torch.nan)})


@pytest.mark.parametrize(
    ("spoiling", "verb"),
    [(remove, "lock"), (truncate, "plan"), (reshape, "merge"), (reshape, "diagnose"), (spoil, "merge")],
)
def test_error_about_a_checkpoint_says_file_line_and_key(family, spoiling, verb):
    path = write_recipe(family)
    spoiling(family)
    assert problem_of(verb, path) == (str(path), 7, ["tasks", 1, "model"])
    _, _, told = call(verb, path)
    assert f"Error: {path}, line 7, column 3, tasks.1.model: ./b" in told


def test_task_whose_name_begins_like_another_one_is_told_apart(family):
    shutil.copytree(family / "b", family / "b.new")
    change(family / "b.new", lambda tensors: tensors | {"scale": torch.zeros(3)})
    tasks = [*recipe_values()["tasks"], {"name": "new", "model": "./b.new"}]
    path = write_recipe(family, tasks=tasks)
    assert problem_of("plan", path) == (str(path), 11, ["tasks", 3, "model"])


def test_one_of_two_revisions_of_a_repository_is_told_apart(family, hub, monkeypatch):
    hub.add_repo("acme/two-revisions", folder=family / "b")
    change(family / "b", lambda tensors: tensors | {"scale": torch.zeros(3)})
    hub.add_repo("acme/two-revisions", folder=family / "b", revision="other")
    names = {"a": "acme/two-revisions", "b": "acme/two-revisions@other"}
    path = write_recipe(family, tasks=[{"name": name, "model": model} for name, model in names.items()])
    assert problem_of("plan", path) == (str(path), 7, ["tasks", 1, "model"])
    monkeypatch.setenv("HF_TOKEN", hub.add_user("outsider"))
    hub.add_repo("other/closed", folder=family / "a", gated=True)
    path = write_recipe(family, base_model="other/closed@main")
    assert problem_of("plan", path)[1:] == (2, ["base_model"])


def test_option_that_names_the_checkpoint_stands_in_place_of_a_line(family):
    path = write_recipe(family)
    assert problem_of("plan", path, "--set", "base_model=./none") == (
        "--set base_model=./none",
        None,
        ["base_model"],
    )


def test_python_is_told_the_key(family):
    recipe = load_recipe(write_recipe(family))
    remove(family)
    with pytest.raises(SourceError) as told:
        lock(recipe)
    assert told.value.problems[0].key == ("tasks", 1, "model")
    assert told.value.where == "./b"


def test_checkpoint_that_changed_after_the_lock_is_told_by_its_key(family):
    recipe = load_recipe(write_recipe(family))
    locked = lock(recipe)
    truncate(family)
    with pytest.raises(CheckpointError) as told:
        plan(recipe, locked)
    assert told.value.problems[0].key == ("tasks", 1, "model")
