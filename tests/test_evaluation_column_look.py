"""Columns of local examples as `plan` sees them, without `datasets` and without a model."""

import csv
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from hub_magmax.evaluation.column_look import first_rows, look_at_columns
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values, write_recipe
from tests.test_cli import call

ROWS = [{"question": f"which {n}?", "choices": ["x", "y"], "label": n % 2} for n in range(3)]
CHOICE = "multiple-choice"


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def look(folder, rows=ROWS, evaluator=CHOICE, **keys):
    (folder / "rows.jsonl").write_text(lines(rows))
    data = {"dataset": "./rows.jsonl", "split": "train"} | keys
    evaluation = {"evaluator": evaluator, "tasks": {"a": data}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=evaluation), folder=folder)
    (found,) = look_at_columns(recipe)
    return found


def test_columns_that_are_there_are_named(tmp_path):
    found = look(tmp_path)
    assert (found.task, found.columns, found.error) == ("a", ("question", "choices", "label"), None)


@pytest.mark.parametrize(
    ("keys", "what", "key"),
    [
        ({"input_column": "ask"}, "there is no column 'ask'", "input_column"),
        ({"label_column": "right"}, "there is no column 'right'", "label_column"),
        ({"template": "{{ ask }}"}, "there is no column 'ask'", "template"),
        ({"evaluator": "log-likelihood"}, "there is no column 'text'", "input_column"),
        ({"evaluator": "text-to-text"}, "there is no column 'text'", "input_column"),
    ],
)
def test_a_missing_column_is_told_with_its_key(tmp_path, keys, what, key):
    error = look(tmp_path, **keys).error
    assert what in str(error) and "one of question, choices, label" in str(error)
    assert error.problems[0].key == ("evaluation", "tasks", "a", key)


@pytest.mark.parametrize("keys", [{"template": "{{ question }}"}, {"split": "train[:2]"}])
def test_templates_and_parts_of_splits_fit(tmp_path, keys):
    assert look(tmp_path, **keys).error is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"label": -1}, "the label -1 is no class"),
        ({"question": None}, "nothing is in the column 'question'"),
    ],
)
def test_an_example_that_cannot_be_scored_is_told_by_number(tmp_path, change, what):
    rows = [*ROWS, ROWS[0] | change]
    error = look(tmp_path, rows).error
    assert what in str(error) and "example 3" in error.where
    assert look(tmp_path, rows, split="train[:3]").error is None, "a part of the split may leave it out"


def test_solved_examples_are_looked_at_too(tmp_path):
    (tmp_path / "shots.jsonl").write_text(lines([{"question": "why?", "label": 0}]))
    error = look(tmp_path, few_shot={"count": 1, "dataset": "./shots.jsonl"}).error
    assert "there is no column 'choices'" in str(error)
    assert error.problems[0].key == ("evaluation", "tasks", "a", "few_shot")


def test_what_is_not_cheap_is_said_to_be_unread(tmp_path):
    for place in ("./missing.jsonl", "me/on-the-hub", "./folder"):
        found = look(tmp_path, dataset=place)
        assert found.unread and found.error is None


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "array"])
def test_all_kinds_of_files_give_the_columns_that_datasets_gives(tmp_path, kind):
    from datasets import load_dataset

    path = tmp_path / f"rows.{'json' if kind == 'array' else kind}"
    rows = [{"text": 'a, "quoted"\tline\nbreak', "label": 1}, {"text": "ü", "label": 0}]
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows, indent=1) if kind == "array" else lines(rows))
    columns, found = first_rows(path)
    builder = {"tsv": "csv", "jsonl": "json", "array": "json"}.get(kind, kind)
    separator = {"sep": "\t"} if kind == "tsv" else {}
    expected = load_dataset(builder, data_files=str(path), split="train", **separator)
    assert list(columns) == expected.column_names
    assert [row["text"] for row in found] == (expected["text"][:] if kind != "parquet" else [])


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '["x"]', "\x00\x00"])
def test_damaged_files_are_not_read(tmp_path, content):
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        (tmp_path / name).write_text(content)
        assert first_rows(tmp_path / name) is None


def test_plan_names_what_run_would_stop_at(family):
    (family / "rows.jsonl").write_text(lines(ROWS))
    data = {"dataset": "./rows.jsonl", "split": "train"}
    tasks = {"a": data, "b": data | {"input_column": "ask"}, "c": {"dataset": "me/far"}}
    recipe = write_recipe(family, evaluation={"evaluator": CHOICE, "tasks": tasks})
    code, out, _ = call("plan", recipe, "--from-cache")
    assert code == 1
    assert "columns      FAILED: " in out and "there is no column 'ask'" in out
    assert "columns      of a: question, choices, label\n" in out
    assert "columns      of c: not looked at (no single file on this machine)" in out
    values = json.loads(call("plan", recipe, "--from-cache", "--json")[1])["evaluation"]["columns"]
    assert [row["error"] is None for row in values] == [True, False, True]
    del tasks["b"]
    write_recipe(family, evaluation={"evaluator": CHOICE, "tasks": tasks})
    assert call("plan", recipe, "--from-cache")[0] == 0


def test_looking_loads_neither_datasets_nor_torch(tmp_path):
    code = (
        "import sys, hub_magmax.evaluation.column_look; "
        "sys.exit(bool({'datasets', 'torch', 'transformers', 'pyarrow'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
