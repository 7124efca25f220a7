import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp, wilcoxon

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.intervals import (
    bootstrap_means,
    mean_interval,
    paired_difference,
    resampled_ranks,
    wilson_interval,
)


def test_mcnemar_by_hand():
    # Seven examples gained, one lost: twice the probability of at most one head in eight throws.
    first, second = [1.0] * 7 + [0.0] + [1.0] * 4, [0.0] * 7 + [1.0] + [1.0] * 4
    found = paired_difference(first, second)
    assert (found.mean, found.gained, found.lost, found.num_examples) == (0.5, 7, 1, 12)
    assert found.p_value == pytest.approx(2 * (1 + 8) / 2**8)


def test_other_scores_are_ranked():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, 50), rng.normal(0, 1, 50)
    found = paired_difference(first, second)
    wanted = wilcoxon(first - second, zero_method="zsplit", method="approx").pvalue
    assert found.p_value == pytest.approx(wanted)
    assert found.mean == pytest.approx((first - second).mean())


def test_models_that_agree_everywhere_do_not_differ():
    found = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), st.integers(0, 9))
def test_swapping_the_models_changes_the_sign_alone(pairs, seed):
    first, second = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found, swapped = paired_difference(first, second, seed=seed), paired_difference(second, first, seed=seed)
    assert found.mean == -swapped.mean
    assert (found.low, found.high) == pytest.approx((-swapped.high, -swapped.low))
    assert (found.gained, found.lost, found.p_value) == (swapped.lost, swapped.gained, swapped.p_value)
    assert found.low <= found.mean <= found.high


def test_resamples_have_the_mean_and_the_spread_of_theory():
    values = np.random.default_rng(1).normal(2, 3, 400)
    means = bootstrap_means(values, seed=0, num_resamples=4000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)
    assert means.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.05)


def test_resamples_depend_on_the_seed_alone():
    values = np.arange(50.0)
    found = bootstrap_means(values, seed=3)
    assert (bootstrap_means(values, seed=3, draws_at_once=170) == found).all()
    assert (bootstrap_means(values, seed=4) != found).any()


def test_a_large_resample_is_drawn_in_pieces():
    (whole,) = resampled_ranks(1000, 3, 7)
    rows = [*resampled_ranks(1000, 3, 7, draws_at_once=300)]
    assert [len(row) for row in rows] == [1] * 7
    assert (np.concatenate(rows) == whole).all()


def test_shares_have_wilsons_interval_and_other_means_students():
    low, high = mean_interval([1.0] * 8 + [0.0] * 2, is_share=True)
    wanted = binomtest(8, 10).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((wanted.low, wanted.high))
    values = [-1.5, -0.2, -3.0, -0.9]
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values, is_share=False) == pytest.approx((interval.low, interval.high))


def test_a_mean_over_seeds_has_the_interval_of_its_own_value():
    # Of 40 answers 32 are right with either seed, and one with one of two: 32.5. Both ends solve Wilson's
    # equation: a share p lies 1.96 of its standard errors, sqrt(p (1 - p) / 40), from the measured .8125.
    low, high = mean_interval([1.0] * 32 + [0.5] + [0.0] * 7, is_share=True)
    for end in (low, high):
        assert abs(0.8125 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 40), rel=1e-6)
    assert low < 0.8125 < high


@given(st.integers(1, 500), st.data())
def test_whole_counts_have_the_interval_of_scipy_bit_for_bit(trials, data):
    successes = data.draw(st.integers(0, trials))
    wanted = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson_interval(successes, trials) == (wanted.low, wanted.high)


def test_a_single_value_has_no_spread():
    with pytest.raises(EvaluationError, match="says nothing about how examples differ"):
        mean_interval([-1.0], is_share=False)


def share_covered(interval, truth, repeats=2000):
    """Return how often, in simulated repeats, an interval contains the truth.

    Of exact intervals one in twenty sets of 200 repeats lies outside of 92 to 98 % by chance, of 2000 none.
    """
    rng = np.random.default_rng(0)
    found = [interval(rng) for _ in range(repeats)]
    return sum(low <= truth <= high for low, high in found) / repeats


@pytest.mark.parametrize(("share", "num_examples"), [(0.66, 107), (0.9, 640), (0.98, 100)])
def test_intervals_of_shares_cover_the_truth_as_often_as_they_say(share, num_examples):
    def interval(rng):
        return mean_interval((rng.random(num_examples) < share).astype(float), is_share=True)

    assert 0.92 <= share_covered(interval, share) <= 0.98


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_of_means_cover_the_truth_as_often_as_they_say(draw):
    def interval(rng):
        return mean_interval(getattr(rng, draw)(size=64), is_share=False)

    assert 0.92 <= share_covered(interval, {"normal": 0, "exponential": 1}[draw]) <= 0.98


@pytest.mark.parametrize(("first", "second", "num_examples"), [(0.96, 0.66, 107), (0.9, 0.88, 400)])
def test_intervals_of_differences_cover_the_truth_as_often_as_they_say(first, second, num_examples):
    def interval(rng):
        # Half of the examples are as hard for one model as for the other.
        hard, other = rng.random((2, num_examples))
        other = np.where(rng.random(num_examples) < 0.5, hard, other)
        found = paired_difference((hard < first).astype(float), (other < second).astype(float))
        return found.low, found.high

    assert 0.92 <= share_covered(interval, first - second, repeats=200) <= 0.98
