"""Prices at which quotas can be met: flows between classes of ties, exact line searches, and boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.selection import prices, quotas, top_n
from hub_magmax.methods.selection.prices import FAR, Box, Market, clear, rough, solve, split, tied_masks

SETTINGS = settings(derandomize=True, deadline=None)


def market(values, quotas, sizes=None):
    table = np.array(values, np.float64)
    sizes = np.ones(table.shape[1], np.int64) if sizes is None else np.array(sizes, np.int64)
    return Market(table, sizes, np.array(quotas, np.int64))


def masks_of(found, prices):
    return tied_masks(found.values - prices[:, None])


def most_kept(found):
    """The optimum of the transportation problem, by linear programming."""
    num_tasks, columns = found.values.shape
    of_task, of_column = np.repeat(np.eye(num_tasks), columns, 1), np.tile(np.eye(columns), num_tasks)
    limits = {"A_eq": np.vstack((of_task, of_column)), "b_eq": np.concatenate((found.quotas, found.sizes))}
    return -linprog(-found.values.ravel(), **limits, method="highs").fun


@st.composite
def markets(draw):
    """Values of few different sizes, so that many tie; sizes, and quotas that sum to these."""
    num_tasks, columns = draw(st.integers(2, 6)), draw(st.integers(1, 25))
    values = draw(
        st.lists(
            st.lists(st.integers(0, 5), min_size=columns, max_size=columns),
            min_size=num_tasks,
            max_size=num_tasks,
        )
    )
    sizes = draw(st.lists(st.integers(1, 9), min_size=columns, max_size=columns))
    cuts = sorted(draw(st.lists(st.integers(0, sum(sizes)), min_size=num_tasks - 1, max_size=num_tasks - 1)))
    return values, np.diff([0, *cuts, sum(sizes)]).tolist(), sizes


def test_tied_masks_by_hand():
    assert tied_masks(np.array([[1.0, 2, 0], [1, 1, 0], [0, 2, 0]])).tolist() == [0b11, 0b101, 0b111]


def test_masks_of_64_tasks_use_all_bits():
    assert tied_masks(np.zeros((64, 2))).tolist() == [-1, -1]


def test_split_by_hand():
    # Three elements of task 1 alone, and five of either; task 2 needs four of these.
    shares, crowded = split(np.array([1, 3]), np.array([3, 5]), np.array([4, 4]))
    assert crowded is None
    assert shares.tolist() == [[3, 0], [1, 4]]


def test_split_names_the_crowded_tasks():
    # Task 1 alone has three where two are wanted; tasks 2 and 3 share the rest and lack one.
    _, crowded = split(np.array([1, 6]), np.array([3, 4]), np.array([2, 3, 2]))
    assert crowded.tolist() == [True, False, False]


@SETTINGS
@given(markets())
def test_split_meets_quotas_or_shows_why_it_cannot(drawn):
    found = market(*drawn)
    masks, inverse = np.unique(masks_of(found, np.zeros(len(found.quotas))), return_inverse=True)
    counts = np.bincount(inverse, found.sizes).astype(np.int64)

    shares, crowded = split(masks, counts, found.quotas)

    member = (masks[:, None] >> np.arange(len(found.quotas))) & 1 == 1
    assert (shares >= 0).all() and (shares.sum(axis=1) == counts).all() and not shares[~member].any()
    if crowded is None:
        assert (shares.sum(axis=0) == found.quotas).all()
    else:
        alone = ~(member & ~crowded).any(axis=1)
        assert counts[alone].sum() > found.quotas[crowded].sum()


@SETTINGS
@given(markets())
def test_clear_finds_prices_that_prove_the_optimum(drawn):
    found = market(*drawn)

    prices = clear(found, np.zeros(len(found.quotas)))

    best = (found.values - prices[:, None]).max(axis=0)
    dual = (best * found.sizes).sum() + (prices * found.quotas).sum()
    assert dual == pytest.approx(most_kept(found), rel=1e-9, abs=1e-9)


def test_classes_that_cannot_go_anywhere_else_have_no_prices():
    # Only task 1 can have the class of three, which leaves one element to task 2.
    values, sizes = [[4, 3], [0, -np.inf]], [1, 3]
    assert clear(market(values, [2, 2], sizes), np.zeros(2)) is None
    assert clear(market(values, [3, 1], sizes), np.zeros(2)) is not None


def test_a_task_that_got_too_many_before_has_no_prices():
    assert clear(market([[1.0, 2], [2, 1]], [-1, 3]), np.zeros(2)) is None


HOSTILE = {
    "multiples": lambda rows, normal: (1 + rows / len(rows)) * normal[:1],
    "whole multiples": lambda rows, normal: (1 + rows) * normal[:1],
    "equal rows": lambda rows, normal: normal[:1].repeat(len(rows), 0),
    "one huge": lambda rows, normal: np.where(np.arange(normal.shape[1]) == 17, 1e7, normal),
    "a huge task": lambda rows, normal: np.where(rows == 1, 1e7, 1) * normal,
    "all equal": lambda rows, normal: np.full_like(normal, 3.5),
    "zeros": lambda rows, normal: np.zeros_like(normal),
    "denormals": lambda rows, normal: 1e-41 * normal,
}


@pytest.mark.parametrize("num_tasks", [5, 20])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("preference", ["flat", "one-sided", "ones"])
def test_hostile_tensors_take_hundreds_of_flows_rather_than_thousands(
    kind, preference, num_tasks, monkeypatch
):
    # Plain descent takes up to 35,000 of them for multiples of one row.
    size, calls = 10_000, []
    normal = np.random.default_rng(0).standard_normal((num_tasks, size))
    task_vectors = HOSTILE[kind](np.arange(num_tasks)[:, None], normal).astype(np.float32)
    ratios = [0.7**task for task in range(num_tasks)]
    wanted = {
        "flat": tuple(quotas([1 / num_tasks] * num_tasks, size)),
        "one-sided": tuple(quotas([ratio / sum(ratios) for ratio in ratios], size)),
        "ones": (1,) * (num_tasks - 1) + (size - num_tasks + 1,),
    }[preference]
    monkeypatch.setattr(prices, "split", lambda *a: calls.append(a) or split(*a))

    found = top_n(ArrayChunks(torch.from_numpy(task_vectors)), wanted, CounterGenerator(0, "w"))

    assert tuple(np.bincount(found.owner, minlength=num_tasks)) == wanted
    assert found.duality_gap <= 1e-9
    assert 0 < len(calls) <= 1000


@pytest.mark.parametrize("width", [1.0, 1e6, FAR])
def test_solve_widens_what_is_too_narrow(width):
    values = np.rint(1e6 * np.random.default_rng(0).standard_normal((4, 3000)) ** 2)
    quotas = np.array([2000, 700, 299, 1])

    def look(box):
        net = values - box.prices[:, None]
        reached = net + box.down[:, None] >= (net - box.up[:, None]).max(axis=0)
        is_open = reached.sum(axis=0) > 1
        decided = np.bincount(net.argmax(axis=0)[~is_open], minlength=4)
        return market(values[:, is_open], quotas - decided)

    prices, _ = solve(look, np.zeros(4), np.full(4, width))

    masks, counts = np.unique(tied_masks(values - prices[:, None]), return_counts=True)
    assert split(masks, counts, quotas)[1] is None


def test_rough_prices_give_nearly_the_quotas():
    values = np.random.default_rng(0).standard_normal((5, 1000)) ** 2
    quotas = np.array([600, 200, 100, 90, 10])
    won = np.bincount((values - rough(values, quotas)[:, None]).argmax(axis=0), minlength=5)
    assert np.abs(won - quotas).sum() < 40


def test_only_differences_of_prices_count_in_a_box():
    box = Box(np.array([0.0, 5.0]), np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    assert box.contains(np.array([101.0, 104.0]))
    assert not box.contains(np.array([103.0, 105.1]))
