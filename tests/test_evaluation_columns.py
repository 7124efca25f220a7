"""Columns that an evaluator reads, and data that lacks one: the key that names it, and what there is."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.evaluators import Columns, make_evaluator
from hub_magmax.evaluation.evaluators.examples import class_lookup, label_text
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.values import Data
from tests.classifiers import write_rows
from tests.families import recipe_values

ROWS = [{"ask": f"which {n}?", "options": ["x", "y"], "right": n % 2, "words": "x"} for n in range(8)]
DATA = {"dataset": "./rows.jsonl", "split": "train"}
SHOTS = {"count": 1, "dataset": "./shots.jsonl"}
CHOICE, CHOICES = "multiple-choice", {"choices_column": "options"}


class Pairs:
    """An evaluator that names a column itself."""

    def wanted(self, columns: Columns) -> list[str]:
        return [columns.input or "first", "second"]


def error_of(folder, evaluator, **keys) -> EvaluationError:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "shots.jsonl").write_text(json.dumps({"ask": "why?", "right": 0}))
    evaluation = {"evaluator": "log-likelihood", "tasks": {"a": DATA | keys}}
    recipe = parse_recipe(recipe_values(("a",), evaluation=evaluation), folder=folder)
    with pytest.raises(EvaluationError) as found:
        examples_for(evaluator, recipe.evaluation.tasks["a"], recipe, {})
    assert found.value.problems[0].key[:3] == ("evaluation", "tasks", "a")
    return found.value


@pytest.mark.parametrize(
    ("name", "options", "keys", "column", "named"),
    [
        (CHOICE, CHOICES, {"label_column": "right"}, "question", "input_column"),
        (CHOICE, CHOICES, {"input_column": "ask"}, "label", "label_column"),
        (CHOICE, {}, {"input_column": "ask", "label_column": "right"}, "choices", "choices_column"),
        (CHOICE, {}, {"template": "{{ ask }}", "label_column": "right"}, "choices", "choices_column"),
        ("log-likelihood", {}, {}, "text", "input_column"),
        ("log-likelihood", {}, {"template": "{{ ask }}"}, "text", "input_column"),
        ("log-likelihood", {}, {"prompt_column": "prompt"}, "prompt", "prompt_column"),
        ("text-classification", {}, {"label_column": "right"}, "text", "input_column"),
        ("image-classification", {}, {"label_column": "right"}, "image", "input_column"),
        ("text-to-text", {}, {"label_column": "right"}, "text", "input_column"),
    ],
)
def test_the_key_that_names_the_missing_column_is_told(tmp_path, name, options, keys, column, named):
    error = error_of(tmp_path, make_evaluator(name, options), **keys)
    assert f"there is no column {column!r}" in error.what
    assert error.where == "./rows.jsonl, split train"
    assert error.expected == "one of ask, options, right, words"
    option = named == "choices_column"
    place = "an option of the evaluator" if option else "beside the dataset"
    assert error.hint == f"Name one of them with {named}, {place}."
    assert error.problems[0].key[3:] == (() if option else (named,))


def test_a_column_that_nothing_names_is_told_as_it_is(tmp_path):
    error = error_of(tmp_path, Pairs(), input_column="ask", label_column="right")
    assert "there is no column 'second'" in str(error)
    assert error.hint == "No key names it: give one of them this name."


def test_a_column_that_solved_examples_lack_is_told_before_they_are_put_before_prompts(tmp_path):
    keys = {"input_column": "ask", "label_column": "right", "few_shot": SHOTS}
    error = error_of(tmp_path, make_evaluator(CHOICE, CHOICES), **keys)
    assert str(error).startswith("./shots.jsonl, split train: there is no column 'options'")
    assert error.expected == "one of ask, right"
    assert error.problems[0].key[3:] == ("few_shot",)


def test_labels_that_a_split_leaves_out_are_no_class():
    """Numbers count from the end in Python, and -1 stands for a hidden label."""
    with pytest.raises(EvaluationError, match="the label -1 is none of the data set's classes") as found:
        class_lookup({"cat": 0, "dog": 1}, ["cat", "dog"])(-1)
    assert "Choose another split" in found.value.hint
    with pytest.raises(EvaluationError, match=r"Expected a number from 0 to 1\. Check the data"):
        label_text(2, ["cat", "dog"])
    assert (label_text(1, ["cat", "dog"]), label_text(-1, None)) == ("dog", "-1")


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_images_are_found_in_data_that_does_not_say_so(tmp_path, kind):
    write_rows(tmp_path / "rows.parquet", [0, 1, 2])
    table = pq.read_table(tmp_path / "rows.parquet").replace_schema_metadata(None)
    if kind == "bytes":
        table = table.set_column(0, "image", pc.struct_field(table["image"], "bytes"))
    notes = [{"bytes": b"no image", "path": None}] * 3
    empty = [{"bytes": None, "path": None}] * 3
    stored = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = table.append_column("notes", pa.array(notes, stored)).append_column(
        "none", pa.array(empty, stored)
    )
    pq.write_table(table, tmp_path / "bare.parquet")
    whole, bare = (
        load_examples(Data(dataset=f"./{name}.parquet", split="test"), tmp_path) for name in ("rows", "bare")
    )
    assert bare["image"][2].tobytes() == whole["image"][2].tobytes() != whole["image"][1].tobytes()
    assert bare["notes"][0]["bytes"] == b"no image" and bare["none"][0]["bytes"] is None
