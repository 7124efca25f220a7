"""Winners of algorithm 1 by compiled loops."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.simd import (
    choose,
    compiled,
    inlined,
    ints,
    larger,
    largest,
    store,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude, widened
from hub_magmax.kernels.structures import TIED, ZERO


@inlined
def _rank(stored, start, number, wanted, owner, codes):
    """Write winners and codes of sixteen elements, and return the largest magnitudes."""
    below = base_at(stored.base, start, number)
    first, best, best_task, code, top = ints(0), ints(0), ints(1), ints(0), ints(0)
    tied, is_tied, latest = ints(1), ints(0), ints(0)
    for task in range(wanted.shape[0]):
        found = ints(0)
        if wanted[task]:
            found = magnitude(widened(stored.rows, task * stored.stride + start, number) - below)
            top = larger(top, found)
        if task == 0:
            first = found
        else:
            best_task = choose(found >= best, ints(task), best_task)
            # The larger of both thresholds: reached only where it rises and reaches task 0.
            least = larger(best, first)
            bit = choose(found >= least, ints(1 << task), ints(0))
            code = code | bit
            tied = choose(found > least, bit, tied | bit)
            is_tied = choose(found > least, ints(0), is_tied | bit)
            latest = choose(found >= least, ints(task), latest)
            best = larger(best, found)
    # Where task 0 wins, name it, and in its place the best of the others.
    wins = first > best
    winner = choose(is_tied == ints(0), choose(wins, ints(0), best_task), latest | ints(TIED))
    store(owner, start, number, choose(larger(best, first) == ints(0), ints(ZERO), winner))
    code = choose(wins, ints(1) << best_task | ints(1), code)
    store(codes, start, number, choose(is_tied == ints(0), code, tied))
    return top


@compiled
def rank(stored, wanted, owner, codes):
    """Write winners and codes of a chunk, as `algorithm_one` describes them; return the largest bits met.

    Args:
        stored: `Bits`, of 2 to 32 tasks.
        wanted: uint8, whether each task has a quota; the others count as zero.
        owner: uint8 per element.
        codes: Unsigned integers with a bit per task.
    """
    top, size = ints(0), owner.shape[0]
    whole = size // LANES * LANES
    for start in range(0, whole, LANES):
        top = larger(top, _rank(stored, start, None, wanted, owner, codes))
    if whole < size:
        top = larger(top, _rank(stored, whole, size - whole, wanted, owner, codes))
    return np.int64(largest(top))


@compiled
def rename(owner, names):
    """Turn every byte into its entry of `names` (uint8, 256)."""
    for i in range(owner.shape[0]):
        owner[i] = names[owner[i]]
    return np.int64(0)
