import math

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.preference.distance import (
    cosine_distance,
    mmd_distance,
    squared_distances,
    transport_distance,
    weights_from_distances,
)

DISTANCES = {"transport": transport_distance, "mmd": mmd_distance, "cosine": cosine_distance}

any_kind = pytest.mark.parametrize("kind", DISTANCES)


def sample(seed, num=12, centre=0.0, width=3):
    return np.random.default_rng(seed).normal(centre, 1.0, (num, width))


def exact_transport(train, target):
    """Return the cost by another solver: the best assignment of equally many examples."""
    cost = ((train[:, None] - target[None]) ** 2).sum(-1)
    cost = cost / cost.max()
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean()


def test_transport_falls_to_the_exact_assignment_as_regularisation_falls():
    train, target = sample(0), sample(1, centre=0.5)
    wanted = exact_transport(train, target)
    errors = [
        float(transport_distance(train, target, regularisation=r)[0]) - wanted for r in (0.3, 0.03, 0.003)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert 0 <= errors[-1] < 1e-3


def test_transport_agrees_with_the_exact_linear_programme_for_samples_of_different_size():
    train, target = sample(2, num=9), sample(3, num=14, centre=1.0)
    cost = squared_distances(train, target)
    wanted = ot.emd2(np.full(9, 1 / 9), np.full(14, 1 / 14), cost / cost.max())
    assert float(transport_distance(train, target, regularisation=0.003)[0]) == pytest.approx(
        wanted, abs=2e-3
    )


def test_plain_and_logarithmic_iterations_agree_where_they_meet():
    train, target = sample(4), sample(5, centre=0.5)
    above, below = (float(transport_distance(train, target, regularisation=r)[0]) for r in (0.02, 0.0199999))
    assert above == pytest.approx(below, abs=1e-6)


def test_transport_that_cannot_converge_is_refused():
    far_apart = np.concatenate([sample(6, num=30), sample(7, num=30, centre=100.0)])
    with pytest.raises(RecipeError, match="does not converge"):
        # Two clusters of slightly different weight exchange mass across a distance of many thousand units.
        transport_distance(far_apart, far_apart[:59], regularisation=1e-6)


@pytest.mark.parametrize(("target", "wanted"), [([[3.0, 4.0]], 1.0), ([[0.0, 0.0]], 0.0)])
def test_transport_between_single_examples_by_hand(target, wanted):
    assert transport_distance(np.zeros((1, 2)), np.array(target))[0] == pytest.approx(wanted)


def test_mmd_agrees_with_the_definition_pair_by_pair():
    train, target = sample(8, num=5), sample(9, num=4, centre=1.0)
    both = np.concatenate([train, target])
    squared = [((a - b) ** 2).sum() for i, a in enumerate(both) for j, b in enumerate(both) if i != j]

    def kernel(a, b):
        return math.exp(-((a - b) ** 2).sum() / (2 * float(np.median(squared))))

    def mean(first, second, same):
        pairs = [
            kernel(a, b) for i, a in enumerate(first) for j, b in enumerate(second) if not same or i != j
        ]
        return sum(pairs) / len(pairs)

    wanted = mean(train, train, True) + mean(target, target, True) - 2 * mean(train, target, False)
    assert mmd_distance(train, target)[0] == pytest.approx(wanted)


def test_a_mmd_draw_does_not_count_copies_as_pairs():
    target = sample(10, num=6)
    shares = np.array([[1, 1, 1, 0, 0, 0], [2, 2, 2, 0, 0, 0]]) / [[3], [6]]
    once, twice = mmd_distance(sample(11), target, shares)
    assert once == pytest.approx(twice)


def test_the_unbiased_mmd_of_one_distribution_is_zero_on_average():
    found = [float(mmd_distance(sample(2 * seed), sample(2 * seed + 1))[0]) for seed in range(100)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * np.std(found) / 10


@pytest.mark.parametrize(
    ("target", "wanted"),
    [([[2, 0]], 0), ([[0, 3]], 1), ([[-1, 0]], 2), ([[1, 1], [1, -1]], 0), ([[1, 0], [-1, 0]], 1)],
)
def test_cosine_by_hand(target, wanted):
    assert cosine_distance(np.array([[5.0, 0.0]]), np.array(target, float))[0] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["transport", "cosine"])
def test_a_weighted_example_counts_like_copies_of_it(kind):
    train, target = sample(12), sample(13, num=3, centre=1.0)
    weighted = DISTANCES[kind](train, target, np.array([[0.5, 0.25, 0.25]]))
    copied = DISTANCES[kind](train, target[[0, 0, 1, 2]])
    assert weighted == pytest.approx(copied, abs=1e-6)


@any_kind
def test_many_weightings_at_once_are_the_same_as_one_by_one(kind):
    train, target = sample(14), sample(15, num=7, centre=1.0)
    shares = np.random.default_rng(0).dirichlet(np.ones(7), 4)
    shares[0] = np.eye(7)[0]
    at_once = DISTANCES[kind](train, target, shares)
    assert at_once == pytest.approx(
        [DISTANCES[kind](train, target, row[None])[0] for row in shares], abs=1e-6
    )


@any_kind
@settings(deadline=None)
@given(scale=st.sampled_from([1e-200, 1e-3, 7.0, 1e200]))
def test_distances_do_not_depend_on_the_unit(kind, scale):
    train, target = sample(16), sample(17, centre=1.0)
    assert DISTANCES[kind](train * scale, target * scale) == pytest.approx(DISTANCES[kind](train, target))


features = arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.just(2)),
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e300, -1e300, 5e-324]), st.floats(-1e6, 1e6)
    ),
)


@any_kind
@settings(max_examples=25, deadline=None)
@given(tasks=st.lists(features, min_size=1, max_size=4), target=features, temperature=st.floats(1e-300, 10))
def test_weights_are_a_preference_for_identical_and_very_distant_samples(kind, tasks, target, temperature):
    shares = np.stack([np.full(len(target), 1 / len(target)), np.eye(len(target))[0]])
    samples = [*tasks, target, np.zeros((2, 2))]  # one task is the target itself
    distances = np.stack([DISTANCES[kind](train, target, shares) for train in samples], axis=1)
    weights = weights_from_distances(distances, temperature)
    assert np.isfinite(distances).all()
    assert (weights >= 0).all()
    assert weights.sum(axis=1) == pytest.approx([1, 1])


def test_weights_by_hand():
    found = weights_from_distances([[0.0, 0.01 * math.log(4)]], 0.01)
    assert found[0] == pytest.approx([0.8, 0.2])


def test_weights_of_distances_whose_similarities_all_underflow():
    assert weights_from_distances([[1e6, 1e6, 1e6 + 1]], 0.01)[0] == pytest.approx([0.5, 0.5, 0])


@any_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(kind, bad):
    broken = sample(18)
    broken[3, 1] = bad
    with pytest.raises(EvaluationError, match="NaN or an infinity"):
        DISTANCES[kind](broken, sample(19))


@any_kind
def test_an_empty_sample_is_refused(kind):
    with pytest.raises(EvaluationError, match="empty"):
        DISTANCES[kind](sample(20), np.zeros((0, 3)))
