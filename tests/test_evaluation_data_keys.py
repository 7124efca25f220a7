"""Errors about data: file, line and key of the recipe that names it, for people and programs."""

import json
from dataclasses import replace

import pytest

from hub_magmax.errors import EvaluationError, LockError
from hub_magmax.evaluation.data import pin_datasets, pin_local_data
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.scoring import load_evaluation_data
from hub_magmax.preference.samples import split_target
from hub_magmax.recipe.loading import load_recipe, parse_recipe
from tests.families import recipe_values, write_recipe
from tests.test_cli import call
from tests.test_planning_layout import BASE, planned

ROWS = [{"question": f"which {n}?", "choices": ["x", "y"], "label": n % 2, "text": "x"} for n in range(8)]
DATA = {"dataset": "./rows.jsonl", "split": "train"}
LOCK = planned({"a": BASE, "b": BASE}).lock


def recipe_of(folder, data=DATA, **changes):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "shots.jsonl").write_text(json.dumps(ROWS[0]))
    evaluation = {"evaluator": "multiple-choice", "tasks": {"a": DATA, "b": data}}
    return recipe_values(("a", "b"), **{"evaluation": evaluation} | changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dataset": "./none.jsonl"}, ()),
        ({"split": "nowhere"}, ()),
        ({"label_column": "answre"}, ("label_column",)),
        ({"prompt_column": "questoin"}, ("prompt_column",)),
        ({"input_column": "questoin"}, ("input_column",)),
        ({"template": "{{ questoin }}"}, ("template",)),
        ({"template": "{{ label.x.y }}"}, ("template",)),
        ({"few_shot": {"count": 9, "dataset": "./shots.jsonl"}}, ("few_shot", "count")),
    ],
)
@pytest.mark.parametrize("where", ["tasks", "guard"])
def test_data_that_cannot_be_used_is_told_by_its_key(tmp_path, changes, key, where):
    values = recipe_of(tmp_path)
    values["evaluation"][where] = (
        {"a": DATA, "b": DATA | changes} if where == "tasks" else {"g": DATA | changes}
    )
    with pytest.raises(EvaluationError) as found:
        load_evaluation_data(parse_recipe(values, folder=tmp_path), LOCK)
    assert found.value.problems[0].key == ("evaluation", where, "b" if where == "tasks" else "g", *key)


def test_changed_data_and_data_that_is_not_on_the_hub_are_told_by_their_keys(tmp_path, hub):
    values = recipe_of(tmp_path)
    recipe = parse_recipe(values, folder=tmp_path)
    locked = replace(LOCK, local_data=pin_local_data(recipe))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(LockError) as found:
        load_evaluation_data(recipe, locked)
    assert found.value.problems[0].key == ("evaluation", "tasks", "a", "dataset")
    values = recipe_of(tmp_path, DATA | {"dataset": "me/nowhere"})
    with pytest.raises(EvaluationError, match="cannot be reached") as unknown:
        pin_datasets(parse_recipe(values, folder=tmp_path))
    assert unknown.value.problems[0].key == ("evaluation", "tasks", "b")


def test_data_of_a_preference_is_told_by_its_key(tmp_path):
    labels = {"target": DATA | {"label_column": "answre"}, "classes": {"a": [0], "b": [1]}}
    recipe = parse_recipe(recipe_of(tmp_path, preference={"labels": labels}), folder=tmp_path)
    with pytest.raises(EvaluationError) as found:
        split_target(recipe.preference.spec, recipe, "preference.labels", labelled=True)
    assert found.value.problems[0].key == ("preference", "labels", "target", "label_column")


def test_every_data_of_a_recipe_has_its_key(tmp_path):
    def data(number):
        return DATA | {"split": f"train[:{number}]"}

    train = {"target": data(3), "train": {"a": data(4), "b": data(5)}}
    shots = data(2) | {"few_shot": {"count": 1, "dataset": "./shots.jsonl"}}
    values = recipe_of(tmp_path, shots, preference={"cosine": train})
    values["compare"] = {"tune": data(6), "report": data(7), "preferences": {"other": {"cosine": train}}}
    values["statistics"] = {"data": {"a": data(8), "b": data(9)}}
    recipe = parse_recipe(values, folder=tmp_path)
    places = {
        recipe.evaluation.tasks["b"].shots: ("evaluation", "tasks", "b", "few_shot"),
        recipe.preference.spec.train["b"]: ("preference", "cosine", "train", "b"),
        recipe.compare.report: ("compare", "report"),
        recipe.statistics.data["b"].model_copy(update={"revision": "a" * 40}): ("statistics", "data", "b"),
    }
    for spec, key in places.items():
        with pytest.raises(EvaluationError) as found, about_data(recipe, spec):
            raise EvaluationError("no")
        assert found.value.problems[0].key == key


def test_people_and_programs_are_told_the_line(family):
    (family / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    tasks = {name: dict(DATA) for name in "abc"}
    tasks["b"]["label_column"] = "answre"
    path = write_recipe(family, evaluation={"evaluator": "multiple-choice", "tasks": tasks})
    line = 1 + path.read_text().splitlines().index("      label_column: answre")
    code, out, _ = call("run", path, "--json")
    (problem,) = json.loads(out)["error"]["problems"]
    assert (code, problem["file"], problem["line"]) == (1, str(path), line)
    assert problem["key"] == ["evaluation", "tasks", "b", "label_column"]
    assert load_recipe(path).evaluation.tasks["b"].label_column == "answre"
