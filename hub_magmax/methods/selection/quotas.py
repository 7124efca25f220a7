"""Quotas: the number of elements of a tensor that each task gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from hub_magmax.errors import RecipeError


def quotas(preference: Sequence[float], num_elements: int) -> tuple[int, ...]:
    """Split one tensor's elements between tasks in proportion to their preference.

    Shares are floored; the elements left over go one each to the first tasks with a positive weight.
    A weight is read as the number it was written as: 0.29 of 100 elements is 29, and 1/6 of 6 is 1,
    although the nearest floats lie below 29/100 and 1/6. Where the weights sum to one only nearly, so
    that the floored shares exceed the elements or leave more than one for each task, the shares are
    first divided by that sum.

    Args:
        preference: Non-negative, sums to 1 within 1e-6.
        num_elements: Elements in the tensor, at least 0.

    Returns:
        Counts that sum to `num_elements`; a weight of zero gets none, a one-hot preference all.

    Raises:
        RecipeError: If `preference` is negative, non-finite, or does not sum to 1.

    Source: the released code of Tunable MAGMAX (arXiv:2605.20803), except that it may hand a
    left-over element to a task with weight zero.
    """
    shares = floored_shares(preference, num_elements)
    wanted = [task for task, weight in enumerate(preference) if weight > 0]
    for task in wanted[: num_elements - sum(shares)]:
        shares[task] += 1
    return tuple(shares)


def floored_shares(preference: Sequence[float], number: int) -> list[int]:
    """Return the quotas of `number` things as `quotas` has them, without those that are left over."""
    weights = _as_written(preference)
    num_wanted = sum(weight > 0 for weight in weights)
    shares = [math.floor(weight * number) for weight in weights]
    if not 0 <= number - sum(shares) <= num_wanted:
        total = sum(weights)
        shares = [math.floor(weight * number / total) for weight in weights]
    return shares


def _as_written(preference: Sequence[float]) -> list[Fraction]:
    """Check a preference, and turn each weight into the fraction that it stands for."""
    weights = [float(weight) for weight in preference]
    hint = "Give every task a non-negative weight, so that the weights sum to 1."
    for task, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            what = f"the weight of task {task + 1} is {weight}"
            raise RecipeError(what, where="preference", expected="a number from 0 to 1", hint=hint)
    if abs(math.fsum(weights) - 1) > 1e-6:
        what = f"the {len(weights)} weights sum to {math.fsum(weights):.9g}"
        raise RecipeError(what, where="preference", expected="a sum of 1 within 1e-6", hint=hint)
    return [_simplest_fraction(weight) for weight in weights]


@lru_cache(maxsize=256)
def _simplest_fraction(weight: float) -> Fraction:
    """Return p/q with q up to a million if it is within a few roundings, else the decimal as printed.

    Kept, because it takes longer than the rest of a small tensor's quotas, for the same few weights.
    """
    simple = Fraction(weight).limit_denominator(1_000_000)
    # 2**-50 relative: a weight like 1/6 may come from a division or two.
    close = abs(simple - Fraction(weight)) <= Fraction(weight) / 2**50
    return simple if close else Fraction(repr(weight))
