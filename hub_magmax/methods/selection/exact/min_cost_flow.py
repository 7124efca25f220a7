"""Who owns what of a market in memory, and moving elements between tasks at the least loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from hub_magmax.kernels.compiled import cache

#: Room for lots that come of splitting others. Where it is not enough, nothing is compiled.
_NO_LOTS = np.zeros(1024, np.int64)


class Ledger:
    """Who owns what of a market in memory: lots of one or more alike elements, each with one owner.

    Starts from everyone's best choice. That is optimal for the counts that it has, and stays so when
    elements move along a path of smallest total loss; so at the quotas it is optimal for them.
    """

    def __init__(
        self,
        rows: Float64[np.ndarray, "tasks count"],
        sizes: Int64[np.ndarray, " count"] | None,
        prices: Float64[np.ndarray, " tasks"],
        *,
        is_compiled: bool,
    ) -> None:
        self._is_compiled = is_compiled
        self._num_tasks, num_items = rows.shape
        self._values = np.ascontiguousarray(rows.T)
        self._sizes = np.ones(num_items, dtype=np.int64) if sizes is None else sizes.copy()
        self._items = np.arange(num_items)
        best, self._owners = rows[0] - prices[0], np.zeros(num_items, dtype=np.int64)
        for task in range(1, self._num_tasks):  # the last of several best tasks, as MAGMAX has it
            net = rows[task] - prices[task]
            np.copyto(self._owners, task, where=net >= best)
            np.maximum(best, net, out=best)

    def meet(self, quotas: Int64[np.ndarray, " tasks"]) -> Float64[np.ndarray, "tasks tasks"] | None:
        """Move elements until all quotas are met; return the least loss of moving one more.

        None if groups that some tasks can never own make that impossible.
        """
        counts = np.bincount(self._owners, weights=self._sizes, minlength=self._num_tasks)
        surplus = counts.astype(np.int64) - quotas
        if self._is_compiled:
            lots = [np.append(part, _NO_LOTS) for part in (self._sizes, self._items, self._owners)]
            number, losses = self._meet_compiled(surplus.copy(), *lots)
            if number != cache.NO_ROOM:
                self._sizes, self._items, self._owners = (part[:number] for part in lots)
                return None if number == cache.NO_PATH else losses
        losses = np.stack([self._losses(task) for task in range(self._num_tasks)])
        while surplus.any():
            path = _cheapest_path(losses, surplus)
            if path is None:
                return None
            moved = self._move(path, losses, int(min(surplus[path[0]], -surplus[path[-1]])))
            assert moved > 0
            surplus[path[0]] -= moved
            surplus[path[-1]] += moved
            for task in path:
                losses[task] = self._losses(task)
        return losses

    def _meet_compiled(
        self,
        surplus: Int64[np.ndarray, " tasks"],
        sizes: Int64[np.ndarray, " lots"],
        items: Int64[np.ndarray, " lots"],
        owners: Int64[np.ndarray, " lots"],
    ) -> tuple[int, Float64[np.ndarray, "tasks tasks"]]:
        """Do the same in lots that have room for some more; return their number, and the losses."""
        num_tasks = self._num_tasks
        losses, floats = np.empty((num_tasks, num_tasks)), np.empty((2, num_tasks))
        whole, number = np.empty((3, num_tasks), np.int64), len(self._sizes)
        return cache.meet(self._values, sizes, items, owners, number, surplus, losses, floats, whole), losses

    def outcome(
        self, num_elements: int
    ) -> tuple[UInt8[np.ndarray, " elements"], Int64[np.ndarray, "groups tasks"]]:
        """Return the owners of the single elements, which come first, and the shares of the groups."""
        single = self._items < num_elements
        owners = np.empty(num_elements, dtype=np.uint8)
        owners[self._items[single]] = self._owners[single]
        shares = np.zeros((len(self._values) - num_elements, self._num_tasks), dtype=np.int64)
        at = (self._items[~single] - num_elements, self._owners[~single])
        np.add.at(shares, at, self._sizes[~single])
        return owners, shares

    def _losses(self, task: int) -> Float64[np.ndarray, " tasks"]:
        """Return the least that is lost by moving one of a task's elements to each other task."""
        values = self._values[self._items[np.flatnonzero(self._owners == task)]]
        losses: Float64[np.ndarray, " tasks"] = (values[:, [task]] - values).min(axis=0, initial=math.inf)
        losses[task] = math.inf
        return losses

    def _move(self, path: list[int], losses: Float64[np.ndarray, "tasks tasks"], limit: int) -> int:
        """Move as many elements along the path as its losses hold for, at most `limit`; return how many."""
        moves = []
        for source, target in itertools.pairwise(path):
            lots = np.flatnonzero(self._owners == source)
            values = self._values[self._items[lots]]
            lots = lots[values[:, source] - values[:, target] == losses[source, target]]
            moves.append((lots, target))
            limit = min(limit, int(self._sizes[lots].sum()))
        # From the end, as compiled loops do, which look for lots that move when they move them.
        for lots, target in reversed(moves):
            self._give(lots, target, limit)
        return limit

    def _give(self, lots: Int64[np.ndarray, " lots"], target: int, count: int) -> None:
        """Give `count` elements of these lots to a task, the first ones first; split the last lot."""
        totals = np.cumsum(self._sizes[lots])
        last = int(np.searchsorted(totals, count))
        excess = int(totals[last]) - count
        owner = self._owners[lots[last]]
        self._owners[lots[: last + 1]] = target
        if excess:
            self._sizes[lots[last]] -= excess
            self._sizes = np.append(self._sizes, excess)
            self._items = np.append(self._items, self._items[lots[last]])
            self._owners = np.append(self._owners, owner)


def _cheapest_path(
    losses: Float64[np.ndarray, "tasks tasks"], surplus: Int64[np.ndarray, " tasks"]
) -> list[int] | None:
    """Return the path of smallest total loss from a task with surplus to one that is short (Bellman-Ford)."""
    distance = np.where(surplus > 0, 0.0, math.inf)
    parent = np.full(len(surplus), -1)
    for _ in surplus:
        through = distance[:, None] + losses
        best = through.argmin(axis=0)
        reached = through.min(axis=0)
        better = reached < distance
        if not better.any():
            break
        parent[better] = best[better]
        distance[better] = reached[better]
    to_short = np.where(surplus < 0, distance, math.inf)
    end = int(to_short.argmin())
    if not math.isfinite(to_short[end]):
        return None
    path = [end]
    while parent[path[0]] >= 0:
        path.insert(0, int(parent[path[0]]))
    return path


def lowered(
    prices: Float64[np.ndarray, " tasks"], losses: Float64[np.ndarray, "tasks tasks"]
) -> Float64[np.ndarray, " tasks"]:
    """Lower prices until nobody's element is better with another task: p_s − p_t ≤ loss of s to t."""
    for _ in prices:
        prices = np.minimum(prices, (prices[None, :] + losses).min(axis=1))
    return prices
