"""Solving a market in memory: prices that nearly clear it, then the last elements one by one."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.methods.selection.exact.market import Allocation, Market, in_a_table, in_memory, ranked
from hub_magmax.methods.selection.exact.min_cost_flow import Ledger, lowered
from hub_magmax.methods.selection.owners import Owners
from hub_magmax.methods.selection.streams import ORDER


def solve_directly(market: Market) -> Allocation | None:
    """Solve a market in memory: prices by coordinate ascent, then the last elements one by one."""
    stock = in_memory(market)
    # In the order of their keys, so that "the first of several equals" is a random one.
    order = stock.generator.keys(stock.places, ORDER).argsort()
    rows, sizes = in_a_table(stock.take(order), market.groups)
    prices = _balance(rows, sizes, market.quotas, market.guess)
    ledger = Ledger(rows, sizes, prices, is_compiled=stock.is_compiled)
    losses = ledger.meet(market.quotas)
    if losses is None:
        return None
    owner, shares = ledger.outcome(stock.num_elements)
    owners = Owners(stock.num_elements)
    owners.owner[order] = owner
    return Allocation(owners, shares, lowered(prices, losses))


def _balance(
    rows: Float64[np.ndarray, "tasks count"],
    sizes: Int64[np.ndarray, " count"] | None,
    quotas: Int64[np.ndarray, " tasks"],
    guess: Float64[np.ndarray, " tasks"],
) -> Float64[np.ndarray, " tasks"]:
    """Set one price after the other so that its task meets its quota, while that pays.

    Each step minimises the dual over one price, which is a quantile of the task's gains.
    """
    prices = guess.copy()
    errors: list[int] = []
    # Two sweeps must improve by more than the handful of single moves that cost as much.
    few = len(prices)
    while True:
        errors.append(_sweep(rows, sizes, quotas, prices))
        prices -= prices.min()
        stalled = len(errors) > 2 and errors[-3] - errors[-1] < 2 * few
        if errors[-1] <= few or stalled:
            return prices


def _sweep(
    rows: Float64[np.ndarray, "tasks count"],
    sizes: Int64[np.ndarray, " count"] | None,
    quotas: Int64[np.ndarray, " tasks"],
    prices: Float64[np.ndarray, " tasks"],
) -> int:
    """Correct every price once, in place; return by how many elements counts were off before."""
    later = [np.full(rows.shape[1], -math.inf)]
    for row, price in zip(rows[:0:-1], prices[:0:-1], strict=True):
        later.append(np.maximum(later[-1], row - price))
    earlier = np.full(rows.shape[1], -math.inf)
    error = 0
    for task, quota in enumerate(quotas.tolist()):
        gains = rows[task] - np.maximum(earlier, later.pop())
        above, level = gains > prices[task], gains >= prices[task]
        fewest, most = (int(np.count_nonzero(m) if sizes is None else sizes[m].sum()) for m in (above, level))
        if not fewest <= quota <= most:
            error += max(fewest - quota, quota - most)
            prices[task] = _price_for(gains, sizes, quota, prices[task])
        earlier = np.maximum(earlier, rows[task] - prices[task])
    return error


def _price_for(
    gains: Float64[np.ndarray, " count"], sizes: Int64[np.ndarray, " count"] | None, quota: int, old: float
) -> float:
    """Return a price that the `quota` largest gains reach and no others: midway, or on a tie."""
    low, high = ranked(gains, sizes, (quota + 1, quota))
    if math.isfinite(low) and math.isfinite(high):
        return float(math.floor((low + high) / 2))
    return float(low if math.isfinite(low) else high if math.isfinite(high) else old)
