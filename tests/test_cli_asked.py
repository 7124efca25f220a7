import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hub_magmax.cli import main
from tests.families import make_tensors, write_checkpoint, write_recipe
from tests.test_cli import call


def answer(*words: object) -> dict:
    code, out, err = call(*words, "--json")
    assert code == 0, out + err
    return json.loads(out)


def commits(lock: dict) -> dict[str, object]:
    sources = {"base_model": lock["base_model"], **lock["tasks"]}
    return {name: (source["commit"], source["files"]) for name, source in sources.items()}


@pytest.mark.parametrize("verb", ["validate", "plan"])
def test_a_recipe_comes_from_standard_input_and_starts_at_the_current_folder(family, monkeypatch, verb):
    text = write_recipe(family).read_text()
    (family / "recipe.yaml").unlink()
    monkeypatch.chdir(family)
    result = CliRunner().invoke(main, [verb, "-"], input=text)
    assert result.exit_code == 0, result.output
    wrong = CliRunner().invoke(main, [verb, "-"], input=f"{text}sed: 1\n")
    assert "standard input, line 10, column 1, sed: unknown key 'sed'" in wrong.stderr


@pytest.mark.parametrize("way", ["< recipe.yaml", '<<< "$(cat recipe.yaml)"', "process"])
def test_streams_of_the_shell_are_recipes_of_the_current_folder(family, way):
    write_recipe(family)
    (family / "recipe.lock.json").write_text("not looked at")
    words = "<(cat recipe.yaml)" if way == "process" else f"/dev/stdin {way}"
    script = f"{sys.executable} -m hub_magmax plan {words}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", script], cwd=family, env=env, capture_output=True, text=True, check=False
    )
    assert "base model   ./base" in done.stdout, done.stderr


def test_results_of_a_stream_are_named_after_it_and_it_has_no_lock(family, monkeypatch):
    text = write_recipe(family).read_text()
    monkeypatch.chdir(family)
    done = CliRunner().invoke(main, ["diagnose", "-"], input=text)
    assert re.search(r"stdin-[0-9a-f]{8}\.diagnosis\.json", done.stdout), done.output
    refused = CliRunner().invoke(main, ["lock", "-"], input=text)
    assert (refused.exit_code, "give --out FILE" in refused.stderr) == (1, True)


def test_another_preference_keeps_the_checkpoints_of_the_lock(family):
    recipe = write_recipe(family, method={"name": "average"})
    before = answer("lock", recipe)
    write_checkpoint(family / "b", make_tensors(9, base=make_tensors(0)))
    code, out, err = call("plan", recipe, "--preference", "a=.7,b=.3", "--json")
    assert (code, json.loads(out)["preference"]) == (0, {"a": 0.7, "b": 0.3, "c": 0.0})
    assert "the lock's checkpoints stay; resolved anew: preference" in err
    assert json.loads((family / "recipe.lock.json").read_text()) == before


def test_an_edited_method_keeps_the_checkpoints_and_a_renewed_lock_says_so(family):
    before = answer("lock", write_recipe(family, method="average"))
    recipe = write_recipe(family, method="ties", seed=3)
    code, _, err = call("lock", recipe, "--keep")
    assert (code, err.strip()) == (0, "the lock's checkpoints stay; resolved anew: method and seed")
    after = json.loads((family / "recipe.lock.json").read_text())
    assert after["method"]["name"] == "ties"
    assert commits(after) == commits(before)
    assert call("plan", recipe)[2] == ""


def test_a_source_that_changed_alone_is_pinned_anew(family):
    before = answer("lock", write_recipe(family))
    recipe = write_recipe(family)
    locked = family / "other.lock.json"
    _, out, err = call("lock", recipe, "--keep", "--set", "tasks.c.model=./b", "--out", locked, "--json")
    assert "the lock's checkpoints stay" in err
    after = json.loads(out)
    assert commits(after)["c"] == commits(before)["b"]
    write_checkpoint(family / "d", make_tensors(7, base=make_tensors(0)))
    err = call("lock", recipe, "--keep", "--set", "tasks.c.model=./d", "--out", locked)[2]
    assert "the lock's checkpoints stay, but c, pinned now" in err


def test_a_named_lock_of_another_recipe_is_refused(family):
    recipe = write_recipe(family, method="average")
    other = family / "other.lock.json"
    answer("lock", recipe, "--set", "seed=3", "--out", other)
    for verb in ("plan", "merge", "diagnose"):
        code, _, err = call(verb, recipe, "--lock", other)
        assert code == 1
        assert "not the one that this lock was made from: seed" in err
    assert call("plan", recipe, "--lock", other, "--set", "output.path=elsewhere")[0] == 1
    assert answer("plan", recipe, "--lock", other, "--set", "seed=3")
    code, _, err = call("plan", recipe, "--lock", other, "--set", "method=ties")
    assert (code, "resolved anew: method and seed" in err) == (0, True)
    other.rename(family / "recipe.lock.json")
    assert "the lock's checkpoints stay; resolved anew: seed" in call("plan", recipe)[2]


def test_a_merge_under_another_preference_needs_an_output_of_its_own(family):
    recipe = write_recipe(family, method="average")
    answer("run", recipe)
    lock = (family / "merged" / "recipe.lock.json").read_text()
    code, _, err = call("run", recipe, "--preference", "a=1")
    assert code == 1
    assert "the output folder already holds a model" in err
    assert "--output" in err
    answer("run", recipe, "--preference", "a=1", "--output", family / "for-a")
    assert (family / "merged" / "recipe.lock.json").read_text() == lock
    stored = yaml.safe_load((family / "for-a" / "recipe.yaml").read_text())
    assert stored["preference"] == {"weights": {"a": 1.0}}


def test_a_merged_model_belongs_to_the_recipe_that_it_was_merged_from(family):
    recipe = write_recipe(family, method="average")
    answer("run", recipe)
    code, _, err = call("card", recipe, "--preference", "a=1")
    assert code == 1
    assert "the recipe changed since this model was merged: preference" in err


def test_an_error_of_a_plan_names_the_option_that_gives_the_value(family):
    err = call("plan", write_recipe(family), "--memory", "200")[2]
    assert "--memory 200, output.memory: 200 bytes are less than" in err


def test_validating_says_what_it_did_not_look_at(family):
    recipe = write_recipe(family, tasks=[{"name": "a", "model": "./a"}, {"name": "b", "model": "./none"}])
    code, out, _ = call("validate", recipe)
    assert code == 0
    assert "note: tasks.1.model: there is no ./none on this machine" in out
    assert "checkpoints were not opened: `hub-magmax plan` reads their headers" in out
    assert "tasks.0.model" not in out and "data was not looked at" not in out
    write_recipe(family, evaluation={"evaluator": "log-likelihood", "tasks": {"a": {"dataset": "a.jsonl"}}})
    assert "data was not looked at: `plan` reads the columns of local files" in call("validate", recipe)[1]
