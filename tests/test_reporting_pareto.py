"""Fronts and hypervolumes: by hand, and against slow oracles."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.reporting.pareto import covered, front, hypervolume


def inclusion_exclusion(points, reference):
    """Add the boxes of single points, take off those of pairs, and so on."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            sides = np.maximum(np.min(chosen, axis=0) - reference, 0)
            total += (-1) ** (size + 1) * np.prod(sides)
    return total


def some_points(scores, most):
    score = st.integers(0, 8).map(lambda number: number / 8)
    return st.lists(st.tuples(*[score] * scores), min_size=1, max_size=most).map(np.array)


def test_two_scores_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.5, 1.5], [0.5, 3.0]])
    assert front(points) == [0, 1, 2]
    assert hypervolume(points, (0, 0)) == 1 * 3 + 1 * 2 + 1 * 1
    assert hypervolume(points, (1, 1)) == 1.0


def test_three_scores_by_hand():
    points = np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    assert hypervolume(points, (0, 0, 0)) == 4.0


def test_equal_points_are_all_on_the_front_and_count_once():
    points = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert front(points) == [0, 1]
    assert hypervolume(points, (0, 0)) == 1.0


def test_points_at_or_below_the_reference_add_nothing():
    assert hypervolume(np.array([[0.5, 2.0], [1.0, 0.5]]), (0.5, 0.5)) == 0.0


@pytest.mark.parametrize("scores", [1, 2, 3, 4])
@given(data=st.data())
def test_the_volume_is_that_of_inclusion_and_exclusion(scores, data):
    points = data.draw(some_points(scores, 7))
    reference = np.array(data.draw(st.tuples(*[st.sampled_from([0.0, 0.25])] * scores)))
    assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference))


@given(some_points(3, 20))
def test_the_front_holds_the_whole_volume_and_each_of_its_points_some(points):
    best = front(points)
    floor = (-0.1,) * 3
    assert hypervolume(points[best], floor) == pytest.approx(hypervolume(points, floor))
    distinct = np.unique(points[best], axis=0)
    for left_out in range(len(distinct)):
        rest = np.delete(distinct, left_out, axis=0)
        assert hypervolume(rest, floor) < hypervolume(points, floor)


@given(some_points(3, 8), some_points(3, 8))
def test_a_sample_is_covered_by_a_point_that_is_nowhere_lower(samples, points):
    expected = [any((point >= sample).all() for point in points) for sample in samples]
    assert covered(samples, points).tolist() == expected
