"""Prices of tasks at which every task gets its quota, for elements in memory.

An element goes to a task that attains max_t (magnitude − price), net for short. Prices, and magnitudes
rounded to whole numbers (`sampling.on_grid`), are whole numbers in float64, so sums are exact and equal means
equal.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64, Int64

Prices = Float64[np.ndarray, " tasks"]

#: Stands for an infinite difference of prices: beyond every magnitude.
FAR = 2.0**60
_MOST_STEPS, _SCALING_BITS, _SWEEPS, _BATCHES, _MANY, _FEW_TASKS = 30, 4, 10, 16, 1 << 10, 12


@dataclass(frozen=True)
class Box:
    """Prices, and how far below and above them the right ones may lie."""

    prices: Prices
    down: Prices
    up: Prices

    @classmethod
    def around(cls, prices: Prices, widths: Prices | float) -> Box:
        sides: np.ndarray = np.minimum(np.broadcast_to(widths, prices.shape), FAR)
        return cls(prices, sides, sides)

    @classmethod
    def everywhere(cls, prices: Prices) -> Box:
        return cls(prices, np.full_like(prices, FAR), np.full_like(prices, FAR))

    def contains(self, prices: Prices) -> bool:
        """Say whether prices lie in the box when a number is added to all of them: only differences count."""
        moved = prices - self.prices
        return bool((moved - self.up).max() <= (moved + self.down).min())


@dataclass(frozen=True)
class Market:
    """Elements and classes of equal elements.

    Attributes:
        values: Magnitudes on the grid; −inf where a class cannot go.
        sizes: Elements in each column.
        quotas: Elements per task. They sum to those of all columns, and are negative where a task got too
            many before.
    """

    values: Float64[np.ndarray, "tasks columns"]
    sizes: Int64[np.ndarray, " columns"]
    quotas: Int64[np.ndarray, " tasks"]


#: Returns the elements with several possible winners somewhere in a box, and what is left of the quotas.
Look = Callable[[Box], Market]


def solve(
    look: Look, prices: Prices, widths: Prices, quotas: Int64[np.ndarray, " tasks"] | None = None
) -> tuple[Prices, Prices] | None:
    """Return prices at which the quotas can be met, and elements per unit of each; None where no prices do
    that.

    Newton's method comes near. Then only elements that are near a tie are looked at, and prices are moved
    exactly. Where they move by more than was looked at, that was too little.

    Args:
        look: At all elements.
        prices: To begin with.
        widths: How far they may be off; a guess.
        quotas: Of all elements, where counts may be far off.
    """
    prices, widths, densities = _approach(look, prices, widths, quotas)
    while True:
        box = Box.around(prices, widths)
        found = clear(look(box), prices)
        if found is not None and box.contains(found):
            return found, densities
        if widths.min() >= FAR:
            return None
        widths = 8 * widths


def rough(values: Float64[np.ndarray, "tasks columns"], quotas: Int64[np.ndarray, " tasks"]) -> Prices:
    """Return prices by coordinate descent: each is the quantile at which its task wins its quota, in turn."""
    prices, count = np.zeros(len(values)), values.shape[1]
    for _ in range(_SWEEPS):
        before = prices.copy()
        for task, quota in enumerate(quotas.tolist()):
            net = values - prices[:, None]
            net[task] = -np.inf
            leads, place = values[task] - net.max(axis=0), min(max(count - quota, 0), count - 1)
            prices[task] = np.partition(leads, place)[place]
        prices -= prices.min()
        if np.array_equal(prices, before):
            break
    return prices


def _approach(
    look: Look, prices: Prices, widths: Prices, quotas: Int64[np.ndarray, " tasks"] | None
) -> tuple[Prices, Prices, Prices]:
    """Return prices at which counts are nearly the quotas, in what widths the right ones should lie, and how
    many elements each price moves per unit.
    """
    few, damping, least, num_misses, start = 4 * len(prices), 1.0, np.inf, 0, widths
    for _ in range(_MOST_STEPS):
        errors, matrix = _tally(look(Box.around(prices, widths)), prices, widths)
        merit = float(np.abs(errors).sum())
        num_misses += merit > 0.6 * least
        if merit < least:
            damping, least, densities = 1.0, merit, matrix.diagonal() + 1e-300
            wanted = 2 * (np.abs(errors) / 8 + 16) / densities
            widths = np.rint(np.clip(wanted, widths / 16, np.minimum(8 * widths, FAR))) + 1
            most = np.minimum(4 * widths, 2.0**48)
            step = np.clip(_eliminate(matrix, _damped(errors, quotas)), -most, most)
            found = prices, widths, densities
        else:
            damping /= 4
        if merit <= few:
            return found
        if num_misses > 2:
            return found if least <= 8 * few else (found[0], np.maximum(found[1], start), densities)
        prices = found[0] + np.rint(step * damping)
        prices -= prices.min()
    return found


def _damped(errors: Prices, quotas: Int64[np.ndarray, " tasks"] | None) -> Prices:
    """Return smaller errors of tasks with too few elements: the lower a price, the more elements it moves."""
    if quotas is None:
        return errors
    counts = np.maximum(errors + quotas, 0.5)
    ratio = counts / quotas
    logarithm = 3 * (ratio**2 - 1) / (ratio**2 + 4 * ratio + 1)  # nearly, and the same on every machine
    errors = np.where(errors < 0, np.maximum(errors, counts * logarithm), errors)
    errors[quotas.argmax()] -= errors.sum()
    return errors


def _tally(
    market: Market, prices: Prices, widths: Prices
) -> tuple[Prices, Float64[np.ndarray, "tasks tasks"]]:
    """Return by how many elements counts exceed quotas, and how fast prices change that."""
    num_tasks = len(prices)
    winner, second, _ = leaders(market.values - prices[:, None])
    errors = np.bincount(winner, market.sizes, num_tasks).astype(np.float64) - market.quotas
    pairs = np.bincount(winner * num_tasks + second, market.sizes, num_tasks**2).reshape(num_tasks, num_tasks)
    pairs = (pairs + pairs.T) / (2 * (widths + widths[:, None]))
    np.fill_diagonal(pairs, 0)
    return errors, np.diag(pairs.sum(axis=1)) - pairs


def leaders(
    net: Float64[np.ndarray, "tasks columns"],
) -> tuple[Int64[np.ndarray, " columns"], Int64[np.ndarray, " columns"], Float64[np.ndarray, " columns"]]:
    """Return the best task of each column, the second best, and by how much the first is better."""
    winner = net.argmax(axis=0)
    best = np.take_along_axis(net, winner[None], axis=0)
    np.put_along_axis(net, winner[None], -np.inf, axis=0)
    second = net.argmax(axis=0)
    leads = (best - np.take_along_axis(net, second[None], axis=0))[0]
    np.put_along_axis(net, winner[None], best, axis=0)
    return winner, second, leads


def _eliminate(matrix: Float64[np.ndarray, "n n"], right: Prices) -> Prices:
    """Solve a symmetric, nearly singular system, the same to the bit on every machine."""
    ridge = 1e-6 * matrix.diagonal().max() + 1e-300
    table = np.concatenate((matrix + ridge * np.eye(len(right)), right[:, None]), axis=1)
    for row in range(len(right)):
        table[row] /= table[row, row]
        factors = table[:, row].copy()
        factors[row] = 0
        table -= factors[:, None] * table[row]
    return table[:, -1]


def clear(market: Market, prices: Prices) -> Prices | None:
    """Move prices until the quotas can be met; None where no prices do that.

    Descent takes a handful of steps from prices that are nearly right. From others it can take as many as
    there are elements. Then values are rounded to multiples of a unit, and the unit is refined: prices that
    are right for one unit are nearly right for the next (cost scaling).
    """
    if market.quotas.min(initial=0) < 0:
        return None
    found, is_done = _descend(market, prices, _MOST_STEPS)
    if is_done:
        return found
    largest = max(market.values.max(initial=0), np.abs(prices).max())
    shift = math.frexp(largest)[1]
    while found is not None and shift > 0:
        shift = max(0, shift - _SCALING_BITS)
        unit = 2.0**shift
        rounded = replace(market, values=np.rint(market.values / unit))
        found, _ = _descend(rounded, np.rint(found / unit))
        found = None if found is None else found * unit
    return found


def _descend(market: Market, prices: Prices, most: int = sys.maxsize) -> tuple[Prices | None, bool]:
    """Move prices by exact line searches, in at most `most` steps; say whether that was enough.

    Where quotas cannot be met, the elements that can only go to some tasks outnumber the quotas of these.
    Raising their prices together, up to where enough elements tie with other tasks, is a step of steepest
    descent on the dual, which is convex. So the last prices are optimal.
    """
    values, sizes, quotas = market.values, market.sizes, market.quotas
    prices, least, caution = prices.copy(), math.inf, 1
    for _ in range(most):
        net = values - prices[:, None]
        shares, crowded = split(*_counted(tied_masks(net), sizes, len(prices)), quotas)
        if crowded is None:
            return prices, True
        excess = int((shares.sum(axis=0) - quotas)[crowded].sum())
        caution *= 1 if excess < least else 2
        least = min(least, excess)
        if crowded.all():
            return None, True
        leads = net[crowded].max(axis=0) - net[~crowded].max(axis=0)
        lead = smallest(leads, sizes, -(-excess // caution))
        if lead >= FAR:
            return None, True
        prices[crowded] += lead
        prices -= prices.min()
    return prices, False


def _counted(
    masks: Int64[np.ndarray, " columns"], sizes: Int64[np.ndarray, " columns"], num_tasks: int
) -> tuple[Int64[np.ndarray, " classes"], Int64[np.ndarray, " classes"]]:
    """Return sets of tasks, and how many elements have each; to sort them would take long."""
    if num_tasks <= _FEW_TASKS:
        counts = np.bincount(masks, sizes, 1 << num_tasks).astype(np.int64)
        distinct = np.flatnonzero(counts)
        return distinct, counts[distinct]
    several = masks & (masks - 1) != 0
    found, inverse = np.unique(masks[several], return_inverse=True)
    single = np.int64(1) << np.arange(num_tasks)
    alone = [int(sizes[masks == mask].sum()) for mask in single]
    more = np.bincount(inverse, sizes[several], len(found)).astype(np.int64)
    return np.append(single, found), np.append(np.array(alone, np.int64), more)


def tied_masks(net: Float64[np.ndarray, "tasks columns"]) -> Int64[np.ndarray, " columns"]:
    """Return a bit for each task that attains the maximum."""
    best, masks = net.max(axis=0, initial=-np.inf), np.zeros(net.shape[1], np.int64)
    for task, row in enumerate(net):
        masks |= (row == best).astype(np.int64) << task
    return masks


def smallest(
    leads: Float64[np.ndarray, " columns"], sizes: Int64[np.ndarray, " columns"], count: int
) -> float:
    """Return the lead of the element that comes at the place `count`, from one, among positive ones."""
    ahead = np.flatnonzero(leads > 0)
    if len(ahead) > _MANY:  # a few are sorted, those that can be reached with single elements
        most = np.partition(leads[ahead], min(count, len(ahead)) - 1)[min(count, len(ahead)) - 1]
        ahead = ahead[leads[ahead] <= most]
    order = ahead[leads[ahead].argsort(kind="stable")]
    return float(leads[order[sizes[order].cumsum().searchsorted(count)]])


def split(
    masks: Int64[np.ndarray, " classes"],
    counts: Int64[np.ndarray, " classes"],
    quotas: Int64[np.ndarray, " tasks"],
) -> tuple[Int64[np.ndarray, "classes tasks"], Bool[np.ndarray, " tasks"] | None]:
    """Share classes out between the tasks in their masks: a flow.

    Most classes go to one task.

    Returns:
        Shares, and None if they meet the quotas; else the tasks that are crowded, whatever is done: the
        elements that they alone can have are more than their quotas.
    """
    member = (masks[:, None] >> np.arange(len(quotas))) & 1 == 1
    shares, left = np.zeros(member.shape, np.int64), quotas.copy()
    several = member.sum(axis=1) > 1
    shares[~several] = member[~several] * counts[~several, None]
    left -= shares.sum(axis=0)
    rows = np.flatnonzero(several)
    for some in np.array_split(rows, min(len(rows), _BATCHES) or 1):
        tasks = np.where(member[some], left, np.iinfo(np.int64).min).argmax(axis=1)
        shares[some, tasks] = counts[some]
        left -= np.bincount(tasks, counts[some], len(left)).astype(np.int64)
    while (left < 0).any():
        path, reached = _path(shares, member, left)
        if not path:
            return shares, reached
        _move(path, shares, member, left)
    return shares, None


def _path(
    shares: Int64[np.ndarray, "classes tasks"],
    member: Bool[np.ndarray, "classes tasks"],
    left: Int64[np.ndarray, " tasks"],
) -> tuple[list[int], Bool[np.ndarray, " tasks"]]:
    """Return the shortest path from the most crowded task to one with too few elements, and all in reach."""
    leads_to = (shares > 0).T.astype(np.float32) @ member.astype(np.float32) > 0
    reached, parent = left < 0, np.full(len(left), -1)
    ends = np.flatnonzero(reached)
    while len(ends):
        before = reached.copy()
        for task in ends:
            new = leads_to[task] & ~reached
            parent[new] = task
            reached |= new
        found = np.flatnonzero(reached & (left > 0))
        if len(found):
            path = [int(found[0])]
            while parent[path[-1]] >= 0:
                path.append(int(parent[path[-1]]))
            return path[::-1], reached
        ends = np.flatnonzero(reached & ~before)
    return [], reached


def _move(
    path: list[int],
    shares: Int64[np.ndarray, "classes tasks"],
    member: Bool[np.ndarray, "classes tasks"],
    left: Int64[np.ndarray, " tasks"],
) -> None:
    """Move as many elements as can be along a path."""
    steps = list(itertools.pairwise(path))
    amount = min(-left[path[0]], left[path[-1]], *(shares[member[:, to], of].sum() for of, to in steps))
    for of, to in steps:
        rest = amount
        for row in np.flatnonzero(member[:, to] & (shares[:, of] > 0)):
            some = min(rest, shares[row, of])
            shares[row, of] -= some
            shares[row, to] += some
            rest -= some
    left[path[0]] += amount
    left[path[-1]] -= amount
