"""The arithmetic of `kernels.competition` as compiled loops."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.competition import COEFFICIENTS, LOG2_HIGH, LOG2_INVERSE, LOG2_LOW, MOST
from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_ints,
    as_longs,
    choose,
    compiled,
    doubles,
    floats,
    inlined,
    ints,
    larger,
    largest,
    longs,
    narrow,
    nearest,
    power_of_two,
    store,
)
from hub_magmax.kernels.compiled.values import base_at, magnitude, widened


@inlined
def _exponential(exponent):
    """Return 2**k and exp(r) - 1, of which exp(exponent) is made."""
    power = nearest(exponent * doubles(LOG2_INVERSE))
    rest = exponent - power * doubles(LOG2_HIGH) - power * doubles(LOG2_LOW)
    total = doubles(COEFFICIENTS[0])
    for n in range(1, len(COEFFICIENTS)):
        total = total * rest + doubles(COEFFICIENTS[n])
    return power_of_two(as_longs(power) + longs(1023)), total * rest


@inlined
def _size(wide):
    return choose(wide < doubles(0.0), doubles(0.0) - wide, wide)


@inlined
def _tangent(values):
    size = _size(values)
    factor, change = _exponential(choose(size > doubles(MOST), doubles(MOST), size) * doubles(-2.0))
    less = change * factor + (factor - doubles(1.0))
    found = (doubles(0.0) - less) / (less + doubles(2.0))
    return choose(values < doubles(0.0), doubles(0.0) - found, found)


@inlined
def _bounded(wide, low, high):
    size = _size(wide)
    size = choose(size > high, high, size)
    return choose(size < low, low, size)


@inlined
def _score(wide, low, high, together, active):
    """Return the scores of sixteen elements of a task, as float32."""
    place = (_bounded(wide, low, high) - low) / (high - low)
    place = choose(high > low, place, doubles(0.0))
    factor, change = _exponential((place * place - doubles(1.0)) * active)
    found = (change + doubles(1.0)) * factor * _tangent(wide * together)
    return narrow(choose(found > doubles(0.0), found, doubles(0.0)))


@inlined
def _number(per_task, row, task):
    return doubles(np.float64(per_task[row, task]))


@compiled
def num_active(per_task, row):
    """Return how many tasks have a number other than 0."""
    found = 0
    for task in range(per_task.shape[1]):
        found += per_task[row, task] != 0
    return found


@inlined
def balanced(merging, stored, start, number, base):
    """Return the balanced mean of sixteen elements, and the largest magnitudes."""
    per_task, top = merging.per_task, ints(0)
    active, zero = doubles(np.float64(num_active(per_task, 4))), doubles(0.0)
    together, total, mass = zero, zero, zero
    for task in range(stored.shape[0] - 1):
        moved = widened(stored, (task + 1) * stored.shape[1] + start, number) - base
        top = larger(top, magnitude(moved))
        if per_task[4, task] != 0:
            together = together + as_doubles(moved) * _number(per_task, 4, task)
    for task in range(stored.shape[0] - 1):
        if per_task[4, task] != 0:
            moved = widened(stored, (task + 1) * stored.shape[1] + start, number) - base
            wide, low, high = as_doubles(moved), _number(per_task, 0, task), _number(per_task, 1, task)
            threshold, most = _number(per_task, 2, task), _number(per_task, 3, task)
            score = as_doubles(_score(wide, low, high, together, active))
            above = score - threshold
            share = choose(most > threshold, above / (most - threshold), doubles(1.0))
            share = choose(above < zero, zero, share)
            share = choose(score == zero, zero, share) * _number(per_task, 5, task)
            size = choose(wide == zero, zero, _bounded(wide, low, high))
            total = total + choose(wide < zero, zero - size, size) * share
            mass = mass + share
    return narrow(choose(mass > zero, total / mass, zero)), top


@inlined
def _write(stored, per_task, active, start, number, out):
    base, together, top = base_at(stored.base, start, number), doubles(0.0), ints(0)
    for task in range(per_task.shape[1]):
        moved = widened(stored.rows, task * stored.stride + start, number) - base
        top = larger(top, magnitude(moved))
        if per_task[2, task] != 0:
            together = together + as_doubles(moved) * _number(per_task, 2, task)
    for task in range(per_task.shape[1]):
        found = floats(0.0)
        if per_task[2, task] != 0:
            moved = widened(stored.rows, task * stored.stride + start, number) - base
            low, high = _number(per_task, 0, task), _number(per_task, 1, task)
            found = _score(as_doubles(moved), low, high, together, active)
        store(out, task * out.shape[1] + start, number, as_ints(found))
    return top


@compiled
def write_scores(stored, per_task, out):
    """Write how much each task claims each element, and return the largest bits met.

    Args:
        stored: `Bits`.
        per_task: float32, tasks in its columns: bounds of magnitudes, and multipliers.
        out: uint32, tasks by elements; takes bits of float32.
    """
    top, size = ints(0), out.shape[1]
    active, whole = doubles(np.float64(num_active(per_task, 2))), size // LANES * LANES
    for start in range(0, whole, LANES):
        top = larger(top, _write(stored, per_task, active, start, None, out))
    if whole < size:
        top = larger(top, _write(stored, per_task, active, whole, size - whole, out))
    return np.int64(largest(top))
