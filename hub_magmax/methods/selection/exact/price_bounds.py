"""What a sample says about the prices of the whole, and how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from hub_magmax.kernels.compiled import cache
from hub_magmax.methods.selection.exact.market import Groups, Market, in_a_table, in_memory, ranked


@dataclass(frozen=True)
class Box:
    """Prices, and how far below and above them the right ones may lie."""

    prices: Float64[np.ndarray, " tasks"]
    down: Float64[np.ndarray, " tasks"]
    up: Float64[np.ndarray, " tasks"]

    def contains(self, prices: Float64[np.ndarray, " tasks"]) -> bool:
        """Say whether prices lie in the box when a number is added to all of them: only differences count."""
        moved = prices - self.prices
        return bool((moved - self.up).max() <= (moved + self.down).min())


def sample_market(market: Market) -> Market:
    """Return the market of a sample: groups and quotas shrink with it, but never to nothing."""
    source = market.source.sample()
    ratio = source.num_elements / market.source.num_elements
    sizes = np.maximum(1, np.rint(market.groups.sizes * ratio)).astype(np.int64)
    total = source.num_elements + int(sizes.sum())
    shares = market.quotas * (total / market.quotas.sum())
    quotas = np.maximum(1, np.floor(shares)).astype(np.int64)
    # Rounding down leaves some over and raising to one takes too many: the largest quota makes up for it.
    while missing := total - int(quotas.sum()):
        largest = int(quotas.argmax())
        quotas[largest] += max(missing, 1 - int(quotas[largest]))
    return Market(source, Groups(market.groups.rows, sizes), quotas, market.guess)


def bound(sample: Market, prices: Float64[np.ndarray, " tasks"], deviations: float) -> Box:
    """Bound the error of prices that solve a sample.

    A sample's count above the right price is off by a few standard deviations, so the right price lies
    between the elements that many ranks above and below the quota. Neighbours are more alike than chance has
    it, and so counts of the runs in a sample vary more.
    """
    stock = in_memory(sample)
    rows, sizes = in_a_table(stock, sample.groups)
    total = int(sample.quotas.sum())
    down, up = np.empty_like(prices), np.empty_like(prices)
    gained = _gains_compiled(rows, prices) if stock.is_compiled else _gains(rows, prices)
    for task, (gains, quota) in enumerate(zip(gained, sample.quotas.tolist(), strict=True)):
        spread = math.sqrt(quota * (total - quota) / total)
        if stock.run > 1:
            wins = (gains[: len(gains) // stock.run * stock.run] >= 0).reshape(-1, stock.run).sum(axis=1)
            spread = max(spread, math.sqrt(len(wins) * wins.var()))
        # The second term matters for small quotas: how far their counts spread is itself uncertain.
        ranks = math.ceil(deviations * spread + deviations**2 / 2)
        highest, lowest = ranked(gains, sizes, (quota - ranks, quota + ranks))
        up[task], down[task] = max(0.0, highest), max(0.0, -lowest)
    return Box(prices, down, up)


def _gains(
    rows: Float64[np.ndarray, "tasks count"], prices: Float64[np.ndarray, " tasks"]
) -> Float64[np.ndarray, "tasks count"]:
    """Return how much better each element is with a task than with the best other one, net of prices."""
    net = rows - prices[:, None]
    best, second = net[0], np.full_like(net[0], -math.inf)
    for row in net[1:]:
        second = np.maximum(second, np.minimum(best, row))
        best = np.maximum(best, row)
    gains: np.ndarray = net - np.where(net == best, second, best)
    return gains


def _gains_compiled(
    rows: Float64[np.ndarray, "tasks count"], prices: Float64[np.ndarray, " tasks"]
) -> Float64[np.ndarray, "tasks count"]:
    gains = np.empty_like(rows)
    cache.gains(np.ascontiguousarray(rows), prices, gains, np.empty((2, cache.BLOCK)))
    return gains
