"""The search for tensors in the place of another: what it finds, what it may miss, and its cost."""

import tracemalloc

import numpy as np
import pytest

from hub_magmax.planning.findings.faults import Swap
from hub_magmax.planning.findings.swapped import MOST_SOUGHT, SwapSearch


def family(count, size, *, noise=0.1, seed=0):
    """Return prints of `count` tensors of a base model, and of one checkpoint trained from it."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((count, size), np.float32)
    return base, base + noise * rng.standard_normal((count, size), np.float32)


def search(base, *checkpoints, step=500):
    tasks = tuple("abcd"[: len(checkpoints)])
    found = SwapSearch(tasks)
    rows = np.stack([base, *checkpoints], axis=1)
    for start in range(0, len(rows), step):
        names = [f"w.{number}" for number in range(start, min(start + step, len(rows)))]
        found.add(names, (rows.shape[2],), rows[start : start + step])
    return found.found()


def all_pairs(base, checkpoint):
    """Find swaps by correlating every tensor of a checkpoint with every one of the base model."""
    count = len(base)
    likeness = np.corrcoef(checkpoint, base)[:count, count:]
    return {
        Swap("a", f"w.{row}", f"w.{likeness[row].argmax()}")
        for row in range(count)
        if likeness[row].max() > 0.9 and likeness[row, row] < 0.5
    }


@pytest.mark.parametrize("size", [32, 256, 1024, 5000])
def test_exchanged_tensors_are_found_among_thousands(size):
    base, checkpoint = family(1200, size)
    checkpoint[[7, 1100]] = checkpoint[[1100, 7]]
    assert set(search(base, checkpoint)) == {Swap("a", "w.7", "w.1100"), Swap("a", "w.1100", "w.7")}


@pytest.mark.parametrize("size", [64, 700])
def test_the_same_is_found_as_by_correlating_all_pairs(size):
    base, checkpoint = family(120, size, noise=0.3)
    order = np.arange(120)
    order[20:60] = np.random.default_rng(1).permutation(order[20:60])
    checkpoint = checkpoint[order]
    checkpoint[100:110] = family(10, size, seed=5)[0]  # nothing like any tensor
    found = search(base, checkpoint)
    assert set(found) == all_pairs(base, checkpoint)
    assert len(found) > 30


def test_each_task_is_searched_for_itself():
    base, sound = family(50, 64)
    swapped = sound.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    assert {swap.task for swap in search(base, sound, swapped)} == {"b"}


def test_tensors_of_other_shapes_are_not_confused():
    base, checkpoint = family(2, 64)
    found = SwapSearch(("a",))
    found.add(["one"], (64,), np.stack([base[:1], checkpoint[1:]], axis=1))
    found.add(["two"], (8, 8), np.stack([base[1:], checkpoint[:1]], axis=1))
    assert found.found() == ()


def test_constant_tensors_look_like_nothing():
    base, checkpoint = family(40, 64)
    base[:10], checkpoint[:5], checkpoint[20:30] = 1.0, 0.0, 3.0
    assert search(base, checkpoint) == ()


@pytest.mark.parametrize(("correlation", "is_found"), [(0.95, True), (0.8, False)])
def test_what_is_a_little_alike_is_no_swap(correlation, is_found):
    base, other = family(600, 1024, noise=0)[0], family(600, 1024, seed=9)[0]
    checkpoint = correlation * base + np.sqrt(1 - correlation**2) * other
    checkpoint[[3, 400]] = checkpoint[[400, 3]]
    assert bool(search(base, checkpoint)) == is_found


def test_of_more_displaced_tensors_than_are_sought_some_are_found_all_over():
    base, checkpoint = family(3 * MOST_SOUGHT, 32)
    found = search(base, checkpoint[::-1])
    places = [int(swap.tensor[2:]) for swap in found]
    assert MOST_SOUGHT / 2 <= len(found) <= MOST_SOUGHT
    assert [swap.looks_like for swap in found] == [f"w.{3 * MOST_SOUGHT - 1 - place}" for place in places]
    assert min(places) < 10 and max(places) > 3 * MOST_SOUGHT - 10


def test_memory_grows_with_the_tensors_and_not_with_their_pairs():
    base, checkpoint = family(8000, 32)
    rows = np.stack([base, checkpoint[::-1]], axis=1)
    found = SwapSearch(("a",))
    tracemalloc.start()
    try:
        for start in range(0, 8000, 500):
            found.add([f"w.{n}" for n in range(start, start + 500)], (32,), rows[start : start + 500])
        assert found.found()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # all pairs: 256 MB
