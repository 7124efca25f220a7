import json
import math

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.labels import preference_from_labels
from hub_magmax.preference.safeguards import (
    MIN_TARGET_EXAMPLES,
    bootstrap_shares,
    check_holdout,
    check_sample_size,
    draw,
    intervals,
    shrink,
)
from hub_magmax.recipe.loading import parse_recipe
from tests.families import recipe_values

CLASSES = {"a": [0, 1], "b": [2, 3]}


def labels_recipe(folder, labels, classes=CLASSES, **changes):
    Dataset.from_dict({"text": ["x"] * len(labels), "label": labels}).to_parquet(
        str(folder / "target.parquet")
    )
    spec = {"target": {"dataset": "target.parquet"}, "classes": classes} | changes
    return parse_recipe(recipe_values(tuple(classes), preference={"labels": spec}), folder=folder)


def test_the_least_target_sample_rules_out_an_unseen_majority():
    # The chance that a task with half of the target is missing from the sample.
    assert 0.5**MIN_TARGET_EXAMPLES <= 0.05 < 0.5 ** (MIN_TARGET_EXAMPLES - 1)


@pytest.mark.parametrize("num", [0, 1, 4])
def test_a_sample_that_is_too_small_is_refused(num):
    with pytest.raises(EvaluationError, match=f"here: {num} example.* Expected at least 5"):
        check_sample_size(num, "here")


def test_a_target_file_with_too_few_labels_of_any_task_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="4 examples cannot say how much each task matters"):
        resolve_preference(labels_recipe(tmp_path, [0, 0, 0, 2, 9, 9, 9]))


@given(st.integers(0, 60), st.integers(0, 70), st.integers(0, 5))
@settings(deadline=None)
def test_a_draw_is_a_subset_and_smaller_draws_are_part_of_larger_ones(num, drawn, seed):
    found = draw(num, drawn, seed, "x")
    assert len(found) == min(num, drawn)
    assert found == sorted(set(found))
    assert set(found) <= set(range(num))
    assert set(found) <= set(draw(num, drawn + 3, seed, "x"))


def test_draws_differ_between_seeds_and_purposes():
    found = {tuple(draw(100, 10, seed, purpose)) for seed in (0, 1) for purpose in ("target", "train/a")}
    assert len(found) == 4


def test_resamples_are_multinomial_shares_around_uniform():
    shares = bootstrap_shares(50, seed=3, num_resamples=2000)
    assert shares[0] == pytest.approx(np.full(50, 0.02))
    assert shares.sum(axis=1) == pytest.approx(np.ones(2001))
    assert (shares * 50)[1:] == pytest.approx(np.round(shares * 50)[1:])
    counts = 50 * shares[1:]
    assert counts.mean() == pytest.approx(1)
    assert counts.var() == pytest.approx(1 - 1 / 50, rel=0.02)  # of a multinomial count
    assert (bootstrap_shares(50, 3) == bootstrap_shares(50, 3)).all()
    assert not (bootstrap_shares(50, 3) == bootstrap_shares(50, 4)).all()


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=8))
@settings(deadline=None)
def test_intervals_contain_the_estimate(rows):
    draws = np.array(rows)
    for value, (low, high) in zip(draws[0], intervals(draws), strict=True):
        assert low <= value <= high


def test_intervals_by_hand():
    draws = np.array([[50.0], *[[float(value)] for value in range(101)]])
    assert intervals(draws) == [(2.5, 97.5)]


def test_intervals_of_label_shares_cover_the_truth_about_as_often_as_they_say(tmp_path):
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        owned = np.eye(2)[(rng.random(60) < 0.3).astype(int)]
        low, high = intervals(bootstrap_shares(60, seed) @ owned)[1]
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


@given(st.floats(0, 1))
def test_shrinking_moves_the_estimate_towards_the_prior_by_the_strength(strength):
    (found,) = shrink(np.array([[1.0, 0.0]]), np.array([0.25, 0.75]), strength)
    assert found == pytest.approx([1 - 0.75 * strength, 0.75 * strength])


def test_a_prior_of_strength_one_is_the_preference(tmp_path):
    recipe = labels_recipe(tmp_path, [0] * 8 + [2] * 2, towards={"b": 1.0}, strength=1)
    assert dict(resolve_preference(recipe).weights) == {"a": 0.0, "b": 1.0}


def test_uniform_is_what_the_estimate_is_drawn_to_by_default(tmp_path):
    found = resolve_preference(labels_recipe(tmp_path, [0] * 8 + [2] * 2, strength=0.5))
    assert found.weights == pytest.approx({"a": 0.65, "b": 0.35})
    assert found.explanation["estimate"] == {"a": 0.8, "b": 0.2}
    assert found.explanation["prior"] == {"a": 0.5, "b": 0.5}


@given(st.permutations([0] * 7 + [2] * 3))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_target_sample_does_not_change_label_weights(labels):
    assert preference_from_labels(labels, CLASSES) == {"a": 0.7, "b": 0.3}


def test_labels_find_a_planted_mixture_within_five_hundredths(tmp_path):
    rng = np.random.default_rng(1)
    found = [
        resolve_preference(labels_recipe(tmp_path, rng.permutation([0, 1] * 40 + [2, 3] * 10).tolist()))
        for _ in range(3)
    ]
    for preference in found:
        assert preference.weights == pytest.approx({"a": 0.8, "b": 0.2}, abs=0.05)
        for task, (low, high) in preference.explanation["intervals"].items():
            assert low < preference.weights[task] < high
            assert 0.1 < high - low < 0.25  # 2 · 1.96 · sqrt(.8 · .2 / 100) is 0.157


def scores(by_first):
    """Return a scorer that gives outcomes by the weight of task a."""
    return lambda weights: [Outcome(float(value)) for value in by_first[round(weights["a"], 3)]]


def test_the_holdout_check_compares_example_by_example():
    outcomes = {0.8: [1, 1, 1, 0, 1, 1], 0.5: [1, 0, 1, 0, 0, 1]}
    check = check_holdout({"a": 0.8, "b": 0.2}, {"a": 0.5, "b": 0.5}, scores(outcomes))
    assert (check.estimate, check.prior, check.difference) == pytest.approx((5 / 6, 3 / 6, 2 / 6))
    assert check.low <= check.difference <= check.high
    assert not check.estimate_loses


def test_an_equal_score_keeps_the_estimate():
    outcomes = {0.8: [1, 0, 1, 0, 0.1, 0.2], 0.5: [0.2, 0.1, 0, 1, 0, 1]}
    check = check_holdout({"a": 0.8}, {"a": 0.5}, scores(outcomes))
    assert check.difference == pytest.approx(0)
    assert not check_holdout({"a": 0.8}, {"a": 0.5}, lambda weights: [Outcome(1.0)] * 7).estimate_loses


def test_outcomes_of_different_examples_are_refused():
    with pytest.raises(EvaluationError, match="5 and 6 outcomes"):
        check_holdout({"a": 0.8}, {"a": 0.5}, scores({0.8: [1.0] * 5, 0.5: [1.0] * 6}))


def held_out(folder, *, estimate_wins, **holdout):
    seen = []

    def scorer(examples, data, num_tried):
        assert num_tried == 2
        seen.append((list(examples["label"]), data.dataset))
        wins = (lambda a: a > 0.5) if estimate_wins else (lambda a: a <= 0.5)
        return lambda weights: [Outcome(float(wins(weights["a"])))] * len(examples)

    labels = [0] * 32 + [2] * 8
    recipe = labels_recipe(folder, labels, holdout={"share": 0.25} | holdout)
    return resolve_preference(recipe, scorer=scorer), seen


def test_an_estimate_that_wins_on_the_holdout_is_kept_and_never_saw_it(tmp_path):
    found, ((held, dataset),) = held_out(tmp_path, estimate_wins=True)
    assert (len(held), dataset) == (10, "target.parquet")
    assert found.explanation["examples"] == 30
    assert found.weights == pytest.approx({"a": (32 - held.count(0)) / 30, "b": (8 - held.count(2)) / 30})
    assert found.explanation["holdout"]["used"] == "estimate"


def test_an_estimate_that_loses_on_the_holdout_gives_way_to_the_prior(tmp_path):
    found, _ = held_out(tmp_path, estimate_wins=False)
    assert dict(found.weights) == {"a": 0.5, "b": 0.5}
    assert found.explanation["holdout"]["used"] == "prior"
    assert found.explanation["holdout"]["difference"] == -1
    assert found.explanation["estimate"]["a"] > 0.5


def test_the_recipe_can_keep_an_estimate_that_loses(tmp_path):
    found, _ = held_out(tmp_path, estimate_wins=False, if_worse="estimate")
    assert found.weights["a"] > 0.5
    assert found.explanation["holdout"]["difference"] == -1


def test_a_holdout_that_cannot_be_scored_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="a hold-out needs models"):
        resolve_preference(labels_recipe(tmp_path, [0] * 40, holdout=0.25))


def test_a_holdout_of_too_few_examples_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holdout: 4 examples"):
        resolve_preference(labels_recipe(tmp_path, [0] * 40, holdout=0.1))


def test_the_explanation_is_plain_json_without_nan(tmp_path):
    found, _ = held_out(tmp_path, estimate_wins=True)
    text = json.dumps(found.explanation, allow_nan=False)
    assert json.loads(text) == found.explanation
    assert math.isfinite(found.explanation["holdout"]["low"])
