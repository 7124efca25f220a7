"""Walks through the simplex: lattices by hand, and a search that finds a front which is known."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_magmax.analysis.simplex import as_written, first_design, grid, lattice, propose, schedule
from hub_magmax.reporting.pareto import hypervolume


def test_lattices_by_hand():
    assert lattice(2, 2).tolist() == [[0, 1], [0.5, 0.5], [1, 0]]
    assert len(lattice(3, 4)) == 15 and len(lattice(4, 3)) == 20
    assert lattice(1, 5).tolist() == [[1]]


@given(st.integers(2, 5), st.integers(2, 80))
def test_a_grid_is_the_finest_lattice_within_the_budget(num_tasks, budget):
    points = grid(num_tasks, budget)
    assert np.allclose(points.sum(axis=1), 1) and (points >= 0).all()
    assert len(points) <= max(budget, num_tasks)
    steps = round(1 / points[points > 0].min())
    assert math.comb(steps + num_tasks, num_tasks - 1) > budget


def test_a_schedule_goes_from_the_first_task_to_the_last():
    points = schedule(3, 9)
    assert np.allclose(points.sum(axis=1), 1)
    assert np.allclose(points[4], 1 / 3)
    assert points[0, 0] > 0.9 and points[-1, 2] > 0.9
    assert (np.diff(points[:, 2]) > 0).all()


@given(st.integers(2, 8), st.integers(9, 60))
def test_the_first_design_holds_the_middle_and_the_corners(num_tasks, budget):
    points = first_design(num_tasks, budget)
    assert np.allclose(points[0], 1 / num_tasks)
    assert points[1 : num_tasks + 1].tolist() == np.eye(num_tasks).tolist()
    assert len(points) <= max(num_tasks + 1, budget // 2)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
def test_written_weights_sum_to_one_in_decimals_and_stay_near(masses):
    weights = np.array(masses) / sum(masses)
    written = as_written(weights)
    assert sum(Fraction(str(weight)) for weight in written) == 1
    assert np.abs(np.array(written) - weights).max() <= 1e-4 + 1e-12
    assert all(weight >= 0 for weight in written)


def test_thirds_are_written_as_a_person_would():
    assert as_written(np.full(3, 1 / 3)) == (0.3334, 0.3333, 0.3333)
    assert as_written(np.array([0.25, 0.75])) == (0.25, 0.75)


def explore(objective, reference, num_tasks, budget):
    weights = list(first_design(num_tasks, budget))
    while len(weights) < budget:
        weights.append(propose(np.array(weights), np.array([objective(w) for w in weights]), reference))
    return np.array(weights)


def hill(weights):
    """Three scores, above the reference together only in a small part of the simplex."""
    return 1 / (1 + np.exp(-12 * (weights - (0.25, 0.3, 0.2))))


def test_the_search_finds_what_a_five_times_denser_grid_finds():
    reference = (0.5, 0.5, 0.5)
    found = explore(hill, reference, 3, 60)
    dense = lattice(3, 23)
    assert (len(found), len(dense)) == (60, 300)
    wanted = hypervolume(np.array([hill(w) for w in dense]), reference)
    assert hypervolume(np.array([hill(w) for w in found]), reference) >= 0.99 * wanted
    same_size = grid(3, 60)
    assert hypervolume(np.array([hill(w) for w in same_size]), reference) < 0.9 * wanted


def test_tries_gather_where_the_front_is():
    found = explore(hill, (0.5, 0.5, 0.5), 3, 40)[20:]
    above = [(hill(w) > 0.5).all() for w in found]
    assert np.mean(above) > 0.7


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_nothing_is_tried_twice(num_tasks, seed):
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=(num_tasks, 2))
    found = explore(lambda w: w @ slopes, (-9.0, -9.0), num_tasks, 2 * num_tasks + 6)
    gaps = np.abs(found[:, None] - found[None]).sum(axis=2) + np.eye(len(found))
    assert gaps.min() > 1e-3
    assert np.allclose(found.sum(axis=1), 1) and (found >= -1e-12).all()


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_scores_that_never_change_are_no_trouble(value):
    found = explore(lambda w: np.full(3, value), (0.1,) * 3, 3, 12)
    assert len(np.unique(found.round(6), axis=0)) == 12
