"""Costs of studies: the number of models is told before the first, and about the time of all after it."""

import json
import re
from contextlib import contextmanager
from itertools import count

import pytest
from click.testing import CliRunner

import hub_magmax
from hub_magmax.cli import main
from hub_magmax.recipe.loading import load_recipe
from tests.classifiers import classifier_recipe, write_classifiers, write_rows

ROWS, OTHERS = {"dataset": "./rows.parquet"}, {"dataset": "./others.parquet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("cost")
    write_classifiers(found, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(found / "others.parquet", [0] * 5 + [2] * 3)
    return found


def written(folder, name, **changes):
    compare = {"tune": ROWS, "report": OTHERS, "methods": ["average", "random_mix"], "scaling": [0.5, 1.0]}
    values = {
        "method": {"name": "average", "scaling": 0.7},
        "preference": {"weights": {"a": 0.8, "b": 0.2}},
        "evaluation": {"tasks": {"a": ROWS, "b": OTHERS}},
        "compare": compare,
        "sweep": {"budget": 5},
        "output": {"path": f"merged-{name}"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(
        json.dumps({k: v for k, v in classifier_recipe(**(values | changes)).items() if v is not None})
    )
    return path


def call(*words):
    done = CliRunner().invoke(main, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def announced(*words):
    """Return the lines that tell models that a command tries."""
    return [line for line in call(*words).stderr.splitlines() if "to try" in line]


def test_a_comparison_says_how_many_models_it_tries_and_how_to_try_fewer(folder):
    path = written(folder, "compared")
    (line,) = announced("compare", path)
    size = re.search(r"([0-9.]+) kB are read for each, ([0-9.]+) kB in all", line)
    # Two methods and scalings under two preferences, and the recipe, whose scaling is not among them.
    assert line.startswith(
        "9 models to try, 0 measured before: 9 ways to merge, the recipe as it stands among them, each on 10 "
        "examples; then the best of each of 2 methods, the recipe and the base model on 8 examples; "
    )
    assert float(size[2]) == pytest.approx(9 * float(size[1]), rel=0.01)
    assert line.endswith("; fewer by compare.methods and compare.scaling")
    (line,) = announced("compare", path)
    assert line.startswith("9 models to try, 9 measured before: ") and "are read" not in line


def test_a_comparison_counts_ways_alike_and_says_when_it_only_reads(folder, tmp_path):
    compare = {"tune": {**ROWS}, "report": {**OTHERS}, "methods": ["average", "random_mix"], "scaling": [0.5]}
    recipe = load_recipe(written(folder, "counted", compare=compare | {"seeds": [1, 2]}))

    def told():
        lines, shown = [], []

        @contextmanager
        def progress(total, doing, unit):
            done = []
            yield done.append
            shown.append((doing, sum(done), total, unit))

        found = hub_magmax.compare(
            recipe, journal=tmp_path / "counted.journal", report=lines.append, progress=progress
        )
        counted = [one for one in shown if one[3] == "ways"]
        return lines, counted, found

    lines, (comparing, scoring), found = told()
    number = len(found.tried)
    (line,) = [line for line in lines if "to try" in line]
    assert (
        f": {number} ways to merge, the recipe as it stands among them, those that draw with 2 seeds, "
        in line
    )
    assert comparing == ("comparing", number, number, "ways")
    assert f"{number} ways to merge, " in found.table()
    assert scoring[0] == "scoring the best of each method on other examples"
    assert any(line.startswith("scoring the best of each") for line in lines)
    lines, (_, reading), again = told()
    assert again == found and reading[0] == "reading what the best of each method did on other examples"
    assert not any("scoring" in line for line in lines)


def test_a_sweep_says_how_many_models_it_tries(folder):
    (line,) = announced(
        "sweep", written(folder, "swept", method={"name": "random_mix"}, sweep={"budget": 5, "seeds": [1, 2]})
    )
    assert line.startswith(
        "15 models to try, 0 measured before: 6 preferences with 2 seeds, the base model and 2 checkpoints "
        "of the tasks, on 18 examples; "
    )
    assert line.endswith("; fewer by sweep.budget")


def test_a_search_a_held_out_check_and_a_choice_say_how_many_models_they_try(folder):
    search = {"search": {"target": {**ROWS}, "budget": 4, "holdout": 0.5}}
    searched, checked = announced("lock", written(folder, "searched", preference=search))
    (chosen,) = announced("lock", written(folder, "chosen", method="auto"))
    assert searched.startswith("4 models to try: at most 4 preferences, each on 5 examples; ")
    assert searched.endswith("; fewer by preference.search.budget")
    assert checked.startswith("2 models to try: at most 2 preferences, each on 5 examples; ")
    assert "fewer by" not in checked
    assert chosen.startswith("4 models to try, 0 measured before: 4 ways to merge, each on 10 examples; ")


def test_a_greedy_choice_says_how_many_models_it_tries(folder):
    (line,) = announced("lock", written(folder, "greedy", preference={"greedy": {"target": ROWS}}))
    assert line.startswith("3 models to try: at most 3 preferences, each on 10 examples; ")


def test_the_time_of_all_models_is_told_after_the_second(folder, monkeypatch):
    ticks = count()
    monkeypatch.setattr("hub_magmax.analysis.study_cost.monotonic", lambda: 7.0 * next(ticks))
    lines = call("compare", written(folder, "timed")).stderr.splitlines()
    assert [line for line in lines if "took" in line] == [
        "the second model took 7.0 s: about 49 s for the 7 left"
    ]


@pytest.mark.parametrize("words", [("plan",), ("run", "--dry-run")])
def test_a_plan_says_how_many_models_the_studies_of_the_recipe_try(folder, words):
    path = written(folder, "planned")
    text = call(*words, path).stdout
    assert (
        "\ncompare      9 models to try: 9 ways to merge, the recipe as it stands among them, then the best "
        in text
    )
    assert (
        "\nsweep        9 models to try: 6 preferences, the base model and 2 checkpoints of the tasks; "
        in text
    )
    found = json.loads(call(*words, path, "--json").stdout)["studies"]
    assert {key: study["models"] for key, study in found.items()} == {"compare": 9, "sweep": 9}


def test_a_plan_is_silent_about_studies_that_would_be_refused_or_that_nobody_asked_for(folder):
    signed = {"preference": {"coefficients": {"a": 1.0, "b": 0.5}}, "method": "task_arithmetic"}
    assert "to try" not in call("plan", written(folder, "refused", sweep=None, **signed)).stdout
    assert "to try" not in call("plan", written(folder, "none", compare=None, sweep=None)).stdout


def test_an_estimated_preference_counts_in_the_plan_without_an_estimate(folder):
    estimated = {"search": {"target": ROWS, "budget": 4}}
    compare = {"tune": ROWS, "report": OTHERS, "methods": ["average"], "scaling": [0.5]}
    spec = compare | {"preferences": {"found": estimated, "same": {"weights": {"a": 0.8, "b": 0.2}}}}
    path = written(folder, "estimated", compare=spec, method={"name": "average", "scaling": 0.5})
    assert "compare      3 models to try: 3 ways to merge, " in call("plan", path).stdout
