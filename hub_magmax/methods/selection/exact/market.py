"""A market, in which tasks compete for elements, and an allocation, which solves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.methods.selection.exact.elements import Source, Stock, on_grid
from hub_magmax.methods.selection.owners import Owners


@dataclass(frozen=True)
class Groups:
    """Alike elements, counted: a row of values per task (−inf: never) and a size for each group."""

    rows: Float64[np.ndarray, "tasks groups"]
    sizes: Int64[np.ndarray, " groups"]

    @classmethod
    def none(cls, num_tasks: int) -> Groups:
        return cls(np.empty((num_tasks, 0)), np.empty(0, dtype=np.int64))

    def and_also(self, other: Groups) -> Groups:
        rows = np.concatenate((self.rows, other.rows), axis=1)
        return Groups(rows, np.concatenate((self.sizes, other.sizes)))


@dataclass(frozen=True)
class Market:
    """Elements and groups to be shared out, what each task must get, and a first guess of the prices.

    Prices and quotas are of the active tasks; prices are on the grid.
    """

    source: Source
    groups: Groups
    quotas: Int64[np.ndarray, " tasks"]
    guess: Float64[np.ndarray, " tasks"]


@dataclass(frozen=True)
class Allocation:
    """Who gets each element, how many of each group, and prices that make this the best choice.

    `has_no_regret`: it is certain that at these prices no element's magnitude, as it is, not rounded to the
    grid, exceeds another task's price by more than its owner's; and so the duality gap is zero.
    """

    owners: Owners
    shares: Int64[np.ndarray, "groups tasks"]
    prices: Float64[np.ndarray, " tasks"]
    has_no_regret: bool = False


def in_memory(market: Market) -> Stock:
    """Return the elements of a market that is known to be in memory."""
    assert isinstance(market.source, Stock)
    return market.source


def in_a_table(
    stock: Stock, groups: Groups
) -> tuple[Float64[np.ndarray, "tasks count"], Int64[np.ndarray, " count"] | None]:
    """Return the values of single elements and then of groups, and their sizes if there are groups."""
    values = on_grid(stock.values, stock.scale)
    if not len(groups.sizes):
        return values, None
    sizes = np.concatenate((np.ones(stock.num_elements, dtype=np.int64), groups.sizes))
    return np.concatenate((values, groups.rows), axis=1), sizes


def ranked(
    values: Float64[np.ndarray, " count"],
    sizes: Int64[np.ndarray, " count"] | None,
    ranks: tuple[int, ...],
) -> list[float]:
    """Return the values of some ranks, 1 for the largest, counting each as often as its size says.

    Beyond the ends values are infinite.
    """
    if sizes is None:
        places = [len(values) - rank for rank in ranks]
        # One at a time: for several, numpy has no vector instructions, and takes eight times as long.
        found = [np.partition(values, p)[p] if 0 <= p < len(values) else -math.inf for p in places]
    else:
        found = _ranked_with_groups(values, sizes, ranks)
    return [math.inf if rank < 1 else float(value) for rank, value in zip(ranks, found, strict=True)]


def _ranked_with_groups(
    values: Float64[np.ndarray, " count"], sizes: Int64[np.ndarray, " count"], ranks: tuple[int, ...]
) -> list[float]:
    """Rank values of which few count more than once: to sort numbers is ten times as fast as their places."""
    is_group = sizes > 1
    alone, grouped = np.sort(values[~is_group]), values[is_group]
    order = (-grouped).argsort(kind="stable")
    grouped, totals = grouped[order], np.concatenate(([0], sizes[is_group][order].cumsum()))
    # How many values lie above each group, and how many are reached with it.
    above = (
        len(alone) - np.searchsorted(alone, grouped, "right") + totals[np.searchsorted(-grouped, -grouped)]
    )
    reached = (
        len(alone) - np.searchsorted(alone, grouped) + totals[np.searchsorted(-grouped, -grouped, "right")]
    )
    found = []
    for rank in ranks:
        hit = np.flatnonzero((above < rank) & (rank <= reached))
        place = len(alone) - rank + int(totals[np.count_nonzero(reached < rank)])
        if len(hit):
            found.append(float(grouped[hit[0]]))
        else:
            found.append(float(alone[place]) if 0 <= place < len(alone) else -math.inf)
    return found
