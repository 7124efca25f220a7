import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.comparing import comparable, compare, comparison_rows, winning_recipe
from hub_magmax.cli import main
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.intervals import paired_difference
from hub_magmax.pipeline import lock
from hub_magmax.recipe.loading import load_recipe, parse_recipe, updated
from tests.classifiers import classifier_recipe, write_classifiers, write_rows
from tests.families import yaml_text

METHODS = ["average", "single_task", "last_task"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("comparing")
    write_classifiers(found, {"base": [0.0, 0.1, 0.0], "a": [1.0, 0.1, 0.0], "b": [0.0, 0.1, 4.0]})
    write_rows(found / "others.parquet", [0] * 5 + [2] * 3)
    return found


def values(**changes):
    spec = {
        "tune": {"dataset": "./rows.parquet"},
        "report": {"dataset": "./others.parquet"},
        "methods": METHODS,
        "scaling": [0.5, 1.0],
        **changes,
    }
    return classifier_recipe(compare=spec, preference={"weights": {"a": 1.0}}, method="average")


def compared(recipe):
    return compare(recipe, lock(comparable(recipe)))


def test_the_winner_is_chosen_on_one_sample_and_reported_on_the_other(folder):
    found = compared(parse_recipe(values(), folder=folder))
    rows = {method.candidate.group: method for method in found.methods}
    assert set(rows) == {*METHODS} and found.winner == "the recipe: average"
    # Weights for task `a` say cat: right on 6 of the 10, and on 5 of the 8 others.
    assert (rows["average"].tuned, rows["average"].reported.value) == (0.6, 0.625)
    assert (rows["last_task"].tuned, rows["last_task"].reported.value) == (0.1, 0.375)
    assert (found.num_tuning, found.num_reporting, found.base_model.value) == (10, 8, 0.0)
    assert rows["average"].to_winner is None
    expected = paired_difference([0.0] * 5 + [1.0] * 3, [1.0] * 5 + [0.0] * 3)
    assert rows["last_task"].to_winner == expected


def test_everything_that_was_tried_is_reported(folder):
    found = compared(parse_recipe(values(), folder=folder))
    # average and single_task under two preferences, last_task ignores them; two scalings each.
    assert len(found.tried) == 2 * (2 + 2 + 1)
    own = [trial["label"] for trial in json.loads(found.to_json())["tried"] if trial["is_recipe"]]
    assert own == ["the recipe: average"]
    told = "10 ways to merge, the recipe as it stands among them, chosen by 10 examples"
    assert told in found.table()
    assert "accuracy sd" in found.table("csv").split("\n")[0].split(",")


def test_the_recipe_as_it_stands_wins_where_it_alone_is_best_and_is_written_as_it_is(folder):
    spec = values(methods=["last_task"], scaling=[0.5]) | {"method": {"name": "average", "scaling": 0.7}}
    asked = parse_recipe(spec, folder=folder)
    found = compared(asked)
    # Weights for task `a` say cat, the last task says emu: 6 and 1 of the 10 examples.
    assert found.winner == "the recipe: average"
    assert "the winner is the recipe: average" in found.table()
    assert winning_recipe(asked, found).method.scaling == 0.7
    assert winning_recipe(asked, found).preference == asked.preference
    assert not any(t["is_recipe"] for t in compared(updated(asked, {"method": "auto"})).tried)


def test_a_method_with_several_options_has_a_row_for_each_that_names_what_differs(folder):
    ties = [{"name": "ties", "density": 0.2}, {"name": "ties", "density": 0.8}]
    asked = parse_recipe(values(methods=["average", *ties], scaling=[1.0]), folder=folder)
    found = compared(asked)
    labels = [method.label for method in found.methods]
    assert {*labels} == {"the recipe: average", "ties density 0.2", "ties density 0.8"}
    for form in ("text", "csv", "latex"):
        assert "ties density 0.2" in found.table(form) and "ties density 0.8" in found.table(form)
    tried = json.loads(found.to_json())["tried"]
    assert {t["label"]: t["options"]["density"] for t in tried if t["group"] != "average"} == {
        "ties density 0.2": 0.2,
        "ties density 0.8": 0.8,
    }
    drawn = [row.label for row in comparison_rows(found)]
    assert [label for label in drawn if label.startswith("ties density 0.8, λ 1")]


def test_the_recipe_names_the_options_in_which_it_differs_from_what_is_tried(folder):
    spec = values(methods=[{"name": "ties", "density": 0.2}], scaling=[1.0])
    found = compared(parse_recipe(spec | {"method": {"name": "ties", "density": 0.8}}, folder=folder))
    assert {method.label for method in found.methods} == {"ties density 0.2", "the recipe: ties density 0.8"}


def test_preferences_of_the_comparison_are_tried_too(folder):
    asked = parse_recipe(values(preferences={"other": {"weights": {"b": 1.0}}}), folder=folder)
    found = compared(updated(asked, {"preference": {"weights": {"b": 1.0}}}))
    assert {row["preference"] for row in found.tried} == {"recipe", "uniform"}
    asked = updated(
        asked,
        {
            "preference": {"weights": {"b": 1.0}},
            "compare": asked.to_dict()["compare"] | {"preferences": {"cats": {"weights": {"a": 1.0}}}},
        },
    )
    found = compared(asked)
    winner = next(m for m in found.methods if m.label == found.winner)
    assert winner.candidate.preference == "cats"
    assert winning_recipe(asked, found).preference.weights == {"a": 1.0}


def test_the_winner_is_a_recipe_that_runs(folder):
    (folder / "r.yaml").write_text(yaml_text(values()))
    before = {path.name for path in folder.iterdir()}
    result = CliRunner().invoke(main, ["compare", str(folder / "r.yaml")])
    assert result.exit_code == 0, result.output
    assert "the winner is the recipe: average" in result.output
    written = {path.name for path in folder.iterdir()} - before
    results = {"r.comparison.json", "r.comparison.png", "r.comparison.svg", "r.winner.yaml"}
    assert written == results | {"r.compare.journal"}
    winner = load_recipe(folder / "r.winner.yaml")
    assert winner.method.name == "average" and winner.method.scaling in (0.5, 1.0)
    assert winner.preference.weights == {"a": 1.0}
    with Image.open(folder / "r.comparison.png") as picture:
        assert picture.width == 800
    # Where the recipe's own model is there already, too.
    for name, output in (("r.yaml", "merged"), ("r.winner.yaml", "merged-winner")):
        result = CliRunner().invoke(main, ["run", str(folder / name)])
        assert result.exit_code == 0, result.output
        assert (folder / output / "model.safetensors").is_file()


def test_the_winners_recipe_keeps_what_this_machine_trusts(folder):
    asked = parse_recipe(values() | {"trusted_links": ["./store"], "output": {"path": "out/"}}, folder=folder)
    winner = winning_recipe(asked, compared(asked))
    assert (winner.trusted_links, winner.output.path) == (("./store",), "out-winner")


def test_uniform_winners_are_written_without_a_preference(folder):
    write_rows(folder / "emus.parquet", [2] * 6)
    write_rows(folder / "more-emus.parquet", [2] * 6)
    emus, more = {"dataset": "./emus.parquet"}, {"dataset": "./more-emus.parquet"}
    asked = parse_recipe(values(tune=emus, report=more, methods=["average"], scaling=[1.0]), folder=folder)
    found = compared(asked)
    assert next(iter(found.methods)).candidate.preference == "uniform"
    assert winning_recipe(asked, found).preference is None


def test_examples_that_chose_are_not_reported_on(folder):
    tune = {"dataset": "./rows.parquet", "split": "train[:6]"}
    report = {"dataset": "./rows.parquet", "split": "train[4:]"}
    with pytest.raises(EvaluationError, match=r"of 6 examples are those of compare\.tune"):
        compared(parse_recipe(values(tune=tune, report=report), folder=folder))


def test_examples_that_cannot_be_reported_on_are_told_before_anything_is_merged(folder, monkeypatch):
    monkeypatch.setattr("hub_magmax.merging.in_memory.InMemoryMerger.merge", None)
    report = {"dataset": "./others.parquet", "label_column": "class"}
    with pytest.raises(EvaluationError, match="there is no column 'class'") as found:
        compared(parse_recipe(values(report=report), folder=folder))
    assert found.value.problems[0].key == ("compare", "report", "label_column")


def test_a_winner_below_the_base_model_is_told(folder):
    found = compared(parse_recipe(values(), folder=folder))
    assert found.loss == ()
    better = replace(found.base_model, value=0.9)
    assert replace(found, base_model=better).loss == (
        "the winner is below the base model: 0.625 against 0.900",
    )
    assert "below the base model" in replace(found, base_model=better).table()


@pytest.mark.parametrize("missing", ["tune", "report"])
def test_a_comparison_without_a_sample_says_what_to_add(folder, missing):
    asked = values()
    del asked["compare"][missing]
    with pytest.raises(EvaluationError, match="one labelled sample of the target to choose by, and another"):
        compared(parse_recipe(asked, folder=folder))


def test_samples_that_are_too_small_are_refused(folder):
    write_rows(folder / "few.parquet", [0, 1, 2])
    with pytest.raises(EvaluationError, match=r"compare\.tune: 3 examples cannot say"):
        compared(parse_recipe(values(tune={"dataset": "./few.parquet"}), folder=folder))


def test_the_same_recipe_gives_the_same_report(folder):
    asked = parse_recipe(values(), folder=folder)
    assert compared(asked).to_json() == compared(asked).to_json()


@pytest.mark.parametrize(
    ("merits", "expected"),
    [
        ((0.5, 0.4), ()),
        ((0.4, 0.5), "average is within one standard error of ties on the examples that choose"),
        ((0.5, 0.4), "average did best on the examples that choose; ties is above it on the others"),
    ],
)
def test_why_the_winner_is_not_the_first_row_is_said(folder, merits, expected):
    found = compared(parse_recipe(values(), folder=folder))
    candidate = Candidate({"name": "average", "scaling": 1.0}, "recipe", (1.0,))
    first = replace(found.methods[0], label="average", candidate=candidate)
    other = replace(first, label="ties")
    tried = tuple(
        {"group": n, "merit": m, "is_recipe": False} for n, m in zip(("average", "ties"), merits, strict=True)
    )
    rows = (other, first) if expected else (first, other)
    shown = replace(found, methods=rows, winner="average", tried=tried)
    assert shown.reason == () if not expected else shown.reason[0].startswith(expected)
    assert all(line in shown.table() for line in shown.reason)


def test_the_recipe_has_one_row_where_it_is_the_best_of_its_method_and_else_two(folder):
    best = compared(parse_recipe(values(scaling=[1.0], methods=["average"]), folder=folder))
    assert [method.label for method in best.methods] == ["the recipe: average"]
    # Of two scalings that do equally well, 1 is the method's own, and 0.5 is the recipe's.
    spec = values(methods=["average"]) | {"method": {"name": "average", "scaling": 0.5}}
    other = compared(parse_recipe(spec, folder=folder))
    rows = {method.label: method.candidate.method["scaling"] for method in other.methods}
    assert rows == {"average": 1.0, "the recipe: average": 0.5}
    assert len(other.tried) == 4 and other.winner == "average"
