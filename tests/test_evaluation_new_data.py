"""Corrected data of a finished merge: scored again, and the lock says so."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError, LockError
from hub_magmax.evaluation.data import load_examples, with_present_data
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import lock, run
from hub_magmax.processes import Processes
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.values import Data
from tests.families import recipe_values
from tests.test_evaluation_samples import family, recipe_of

__all__ = ["family"]


def invoke(*arguments):
    return CliRunner().invoke(main, [*arguments, "--json"])


class Second(Processes):
    """The second of two processes, of which the first refuses."""

    def first_decides(self, decide):
        raise LockError("as the first process decided", where="data")


def test_a_typo_in_the_data_is_mended_without_merging_again(family, tmp_path, monkeypatch):
    rows = (family / "rows.jsonl").read_text()
    wrong = rows.replace('"label":1', '"label":0', 1)
    (tmp_path / "rows.jsonl").write_text(wrong)
    values = recipe_of(family, "multiple-choice").to_dict()
    values |= {"base_model": str(family / "base"), "output": {"path": "out"}}
    values["tasks"] = [{"name": name, "model": str(family / name)} for name in "ab"]
    recipe = parse_recipe(values, folder=tmp_path)
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(recipe.to_yaml())
    run(recipe)
    before = read_lock(out / "recipe.lock.json")
    weights = (out / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "rows.jsonl").write_text(rows)
    refused = invoke("evaluate", str(path))
    assert refused.exit_code == 1 and "--new-data" in refused.output
    (out / "model.sig").write_text("of the folder as it was")
    found = invoke("evaluate", str(path), "--new-data")
    assert found.exit_code == 0, found.output
    assert "the lock names the new data: sign again (hub-magmax sign" in found.stderr
    assert "README.md, with these scores" in found.stderr
    after = read_lock(out / "recipe.lock.json")
    assert after.replaced_data == before.local_data
    assert after.local_data == lock(recipe).local_data != before.local_data
    assert after.digest == before.digest and after.checksum != before.checksum
    verify(str(out))
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
    # What was locked at the merge stays, however often data is corrected.
    assert with_present_data(recipe, after) == after
    assert json.loads((out / "scores.json").read_text())["data"]["a"]["examples"] == 3
    assert invoke("evaluate", str(path)).exit_code == 0
    # Of several processes one looks at the data.
    with monkeypatch.context() as patched:
        patched.setattr("hub_magmax.processes.find_processes", lambda report: Second(rank=1, count=2))
        assert "as the first process decided" in invoke("evaluate", str(path), "--new-data").output
    # Data that is what it was at the merge is not replaced.
    (tmp_path / "rows.jsonl").write_text(wrong)
    restored = with_present_data(recipe, after)
    assert (restored.replaced_data, restored.local_data) == ({}, before.local_data)


def test_an_evaluator_that_brings_its_data_has_none_to_replace(family, tmp_path):
    (tmp_path / "arc").write_text("a file that has the name of a task")
    evaluation = {"evaluator": "lm-eval", "tasks": {"a": {"dataset": "arc"}}}
    recipe = parse_recipe(recipe_values(("a", "b"), evaluation=evaluation), folder=tmp_path)
    tasks = [{"name": n, "model": str(family / n)} for n in "ab"]
    values = recipe_values(("a", "b"), base_model=str(family / "base")) | {"tasks": tasks}
    locked = lock(parse_recipe(values))
    assert with_present_data(recipe, locked) == locked


@pytest.mark.parametrize("name", ["./rows.csv", "./rows@2.csv"])
def test_data_that_decided_the_preference_cannot_be_replaced(family, tmp_path, name):
    (tmp_path / name).write_text("label,text\n0,x\n1,y\n")
    data = {"dataset": name}
    values = recipe_values(
        ("a", "b"),
        evaluation={"evaluator": "text-classification", "tasks": {"a": data}},
        preference={"labels": {"target": data, "classes": {"a": [0], "b": [1]}}},
    )
    sources = {
        "base_model": str(family / "base"),
        "tasks": [{"name": n, "model": str(family / n)} for n in "ab"],
    }
    recipe = parse_recipe(values | sources, folder=tmp_path)
    made = lock(parse_recipe(recipe_values(("a", "b")) | sources, folder=tmp_path))
    locked = replace(made, local_data={name: "sha256:" + "0" * 64})
    with pytest.raises(LockError, match="decided the preference or the method too"):
        with_present_data(recipe, locked)


def test_what_caused_an_error_of_datasets_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(EvaluationError, match=r"cannot be loaded \(DatasetGenerationError.*; .*(JSON|parse)"):
        load_examples(Data(dataset="./rows.jsonl"), tmp_path)
