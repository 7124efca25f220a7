"""Names of results: every recipe has its own, and so has every set of values on the command line."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hub_magmax.cli import main
from hub_magmax.evaluation.scores import read_scores
from hub_magmax.fleet.canaries import canary
from hub_magmax.fleet.rebuilding import rebuild
from hub_magmax.fleet.verifying import verify
from hub_magmax.pipeline import lock, run
from hub_magmax.recipe.loading import load_recipe, parse_recipe, updated
from hub_magmax.recipe.lockfile import read_lock
from hub_magmax.recipe.result_files import ResultFiles, beside, place_of_results, place_of_scores
from tests.classifiers import classifier_recipe, write_classifiers, write_rows

BIASES = {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_classifiers(folder, BIASES)
    write_rows(folder / "cats.parquet", [0] * 9 + [2])
    return folder


def values(**changes):
    found = classifier_recipe(
        method={"name": "average", "scaling": 1.0},
        evaluation={"tasks": {"a": {"dataset": "./cats.parquet"}}},
        sweep={"walk": "grid", "budget": 3},
        compare={
            "tune": {"dataset": "./rows.parquet"},
            "report": {"dataset": "./cats.parquet"},
            "methods": ["average"],
            "scaling": [1.0],
        },
    )
    return found | changes


def read_scores_beside(folder: Path, prefix: str):
    return json.loads((folder / f"{prefix}scores.json").read_text())


def written(folder: Path, name: str, **changes) -> Path:
    (folder / name).write_text(yaml.safe_dump(values(**changes)))
    return folder / name


def test_files_are_named_after_their_recipe():
    assert beside(Path("x/mix.yaml")).path("lock.json") == Path("x/mix.lock.json")
    assert beside(Path("mix.v2.yaml")).path("lock.json") == Path("mix.v2.lock.json")


@pytest.mark.parametrize(
    "other", ["mix.yml", "mix", "mix.json", "mix.v2.yaml", "mix.winner.yaml", "Mix.yaml"]
)
def test_no_other_recipe_of_the_folder_has_the_same_files(other):
    assert beside(Path(other)).path("tradeoffs.csv") != beside(Path("mix.yaml")).path("tradeoffs.csv")


def test_values_on_the_command_line_have_files_of_their_own():
    recipe = parse_recipe(values())
    changed, again = (updated(recipe, {"sweep": {"budget": 9}}) for _ in range(2))
    elsewhere = updated(changed, {"output": {"path": "elsewhere"}})
    path = Path("mix.yaml")
    assert beside(path, recipe, recipe) == beside(path)
    assert beside(path, recipe, elsewhere) == beside(path, recipe, changed) == beside(path, recipe, again)
    assert beside(path, recipe, changed).prefix.startswith("mix.set-")
    other = updated(recipe, {"sweep": {"budget": 8}})
    assert beside(path, recipe, other) not in (beside(path), beside(path, recipe, changed))


@pytest.mark.parametrize("verb", ["lock", "compare", "sweep", "diagnose"])
def test_what_one_recipe_wrote_stays_as_it_is_under_another(family, tmp_path, verb):
    folder = shutil.copytree(family, tmp_path / "work")
    recipes = [written(folder, name) for name in ("mix.yaml", "sch.yaml", "mix.yml")]
    before = {path.name for path in folder.iterdir()}
    stored = {}
    for recipe in recipes:
        assert CliRunner().invoke(main, [verb, str(recipe)], catch_exceptions=False).exit_code == 0
        assert stored == {path: path.stat().st_mtime_ns for path in stored}
        stored |= {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name not in before}
    names = {path.name for path in stored}
    assert {name.removeprefix("mix.yml.") for name in names if name.startswith("mix.yml.")} == {
        name.removeprefix("sch.") for name in names if name.startswith("sch.")
    }
    assert len(names) % 3 == 0


def test_a_merged_model_has_the_results_of_its_own_recipe_and_checkpoints_only(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    mine, other = written(folder, "mix.yaml"), written(folder, "other.yaml", method="ties")
    assert CliRunner().invoke(main, ["merge", str(mine)], catch_exceptions=False).exit_code == 0
    recipe, beside_it = load_recipe(mine), ResultFiles(folder, "mix.")
    assert place_of_results(recipe, lock(recipe), beside_it) == ResultFiles(folder / "merged")
    assert place_of_results(load_recipe(other), lock(load_recipe(other)), beside_it) == beside_it
    for path in folder.glob("a/*.safetensors"):
        shutil.copy(folder / "b" / path.name, path)
    assert place_of_results(recipe, lock(recipe, hash_files=True), beside_it) == beside_it


def test_other_values_leave_the_results_of_a_merged_model_alone(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    recipe, out = written(folder, "mix.yaml"), folder / "merged"

    def call(verb, *words):
        done = CliRunner().invoke(main, [verb, str(recipe), *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    call("run")
    call("sweep")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert {"tradeoffs.csv", "scores.json", "README.md"} <= {path.name for path in before}
    call("sweep", "--set", "sweep.budget=5")
    call("evaluate", "--set", "evaluation.tasks.a.dataset=./rows.parquet")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    names = {path.name.split(".", 2)[2] for path in folder.glob("mix.set-*")}
    assert {"tradeoffs.csv", "scores.json", "outcomes.json"} <= names
    written(folder, "mix.yaml", evaluation={"tasks": {"a": {"dataset": "./rows.parquet"}}})
    call("evaluate")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert read_scores_beside(folder, "mix.")["data"]["a"]["examples"] == 10
    refused = CliRunner().invoke(main, ["evaluate", str(recipe), "--new-data"]).stderr
    assert (
        "--new-data corrects" in refused and f"{recipe}, line" in refused and "merged/recipe.yaml" in refused
    )
    other = load_recipe(written(folder, "other.yaml", sweep={"walk": "grid", "budget": 5}))
    beside_it = ResultFiles(folder, "other.")
    assert place_of_results(other, lock(other), beside_it) == beside_it


def test_scores_of_the_models_own_evaluation_go_into_its_folder(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    (folder / "data" / "of" / "cats").mkdir(parents=True)
    evaluation = {"tasks": {"a": {"dataset": "data/of/cats"}}}  # no name on the Hub: found from the recipe
    recipe = load_recipe(written(folder, "mix.yaml", evaluation=evaluation))
    recipe.output_path.mkdir()
    (recipe.output_path / "recipe.yaml").write_text(recipe.portable.to_yaml())
    beside_it, own = ResultFiles(recipe.folder, "mix."), recipe.to_dict()["evaluation"]

    def place(**changes):
        return place_of_scores(updated(recipe, {"evaluation": own | changes}), beside_it)

    for same in ({}, {"batch_size": 2, "quantized": ["int4"], "cells": "own", "margin": 0.5}):
        assert place(**same) == ResultFiles(recipe.output_path)
    data, general = own["tasks"]["a"], {"general": {"dataset": "./rows.parquet"}}
    for other in (
        {"evaluator": "text-classification"}, {"guard": general}, {"tasks": {"b": data}},
        {"tasks": {"a": {**data, "split": "test[:5]"}}}, {"tasks": {"a": data, "b": data}},
    ):  # fmt: skip
        assert place(**other) == beside_it
    assert place_of_scores(updated(recipe, {"sweep": None}), beside_it) == ResultFiles(recipe.output_path)


def test_a_model_without_an_evaluation_gets_the_one_that_scores_it(family, tmp_path, monkeypatch):
    folder = shutil.copytree(family, tmp_path / "work")
    out = folder / "merged"
    bare = written(folder, "mix.yaml", evaluation=None, sweep=None, compare=None)
    run(load_recipe(bare))
    (out / "model.sig").write_text("of the folder as it was")
    recipe = written(folder, "mix.yaml")
    weights = (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("hub_magmax.merging.output.evaluation_again.RECIPE_NAME", "no/recipe.yaml")
        assert CliRunner().invoke(main, ["evaluate", str(recipe)]).exit_code == 1
    done = CliRunner().invoke(main, ["evaluate", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "the model's recipe names this evaluation now: sign again (hub-magmax sign" in done.stderr
    stored = load_recipe(out / "recipe.yaml")
    assert stored.evaluation == load_recipe(recipe).evaluation and stored.sweep is None
    assert set(read_lock(out / "recipe.lock.json").local_data) == {"./cats.parquet"}
    assert set(verify(str(out))) >= {"recipe.yaml", "recipe.lock.json", "provenance.json"}
    assert (out / "model.safetensors").read_bytes() == weights
    assert canary(str(out), folder=folder).regressed == ()
    rebuild(str(out), folder=folder)
    assert not list(folder.glob("mix.scores.json"))


def test_a_model_that_is_scored_otherwise_names_how(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    recipe, out = written(folder, "mix.yaml"), folder / "merged"
    run(load_recipe(recipe))
    (folder / "mix.scores.json").write_text("{}")
    changed = ["--set", "evaluation.batch_size=2", "--set", "evaluation.quantized=[int4]"]
    done = CliRunner().invoke(main, ["evaluate", str(recipe), *changed], catch_exceptions=False)
    assert done.exit_code == 0 and "the model's recipe names this evaluation now\n" in done.stderr
    assert "mix.scores.json is of an earlier evaluation" not in done.stderr  # that of other values is
    stored = load_recipe(out / "recipe.yaml").evaluation
    assert (stored.batch_size, stored.quantized) == (2, ("int4",))
    assert read_scores(out).evaluation_digest == stored.digest
    verify(str(out))
    again = CliRunner().invoke(main, ["evaluate", str(recipe)], catch_exceptions=False)
    assert "mix.scores.json is of an earlier evaluation: the model's own scores are in" in again.stderr
    assert load_recipe(out / "recipe.yaml").evaluation == load_recipe(recipe).evaluation


@pytest.mark.parametrize("name", ["PROVENANCE_NAME", "REPORT_NAME", "RECIPE_NAME"])
def test_the_advice_about_an_evaluation_that_was_interrupted_mends_the_folder(
    family, tmp_path, monkeypatch, name
):
    folder = shutil.copytree(family, tmp_path / "work")
    recipe, out = written(folder, "mix.yaml"), folder / "merged"
    run(load_recipe(recipe))
    command = ["evaluate", str(recipe), "--set", "evaluation.batch_size=2"]
    with monkeypatch.context() as patched:
        patched.setattr(f"hub_magmax.merging.output.evaluation_again.{name}", "no/file")
        assert CliRunner().invoke(main, command).exit_code == 1
    advice = "interrupted there, run the same command again; otherwise"
    if CliRunner().invoke(main, ["verify", str(out)]).exit_code:
        assert advice in CliRunner().invoke(main, ["verify", str(out)]).stderr
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(out)], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("compare", "comparison.svg"), ("sweep", "tradeoffs.html"), ("diagnose", "diagnosis.json"),
        ("lock", "lock.json"), ("prefer", "lock.json"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_told_before_the_work(family, tmp_path, monkeypatch, verb, name):
    estimate = {"labels": {"target": {"dataset": "./cats.parquet"}, "classes": {"a": [0], "b": [2]}}}
    recipe = written(shutil.copytree(family, tmp_path / "work"), "mix.yaml", preference=estimate)
    recipe.with_name(f"mix.{name}").mkdir()
    for module in ("pipeline", "studies"):
        monkeypatch.setattr(f"hub_magmax.{module}.lock", None)
    done = CliRunner().invoke(main, [verb, str(recipe)], catch_exceptions=False)
    assert done.exit_code == 1 and f"mix.{name}: this is a folder, not a file" in done.stderr


def test_results_that_go_into_the_models_folder_are_looked_at_there(family, tmp_path, monkeypatch):
    folder = shutil.copytree(family, tmp_path / "work")
    recipe = written(folder, "mix.yaml")
    assert CliRunner().invoke(main, ["merge", str(recipe)], catch_exceptions=False).exit_code == 0
    for name in ("tradeoffs.csv", "diagnosis.json", "outcomes.json"):
        (folder / "merged" / name).mkdir()
    for work in (
        "evaluation.scoring.run_evaluator",
        "analysis.sweeping.sweep",
        "analysis.diagnosing.diagnose",
    ):
        monkeypatch.setattr(f"hub_magmax.{work}", None)
    for verb, name in (
        ("sweep", "tradeoffs.csv"),
        ("diagnose", "diagnosis.json"),
        ("evaluate", "outcomes.json"),
    ):
        done = CliRunner().invoke(main, [verb, str(recipe)], catch_exceptions=False)
        assert done.exit_code == 1 and f"merged/{name}: this is a folder, not a file" in done.stderr


def test_a_run_by_another_evaluation_is_what_canary_measures_from_then_on(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    out, recipe = folder / "merged", load_recipe(written(folder, "mix.yaml"))
    run(recipe)
    before = {path: path.stat().st_mtime_ns for path in out.glob("recipe*")}
    run(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("recipe*")}
    evaluation = {"tasks": {"b": {"dataset": "./rows.parquet"}}, "margin": 0.5}
    lines: list[str] = []
    (out / "model.sig").write_text("of the folder as it was")
    run(load_recipe(written(folder, "mix.yaml", evaluation=evaluation)), report=lines.append)
    told = "the model's own recipe and lock name this evaluation now: sign again"
    assert any(line.startswith(told) for line in lines)
    verify(str(out))
    assert [change.task for change in canary(str(out), folder=folder).tasks] == ["b"]
    assert load_recipe(out / "recipe.yaml").evaluation.margin == 0.5


def test_a_run_without_evaluation_leaves_the_scores_on_the_card(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    run(load_recipe(written(folder, "mix.yaml")))
    scored = (folder / "merged" / "README.md").read_text()
    done = run(load_recipe(written(folder, "mix.yaml")).model_copy(update={"evaluation": None}))
    assert done.scores is None
    assert "type: accuracy" in scored
    assert "type: accuracy" in (folder / "merged" / "README.md").read_text()


def test_a_comparison_follows_the_lock_beside_the_recipe(family, tmp_path):
    folder = shutil.copytree(family, tmp_path / "work")
    recipe = written(folder, "mix.yaml")
    assert CliRunner().invoke(main, ["lock", str(recipe)], catch_exceptions=False).exit_code == 0
    written(folder, "mix.yaml", seed=3)
    done = CliRunner().invoke(main, ["compare", str(recipe), "--json"])
    assert done.exit_code == 0
    assert "the lock's checkpoints stay; resolved anew: seed" in done.stderr
