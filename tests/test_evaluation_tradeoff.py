"""Comparisons per task and their means."""

import pytest

from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.evaluation.tradeoff import best_single, task_tradeoffs, weighted_mean


def score(model, task, value, num_examples=100):
    return Score(model, task, value, value - 0.1, value + 0.1, num_examples)


def scores(*values):
    return Scores("accuracy", "image-classification", tuple(score(*value) for value in values), {})


def test_each_task_is_compared_with_its_own_checkpoint_and_the_base_model():
    found = scores(("base_model", "a", 0.25), ("a", "a", 1.0), ("b", "a", 0.5), ("merged", "a", 0.75))
    row, other = task_tradeoffs(found, {"a": 0.7, "b": 0.3})
    assert (row.task, row.preference, row.to_own, row.to_base, row.num_examples) == (
        "a",
        0.7,
        -0.25,
        0.5,
        100,
    )
    assert (other.to_own, other.to_base, other.num_examples) == (None, None, None)


def test_rows_follow_the_preference():
    assert [row.task for row in task_tradeoffs(None, {"z": 0.1, "a": 0.9})] == ["z", "a"]


def test_the_weighted_mean_is_worked_by_hand():
    assert weighted_mean([score("m", "a", 0.5), score("m", "b", 1.0)], [0.2, 0.8]) == pytest.approx(0.9)


def test_a_task_without_weight_needs_no_score():
    assert weighted_mean([score("m", "a", 0.5), None], [1.0, 0.0]) == 0.5
    assert weighted_mean([score("m", "a", 0.5), None], [0.9, 0.1]) is None


def test_the_best_single_checkpoint_is_the_best_for_this_preference():
    found = scores(("a", "a", 1.0), ("a", "b", 0.0), ("b", "a", 0.5), ("b", "b", 0.75))
    assert best_single(found, {"a": 0.8, "b": 0.2}) == ("a", pytest.approx(0.8))
    assert best_single(found, {"a": 0.2, "b": 0.8}) == ("b", pytest.approx(0.7))


def test_there_is_no_best_single_checkpoint_where_none_was_scored_on_every_task():
    assert best_single(scores(("a", "a", 1.0), ("b", "b", 1.0)), {"a": 0.5, "b": 0.5}) is None
