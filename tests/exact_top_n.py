"""An exact solver of top-n in memory, as an oracle: coordinate ascent, then cheapest paths.

It shares no code with the package, and takes milliseconds to seconds. Nothing is random: of equals the first
ones move.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

#: Magnitudes are rounded to this many bits, relative to the largest.
_GRID_BITS = 42


def winners(magnitudes: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Return a winner for each column of (tasks, elements), the best of all choices with these counts."""
    active = np.flatnonzero(quotas)
    if len(active) < 2:
        return np.repeat(active, magnitudes.shape[1])
    largest = magnitudes.max(initial=0.0)
    scale = math.ldexp(1.0, _GRID_BITS - math.frexp(largest)[1])
    rows = np.rint(magnitudes[active].astype(np.float64) * scale)
    prices = _balance(rows, np.asarray(quotas)[active])
    return active[_Ledger(rows, prices).meet(np.asarray(quotas)[active])]


def _balance(rows: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Set one price after the other so that its task meets its quota, while that pays."""
    prices, errors = np.zeros(len(rows)), []
    # Two sweeps must improve by more than the handful of single moves that cost as much.
    few = len(prices)
    while True:
        errors.append(_sweep(rows, quotas, prices))
        prices -= prices.min()
        stalled = len(errors) > 2 and errors[-3] - errors[-1] < 2 * few
        if errors[-1] <= few or stalled:
            return prices


def _sweep(rows: np.ndarray, quotas: np.ndarray, prices: np.ndarray) -> int:
    """Correct every price once, in place; return by how many elements counts were off before."""
    error = 0
    for task, quota in enumerate(quotas.tolist()):
        net = rows - prices[:, None]
        net[task] = -math.inf
        gains = rows[task] - net.max(axis=0, initial=-math.inf)
        above, level = (int(np.count_nonzero(m)) for m in (gains > prices[task], gains >= prices[task]))
        if not above <= quota <= level:
            error += max(above - quota, quota - level)
            ordered = np.sort(gains)[::-1]
            low = ordered[quota] if quota < len(ordered) else ordered[-1]
            prices[task] = math.floor((low + ordered[quota - 1]) / 2)
    return error


class _Ledger:
    """Who owns each element. Starts from everyone's best choice.

    That is optimal for the counts that it has, and stays so when elements move along a path of smallest total
    loss; so at the quotas it is optimal for them.
    """

    def __init__(self, rows: np.ndarray, prices: np.ndarray) -> None:
        self._values = np.ascontiguousarray(rows.T)
        self._owners = (self._values - prices).argmax(axis=1)

    def meet(self, quotas: np.ndarray) -> np.ndarray:
        """Move elements until all quotas are met, and return who owns them."""
        surplus = np.bincount(self._owners, minlength=len(quotas)) - quotas
        losses = np.stack([self._losses(task) for task in range(len(quotas))])
        while surplus.any():
            path = _cheapest_path(losses, surplus)
            assert path is not None
            moved = self._move(path, losses, int(min(surplus[path[0]], -surplus[path[-1]])))
            assert moved > 0
            surplus[path[0]] -= moved
            surplus[path[-1]] += moved
            for task in path:
                losses[task] = self._losses(task)
        return self._owners

    def _losses(self, task: int) -> np.ndarray:
        """Return the least that is lost by moving one of a task's elements to each other task."""
        values = self._values[np.flatnonzero(self._owners == task)]
        losses = (values[:, [task]] - values).min(axis=0, initial=math.inf)
        losses[task] = math.inf
        return losses

    def _move(self, path: list[int], losses: np.ndarray, limit: int) -> int:
        """Move as many elements along the path as its losses hold for, at most `limit`; return how many."""
        moves = []
        for source, target in itertools.pairwise(path):
            places = np.flatnonzero(self._owners == source)
            values = self._values[places]
            places = places[values[:, source] - values[:, target] == losses[source, target]]
            moves.append((places, target))
            limit = min(limit, len(places))
        for places, target in moves:
            self._owners[places[:limit]] = target
        return limit


def _cheapest_path(losses: np.ndarray, surplus: np.ndarray) -> list[int] | None:
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
