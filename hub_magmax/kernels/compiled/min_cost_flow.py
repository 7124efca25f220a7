"""Moving elements between tasks at the least loss, as machine code: what `selection.ledger` does.

Written like the loops of `compiled`; they are short, so vector instructions matter less here than that
nothing is allocated and that other threads run.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0913, PLR0917

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import BLOCK, NO_PATH, NO_ROOM
from hub_magmax.kernels.compiled.jit import compiled


@compiled
def _least_losses(task, values, items, owners, num_lots, losses):
    """Write the least that is lost by moving one of a task's elements to each other task."""
    row = losses[task]
    row[:] = np.inf
    for lot in range(num_lots):
        if owners[lot] == task:
            own = values[items[lot]]
            for other in range(row.shape[0]):
                loss = own[task] - own[other]
                row[other] = loss if loss < row[other] else row[other]
    row[task] = np.inf


@compiled
def _improve(losses, distance, parent, reached, best):
    """Let every task be reached by one more move; return whether that made anything less (Bellman-Ford)."""
    num_tasks = distance.shape[0]
    reached[:] = np.inf
    best[:] = 0
    for source in range(num_tasks):
        for target in range(num_tasks):
            through = distance[source] + losses[source, target]
            if through < reached[target]:
                reached[target] = through
                best[target] = source
    is_better = False
    for target in range(num_tasks):
        if reached[target] < distance[target]:
            distance[target] = reached[target]
            parent[target] = best[target]
            is_better = True
    return is_better


@compiled
def _cheapest_path(losses, surplus, floats, path, parent, best):
    """Write the path of smallest total loss from a task that is short back to one with surplus.

    Returns how many tasks it has, 0 if there is none.
    """
    distance, reached = floats[0], floats[1]
    for task in range(surplus.shape[0]):
        distance[task] = 0.0 if surplus[task] > 0 else np.inf
    parent[:] = -1
    for _ in range(surplus.shape[0]):
        if not _improve(losses, distance, parent, reached, best):
            break
    end, least = -1, np.inf
    for task in range(surplus.shape[0]):
        if surplus[task] < 0 and distance[task] < least:
            end, least = task, distance[task]
    length = 0
    while end >= 0:
        path[length] = end
        end = parent[end]
        length += 1
    return length


@compiled
def _moves(lot, source, target, values, items, owners, losses):
    own = values[items[lot]]
    return owners[lot] == source and own[source] - own[target] == losses[source, target]


@compiled
def _total(source, target, values, sizes, items, owners, num_lots, losses):
    """Return how many elements are in the lots that can move at the least loss."""
    total = 0
    for lot in range(num_lots):
        if _moves(lot, source, target, values, items, owners, losses):
            total += sizes[lot]
    return total


@compiled
def _give(source, target, count, values, sizes, items, owners, num_lots, losses):
    """Give `count` elements of these lots away, the first ones first; split the last; count all lots."""
    for lot in range(num_lots):
        if not _moves(lot, source, target, values, items, owners, losses):
            continue
        owners[lot] = target
        excess = sizes[lot] - count
        if excess > 0:
            sizes[lot], sizes[num_lots] = count, excess
            items[num_lots], owners[num_lots] = items[lot], source
            return num_lots + 1
        count -= sizes[lot]
        if count == 0:
            return num_lots
    return num_lots


@compiled
def _move(path, length, limit, values, sizes, items, owners, num_lots, losses):
    """Move as many elements along a path as its losses hold for, at most `limit`.

    Returns how many, and the number of lots then.
    """
    for step in range(length - 1):
        source, target = path[step + 1], path[step]
        limit = min(limit, _total(source, target, values, sizes, items, owners, num_lots, losses))
    if limit > 0:
        for step in range(length - 1):
            source, target = path[step + 1], path[step]
            num_lots = _give(source, target, limit, values, sizes, items, owners, num_lots, losses)
    return limit, num_lots


@compiled
def _most(numbers):
    most = np.int64(0)
    for number in numbers:
        most = max(most, number)
    return most


@compiled
def meet(values, sizes, items, owners, num_lots, surplus, losses, floats, whole):
    """Move elements until no task has a surplus; return how many lots there are then, or one of two signs.

    Args:
        values: float64, items by tasks.
        sizes, items, owners: int64 per lot, with room for more lots than there are; changed.
        num_lots: How many there are.
        surplus: int64 per task; changed.
        losses: float64, tasks by tasks: takes the least loss of moving one more.
        floats, whole: float64 and int64, 2 and 3 rows of a number per task.
    """
    num_tasks = surplus.shape[0]
    path = whole[0]
    for task in range(num_tasks):
        _least_losses(task, values, items, owners, num_lots, losses)
    while _most(surplus) > 0:  # they sum to zero
        length = _cheapest_path(losses, surplus, floats, path, whole[1], whole[2])
        if length == 0:
            return np.int64(NO_PATH)
        if num_lots + length > sizes.shape[0]:
            return np.int64(NO_ROOM)
        first, last = path[length - 1], path[0]
        limit = min(surplus[first], -surplus[last])
        moved, num_lots = _move(path, length, limit, values, sizes, items, owners, num_lots, losses)
        if moved <= 0:
            return np.int64(NO_PATH)
        surplus[first] -= moved
        surplus[last] += moved
        for step in range(length):
            _least_losses(path[step], values, items, owners, num_lots, losses)
    return np.int64(num_lots)


@compiled
def _rank_best(row, price, best, second):
    for i in range(best.shape[0]):
        net = row[i] - price
        low = net if net < best[i] else best[i]
        second[i] = low if low > second[i] else second[i]
        best[i] = net if net > best[i] else best[i]


@compiled
def _gain(row, price, best, second, found):
    for i in range(found.shape[0]):
        net = row[i] - price
        found[i] = net - (second[i] if net == best[i] else best[i])


@compiled
def gains(rows, prices, found, scratch):
    """Write how much better each element is with a task than with the best other one, net of prices.

    Args:
        rows: float64, tasks by elements.
        prices: float64 per task.
        found: As rows.
        scratch: float64, 2 rows of `BLOCK`.
    """
    for start in range(0, rows.shape[1], BLOCK):
        stop = min(start + BLOCK, rows.shape[1])
        best, second = scratch[0, : stop - start], scratch[1, : stop - start]
        best[:] = -np.inf
        second[:] = -np.inf
        for task in range(rows.shape[0]):
            _rank_best(rows[task, start:stop], prices[task], best, second)
        for task in range(rows.shape[0]):
            _gain(rows[task, start:stop], prices[task], best, second, found[task, start:stop])
    return np.int64(0)
