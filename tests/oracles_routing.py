"""Slow oracles of routers, written from the definitions."""

from __future__ import annotations

import math
from itertools import groupby, permutations


def slow_area_under_risk_coverage(trust: list[float], errors: list[float]) -> float:
    """Mean over coverages of the risk among the most trusted, and over all orders of equally trusted ones."""
    ranked = sorted(zip(trust, errors, strict=True), key=lambda pair: -pair[0])
    groups = [[error for _, error in group] for _, group in groupby(ranked, key=lambda pair: pair[0])]
    orders = [[]]
    for group in groups:
        orders = [before + list(order) for before in orders for order in permutations(group)]
    areas = [
        sum(sum(order[:count]) / count for count in range(1, len(order) + 1)) / len(order) for order in orders
    ]
    return sum(areas) / len(areas)


def chance_of_at_most(errors: int, trials: int, share: float) -> float:
    """Probability of at most so many errors, by the binomial distribution."""
    return sum(
        math.comb(trials, count) * share**count * (1 - share) ** (trials - count)
        for count in range(errors + 1)
    )


def slow_upper_bound(errors: int, trials: int, confidence: float) -> float:
    """Largest share under which so few errors are no less likely than 1 - confidence, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if chance_of_at_most(errors, trials, middle) >= 1 - confidence:
            low = middle
        else:
            high = middle
    return high
