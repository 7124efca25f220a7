"""Tails, by hand, against a slow oracle, and by their properties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.scores import make_score
from hub_magmax.evaluation.tails import LEVELS, cvar_estimates, example_loss, tails


def score(model, scores, probabilities=None):
    given_ = probabilities or [None] * len(scores)
    outcomes = [Outcome(float(s), p) for s, p in zip(scores, given_, strict=True)]
    return make_score(model, "a", outcomes, is_share=set(scores) <= {0, 1})


def cvar(values, level):
    falling = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    return float(cvar_estimates(falling[None], level, len(falling))[0][0])


def slow_cvar(values, level):
    """Minimise q + E[max(x − q, 0)] / (1 − level) over q: the definition by optimisation."""
    return min(q + sum(max(x - q, 0) for x in values) / len(values) / (1 - level) for q in values)


def test_cvar_by_hand():
    values = [5, 1, 4, 2, 3, 0, 0, 0, 0, 0]
    assert cvar(values, 0.8) == 4.5
    assert cvar(values, 0.85) == pytest.approx((5 + 0.5 * 4) / 1.5)
    assert cvar(values, 0.99) == 5
    assert cvar(values, 0) == 1.5


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9, 0.95, 0.99]),
)
def test_cvar_is_the_minimum_that_defines_it(values, level):
    assert cvar(values, level) == pytest.approx(slow_cvar(values, level), abs=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_cvar_grows_with_the_level_from_the_mean_to_the_largest(values):
    found = [cvar(values, level) for level in (0, 0.5, 0.9, 0.99, 0.9999)]
    assert found[0] == pytest.approx(math.fsum(values) / len(values), abs=1e-12)
    assert found[-1] == pytest.approx(max(values))
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(found))


def test_a_tail_of_fewer_than_five_examples_is_not_told():
    values = np.linspace(0, 1, 100)
    assert [tail.level for tail in tails(values)] == [0.90, 0.95]
    assert [tail.level for tail in tails(np.linspace(0, 1, 500))] == list(LEVELS)
    assert tails(np.linspace(0, 1, 49)) == ()


def test_intervals_hold_the_estimate_and_shift_and_scale_with_the_values():
    values = np.sin(np.arange(200.0)) ** 3
    for tail, moved in zip(tails(values), tails(3 * values + 2), strict=True):
        assert tail.low < tail.value < tail.high
        assert (moved.low, moved.high) == pytest.approx((3 * tail.low + 2, 3 * tail.high + 2))


@pytest.mark.parametrize(("level", "num_examples"), [(0.9, 107), (0.95, 200), (0.99, 600)])
def test_intervals_of_tails_cover_the_truth_as_often_as_they_say(level, num_examples):
    truth = cvar(np.random.default_rng(999).beta(2, 8, 1_000_000), level)
    rng = np.random.default_rng(0)
    found = [tails(rng.beta(2, 8, num_examples), (level,))[0] for _ in range(200)]
    assert 0.92 <= sum(tail.low <= truth <= tail.high for tail in found) / 200 <= 0.98


def test_values_without_spread_have_an_interval_of_no_width():
    (tail, _) = tails(np.full(100, 0.25))
    assert (tail.value, tail.low, tail.high) == pytest.approx((0.25, 0.25, 0.25))


def test_losses_are_told_in_probability_where_there_is_one():
    before = score("a", [1, 1, 1, 0, 1], [0.9, 0.8, 0.7, 0.1, 0.6])
    after = score("merged", [1, 0, 0, 0, 1], [0.9, 0.1, 0.3, 0.4, 0.55])
    found = example_loss(before, after)
    assert found.in_probability
    assert [(w.index, w.before, w.after) for w in found.worst] == [
        (1, 0.8, 0.1),
        (2, 0.7, 0.3),
        (4, 0.6, 0.55),
    ]
    assert (found.right_before, found.flipped, found.flip_rate) == (4, 2, 0.5)
    assert found.flip_interval[0] < 0.5 < found.flip_interval[1]
    assert found.difference.mean == pytest.approx(-0.4)


def test_without_probabilities_the_scores_themselves_count():
    before, after = score("a", [-1.5, -2.0, -1.0]), score("merged", [-1.5, -4.0, -0.5])
    found = example_loss(before, after)
    assert not found.in_probability
    assert [(w.index, w.before, w.after) for w in found.worst] == [(1, -2.0, -4.0)]
    assert (found.right_before, found.flipped, found.flip_rate, found.flip_interval) == (None,) * 4


def test_nothing_can_flip_where_nothing_was_right():
    found = example_loss(score("a", [0, 0]), score("merged", [1, 0]))
    assert (found.right_before, found.flipped, found.flip_rate, found.flip_interval) == (0, 0, None, None)
    assert found.worst == ()


def test_there_is_no_loss_to_tell_without_single_outcomes_of_both():
    whole = score("a", [1, 0, 1])
    assert example_loss(whole, None) is None
    assert example_loss(whole, score("merged", [1, 0])) is None


def test_intervals_stay_within_what_a_loss_can_be():
    before = [0.99] * 60
    after = [0.0] * 4 + [0.1, 0.4, *np.linspace(0.9, 0.98, 54)]
    found = example_loss(score("a", [1] * 60, before), score("merged", [1] * 60, after))
    assert all(tail.high <= 1 for tail in found.tails)
    free = tails(np.subtract(before, after))
    assert free[0].high > 1
