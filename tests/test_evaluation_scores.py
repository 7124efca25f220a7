"""Tables of scores fit a terminal, whatever the number of tasks and the length of their names."""

from dataclasses import replace

import pytest

from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.evaluation.scores import Score, Scores, stored_means, write_scores


def square(names):
    """Return scores of base model, every checkpoint and the merged model on every task."""
    found = [
        Score(model, task, (0.9 if model == task else 0.25), 0, 1, 9)
        for model in ("base_model", *names, "merged", "merged:int4")
        for task in names
    ]
    return Scores("accuracy", "text-generation", tuple(found), {name: {} for name in names})


@pytest.mark.parametrize("count", [1, 3, 6, 20, 40, 255])
@pytest.mark.parametrize("length", [1, 20, 61])
def test_a_table_of_scores_fits_a_terminal(count, length):
    names = [f"{'x' * length}{number:03}" for number in range(count)]
    lines = square(names).table().split("\n")
    assert max(map(len, lines)) <= (120 if length < 61 else 80)
    assert len(lines) <= 2 * count + 8


def test_of_few_tasks_every_model_is_shown_on_every_task():
    assert (
        square(["a", "b"]).table().split("\n\n")[0]
        == """\
accuracy         a      b
base_model   0.250  0.250
a            0.900  0.250
b            0.250  0.900
merged       0.250  0.250
merged:int4  0.250  0.250"""
    )


def test_of_many_tasks_with_short_names_each_has_its_intervals():
    names = [f"task-{number:02}" for number in range(20)]
    lines = square(names).table().split("\n")
    assert lines[0].split() == ["task", "base", "model", "own", "checkpoint", "merged", "merged:int4"]
    assert lines[1].split()[:4] == ["task-00", "0.250", "[0.000,", "1.000]"]


LONG = [f"{'task-' * 10}{number:02}" for number in range(20)]


def test_of_tasks_with_long_names_each_is_a_row_without_intervals():
    lines = square(LONG).table().split("\n")
    assert lines[0].split() == ["accuracy", "base_model", "own", "merged", "merged:int4"]
    assert lines[1].split()[1:] == ["0.250", "0.900", "0.250", "0.250"]
    assert lines[20].split()[0].endswith("ask-19") and lines[21] == ""
    assert "every model on every task: scores.json" in lines


def test_long_names_that_differ_in_the_middle_stay_different():
    names = [f"{'start-' * 5}{number:02}{'-the-end' * 5}"[:64] for number in range(20)]
    rows = square(names).table().split("\n")[1:21]
    assert len({row.split("  ")[0] for row in rows}) == 20


def test_a_score_that_is_missing_is_a_dash():
    scores = square(LONG)
    kept = tuple(s for s in scores.scores if (s.model, s.task) != (LONG[3], LONG[3]))
    row = Scores("accuracy", "text-generation", kept, scores.data).table().split("\n")[4]
    assert row.split()[1:] == ["0.250", "-----", "0.250", "0.250"]


def test_means_are_read_without_single_outcomes(tmp_path):
    scores = Scores(
        "accuracy", "text-classification", (Score("merged", "a", 0.5, 0, 1, 2, (1.0, 0.0)),), {"a": {}}
    )
    write_scores(scores, tmp_path)
    (tmp_path / "outcomes.json").write_text("damaged")
    found = stored_means(MemorySource({"scores.json": (tmp_path / "scores.json").read_bytes()}))
    assert (found.get("merged", "a").value, found.get("merged", "a").outcomes) == (0.5, ())
    assert replace(found, scores=scores.scores) == scores


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"digest": "x", "scores": [], "metric": "m", "pipeline_tag": "p", "data": []}',
        b'{"digest": "x", "scores": [], "metric": "m", "pipeline_tag": "p", "data": {"a": 1}}',
        b'{"digest": "x", "scores": [{"model": "merged", "task": "a", "value": "x", "low": 0, "high": 1,'
        b' "num_examples": 1}], "metric": "m", "pipeline_tag": "p", "data": {}}',
    ],
)
def test_means_that_cannot_be_read_are_none(content):
    assert stored_means(MemorySource({"scores.json": content})) is None
    assert stored_means(MemorySource({})) is None
