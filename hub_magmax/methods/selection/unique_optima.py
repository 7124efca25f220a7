"""`top_n` for many small tensors of one size at a time, where the best selection is the only one.

Most tensors of float32 have one selection that keeps the most magnitude, and any way of finding it will do.
Prices that meet the quotas nearly give a selection that is the best for its own counts. Successive shortest
paths then move single elements until the counts are the quotas. Where elements could be exchanged without a
loss, `top_n` draws between them, so such tensors are left to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

#: Bits of the largest magnitude on the grid of whole numbers, as in `assignment`.
_GRID_BITS = 42
_SWEEPS, _MOST_MOVES = 6, 64

#: By how much an element of one task is worth more there than to another: least of all elements it has.
_Costs = Float64[np.ndarray, "tensors tasks tasks"]


def unique_optima(
    task_vectors: Float32[np.ndarray, "tasks tensors elements"], quotas: Sequence[int]
) -> tuple[UInt8[np.ndarray, "tensors elements"], Bool[np.ndarray, " tensors"]]:
    """Return winners, and for which tensors these are the only ones that keep the most magnitude.

    Args:
        task_vectors: Finite.
        quotas: Elements per task, the same for all tensors.
    """
    active = np.flatnonzero(quotas)
    wanted = np.array(quotas)[active]
    values = np.abs(task_vectors[active]).astype(np.float64).transpose(1, 0, 2)
    exponents = np.frexp(values.max(axis=(1, 2)))[1]
    grid = np.ldexp(values, (_GRID_BITS - exponents)[:, None, None])
    # What lies between whole numbers is rounded by `top_n`, which can make a tie of a difference.
    is_exact = (grid == np.rint(grid)).all(axis=(1, 2)) & (values.max(axis=(1, 2)) > 0)
    if len(active) == 1:
        return np.full(grid.shape[::2], active[0], np.uint8), np.ones(len(grid), bool)
    owner = (grid - _prices(grid, wanted)[..., None]).argmax(axis=1)
    is_settled = is_exact & _move(grid, owner, wanted)
    costs, _ = _exchanges(grid, owner)
    is_settled &= _shortest_cycles(costs) > 0
    return active[owner].astype(np.uint8), is_settled


def _prices(
    grid: Float64[np.ndarray, "tensors tasks elements"], wanted: Int64[np.ndarray, " tasks"]
) -> Float64[np.ndarray, "tensors tasks"]:
    """Return prices that are nearly right: each is the quantile at which its task wins its quota, in turn."""
    size, prices = grid.shape[2], np.zeros(grid.shape[:2])
    for _ in range(_SWEEPS):
        for task, quota in enumerate(wanted.tolist()):
            net = grid - prices[..., None]
            net[:, task] = -np.inf
            leads = grid[:, task] - net.max(axis=1)
            prices[:, task] = np.partition(leads, size - quota, axis=1)[:, size - quota]
    return prices


def _exchanges(
    grid: Float64[np.ndarray, "tensors tasks elements"], owner: Int64[np.ndarray, "tensors elements"]
) -> tuple[_Costs, Int64[np.ndarray, "tensors tasks tasks"]]:
    """Return what moving the best suited element from each task to each other one costs, and which it is."""
    num_tasks = grid.shape[1]
    loss = np.take_along_axis(grid, owner[:, None], axis=1) - grid
    costs = np.full((len(grid), num_tasks, num_tasks), np.inf)
    elements = np.zeros(costs.shape, np.int64)
    for task in range(num_tasks):
        own = np.where((owner == task)[:, None], loss, np.inf)
        elements[:, task] = own.argmin(axis=2)
        costs[:, task] = np.take_along_axis(own, elements[:, task, :, None], axis=2)[..., 0]
        costs[:, task, task] = np.inf
    return costs, elements


def _move(
    grid: Float64[np.ndarray, "tensors tasks elements"],
    owner: Int64[np.ndarray, "tensors elements"],
    wanted: Int64[np.ndarray, " tasks"],
) -> Bool[np.ndarray, " tensors"]:
    """Move elements along shortest paths, one per tensor at a time; say where the quotas are met."""
    num_tasks = grid.shape[1]
    excess = np.stack([np.count_nonzero(owner == task, axis=1) for task in range(num_tasks)], axis=1) - wanted
    for _ in range(_MOST_MOVES):
        rows = np.flatnonzero((excess != 0).any(axis=1))
        if not len(rows):
            break
        costs, elements = _exchanges(grid[rows], owner[rows])
        distance = np.where(excess[rows] > 0, 0.0, np.inf)
        before = np.full(distance.shape, -1)
        for _ in range(num_tasks - 1):
            found = distance[:, :, None] + costs
            best = found.argmin(axis=1)
            shortest = np.take_along_axis(found, best[:, None], axis=1)[:, 0]
            before = np.where(shortest < distance, best, before)
            distance = np.minimum(shortest, distance)
        at = np.where(excess[rows] < 0, distance, np.inf).argmin(axis=1)
        excess[rows, at] += 1
        which = np.arange(len(rows))
        for _ in range(num_tasks - 1):
            source = before[which, at]
            moves = source >= 0
            some, to, of = which[moves], at[moves], source[moves]
            owner[rows[some], elements[some, of, to]] = to
            at[moves] = of
        excess[rows, at] -= 1
    is_met: np.ndarray = (excess == 0).all(axis=1)
    return is_met


def _shortest_cycles(costs: _Costs) -> Float64[np.ndarray, " tensors"]:
    """Return what the cheapest exchange around any cycle of tasks costs (Floyd and Warshall)."""
    paths = costs.copy()
    for via in range(paths.shape[1]):
        np.minimum(paths, paths[:, :, via, None] + paths[:, None, via], out=paths)
    shortest: Float64[np.ndarray, " tensors"] = paths.diagonal(axis1=1, axis2=2).min(axis=1)
    return shortest
