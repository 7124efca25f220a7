"""Models of what merges keep: against least squares, by hand, and by what must not change them."""

import itertools

import numpy as np
import pytest

from hub_magmax.analysis.mergeability import (
    additive,
    as_cases,
    correlation,
    leave_tasks_out,
    left_after_additive,
    leverages,
    ridge,
)

TASKS = "abcdef"
PAIRS = list(itertools.combinations(TASKS, 2))
EFFECTS = dict(zip(TASKS, (0.1, -0.05, 0.02, 0.0, 0.03, -0.1), strict=True))


def drawn(kept, num_metrics=3, seed=0):
    """Return cases of all pairs whose metrics are drawn."""
    rng = np.random.default_rng(seed)
    return as_cases([(pair, rng.standard_normal(num_metrics), kept(*pair)) for pair in PAIRS])


def by_effects(one, other):
    return 0.8 + EFFECTS[one] + EFFECTS[other]


def test_additive_effects_are_found_and_predict_a_pair_that_was_not_seen():
    cases = drawn(by_effects)
    seen = cases.members @ np.array([1, 1, 0, 0, 0, 0]) < 2
    predicted = additive(cases.only(seen))(cases.only(~seen))
    assert predicted == pytest.approx([by_effects("a", "b")])


def test_a_new_task_counts_as_one_without_effect():
    """Of three pairs of three tasks: effects 1, 0 and -1 about the mean, by hand; the fourth is new."""
    cases = as_cases([("ab", (), 1.5), ("ac", (), 1.0), ("bc", (), 0.5), ("ad", (), 0.0)])
    predicted = additive(cases.only(np.array([True, True, True, False])))(cases)
    assert predicted == pytest.approx([1.5, 1.0, 0.5, 1.5])


def test_leaving_a_task_out_orders_its_merges_by_their_partners():
    worth = leave_tasks_out(drawn(by_effects), additive)
    assert worth.r == pytest.approx(1)
    assert 0.02 < worth.error < 0.1, "its own effect is not known"


def test_ridge_is_the_minimum_of_the_penalised_squares():
    cases = drawn(lambda one, other: EFFECTS[one] * EFFECTS[other])
    low, high = cases.metrics.min(0), cases.metrics.max(0)
    scaled = 2 * (cases.metrics - low) / (high - low) - 1
    scaled -= scaled.mean(0)
    design = np.vstack([scaled, np.sqrt(2.0) * np.eye(3)])  # the penalty as three more observations
    wanted = np.concatenate([cases.kept - cases.kept.mean(), np.zeros(3)])
    weights = np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert ridge(cases, 2.0)(cases) == pytest.approx(cases.kept.mean() + scaled @ weights)


def test_two_cases_by_hand():
    """Metrics 0 and 10 are -1 and 1; the slope is (1 · 2) / (2 + 1) of a half, so 1/3 to either side."""
    cases = as_cases([("ab", [0.0, 7.0], 0.5), ("cd", [10.0, 7.0], 1.5)])
    more = as_cases([("ab", [0.0, 99.0], 0), ("ab", [5.0, 7.0], 0), ("ab", [20.0, 7.0], 0)])
    assert ridge(cases)(more) == pytest.approx([1 - 1 / 3, 1, 2])


def test_units_of_metrics_and_copies_of_constants_change_nothing():
    cases = drawn(by_effects)
    scaled = cases._replace(
        metrics=np.hstack([cases.metrics * [1e3, -1e-3, 3] + 5, np.ones((len(PAIRS), 1))])
    )
    assert ridge(scaled)(scaled) == pytest.approx(ridge(cases)(cases))
    assert leave_tasks_out(scaled, ridge).r == pytest.approx(leave_tasks_out(cases, ridge).r)
    assert left_after_additive(scaled) == pytest.approx(left_after_additive(cases))


def test_metrics_that_tell_of_pairs_are_found_after_additive_effects_and_others_are_not():
    rng = np.random.default_rng(1)
    tasks = [f"t{number}" for number in range(14)]
    pairs = list(itertools.combinations(tasks, 2))
    effects, drift = rng.standard_normal(14), rng.standard_normal(len(pairs))
    members = np.array([[task in pair for task in tasks] for pair in pairs], float)
    told = [(p, [x], m @ effects + 0.3 * x) for p, x, m in zip(pairs, drift, members, strict=True)]
    blind = [(p, [rng.standard_normal()], kept) for p, _, kept in told]
    assert left_after_additive(as_cases(told)) > 0.9
    assert abs(left_after_additive(as_cases(blind))) < 0.3


def test_the_leverage_grows_with_the_distance_from_what_was_seen():
    cases = drawn(by_effects)
    middle, edge = cases.metrics.mean(0), cases.metrics.max(0)
    more = as_cases([("ab", middle, 0), ("ab", edge, 0), ("ab", edge + 9 * (edge - middle), 0)])
    most, found = leverages(cases, more)
    assert found[0] < 0.05 < most < 1 < found[2]
    assert most == pytest.approx(leverages(cases, cases)[1].max())


def test_a_correlation_needs_three_values_that_differ():
    assert correlation(np.array([1.0, 2]), np.array([1.0, 2])) is None
    assert correlation(np.ones(5), np.arange(5.0)) is None
    assert correlation(np.arange(5.0), 1 - np.arange(5.0)) == pytest.approx(-1)
