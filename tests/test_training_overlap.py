"""Training examples that are evaluated too, told before anything is trained."""

import json

import pytest
from datasets import Dataset

from hub_magmax.evaluation.shared_examples import num_shared, read_digests, tell_shared
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.values import Data
from tests.learners import training_recipe


def told(folder, trained, others=None, **keys):
    """Return what is told where `a` and `b` are evaluated on two texts and three."""
    rows = {"a": ["one", "two"], "b": ["three", "four", "five"]}
    for task, texts in rows.items():
        lines = [json.dumps({"text": text, "label": "good", "id": text}) for text in texts]
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    lines = []
    recipe = parse_recipe(training_recipe() | (others or {}), folder=folder)
    data = Data(dataset="./trained.jsonl", **keys)
    tell_shared(recipe, [(data, Dataset.from_list(rows)) for rows in trained], lines.append)
    return lines


def row(text, label="good", **others):
    return {"text": text, "label": label} | others


@pytest.mark.parametrize(
    "trained, shared",
    [
        ([[row("six")], [row("seven")]], {}),
        ([[row("six"), row("one")], [row("two"), row("one")]], {"a": "2 of 2 examples"}),
        ([[row("one", "bad")]], {}),  # with another label it is another example
        ([[row("one", source="x"), row("four")]], {"a": "1 of 2 examples", "b": "1 of 3 examples"}),
        ([[row("one", id="another")]], {"a": "1 of 2 examples"}),  # the evaluator reads no such column
        ([[{"words": "one", "label": "good"}]], {}),
    ],
)
def test_evaluated_examples_that_are_trained_on_are_told(tmp_path, trained, shared):
    found = told(tmp_path, trained)
    assert len(found) == len(shared)
    for line, (task, number) in zip(found, shared.items(), strict=True):
        assert line.startswith(f"note: {number} of evaluation.tasks.{task} are training examples too")


def test_columns_may_have_other_names(tmp_path):
    trained = [[{"words": "one", "class": "good", "text": "two", "label": "good"}]]
    [line] = told(tmp_path, trained, input_column="words", label_column="class")
    assert line.startswith("note: 1 of 2 examples of evaluation.tasks.a")


def test_an_evaluator_that_does_not_say_what_it_reads_takes_all_columns():
    rows = Dataset.from_dict({"text": ["one", "one", "two"], "id": [1, 2, 1]})
    others = Dataset.from_dict({"id": [1], "text": ["one"]})
    own, known = (read_digests(object(), Data(dataset="./x.jsonl"), found) for found in (rows, others))
    assert num_shared(own, known) == 1


def test_the_reported_examples_of_a_comparison_count_too(tmp_path):
    others = {"compare": {"tune": {"dataset": "./b.jsonl"}, "report": {"dataset": "./a.jsonl"}}}
    assert any("1 of 2 examples of compare.report" in line for line in told(tmp_path, [[row("two")]], others))


def test_data_that_cannot_be_loaded_is_told_and_not_compared(tmp_path):
    others = {"evaluation": {"evaluator": "text-classification", "tasks": {"a": {"dataset": "./none.jsonl"}}}}
    [line] = told(tmp_path, [[row("one")]], others)
    assert line.startswith("note: examples of evaluation.tasks.a are not compared with those of training")
