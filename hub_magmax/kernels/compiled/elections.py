"""The arithmetic of `kernels.elections` as compiled loops, sixteen elements at a time."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from hub_magmax.kernels.compiled.cache import (
    BAND,
    BAND_TIES,
    BAND_TIES_SUM,
    CLIPPED,
    DROPPED_TIES,
    DROPPED_TIES_SUM,
    LANES,
    RESCALED_TIES,
    SCALED,
    SCALED_TIES,
    SCALED_TIES_SUM,
    SELECTED_TIES,
    STITCHED,
    TIES,
    TIES_SUM,
)
from hub_magmax.kernels.compiled.simd import (
    as_floats,
    as_ints,
    choose,
    floats,
    inlined,
    ints,
    larger,
    load,
    store,
)
from hub_magmax.kernels.compiled.values import MAGNITUDE, magnitude, widened


@inlined
def kept(merging, task, moved, place, number):
    """Set what an operation leaves out of a task vector to zero; lower what it clips."""
    kind, per_task, given = merging.kind, merging.per_task, merging.per_element
    if kind in (TIES, RESCALED_TIES, TIES_SUM, STITCHED):
        is_kept = abs(moved) >= floats(per_task[0, task])
    elif kind in (BAND, BAND_TIES, BAND_TIES_SUM):
        size = abs(moved)
        is_kept = (size >= floats(per_task[0, task])) & (size <= floats(per_task[1, task]))
    elif kind == CLIPPED:
        limit = floats(per_task[0, task])
        sign = as_ints(moved) & ints(~MAGNITUDE)
        moved = choose(abs(moved) > limit, as_floats(as_ints(limit) | sign), moved)
        is_kept = ints(1) > ints(0)
    elif kind in (SCALED, SCALED_TIES, SCALED_TIES_SUM):
        moved = moved * as_floats(load(given, task * given.shape[1] + place, number))
        is_kept = ints(1) > ints(0)
    else:
        is_kept = load(given, task // 8 * given.shape[1] + place, number) & ints(1 << task % 8) > ints(0)
    return choose(is_kept, moved, floats(0.0))


@inlined
def elected(merging, stored, start, number, base, place):
    """Return the weighted mean, or sum, of what has the elected sign, and the largest magnitudes."""
    per_task, scratch, is_sum = merging.per_task, merging.scratch, merging.kind >= TIES_SUM
    ballots, zero = per_task.shape[0] - 1, floats(0.0)
    # The first row has what differs from the weights where elements were dropped at random, or the weights,
    # where these have no part in the election.
    weights = 0 if merging.kind == SELECTED_TIES else ballots
    shares = 0 if merging.kind in (DROPPED_TIES, DROPPED_TIES_SUM, SCALED_TIES) else weights
    shares = 1 if merging.kind == RESCALED_TIES else shares
    top, sum_of_all, total, mass = ints(0), floats(-0.0), zero, zero
    for task in range(stored.shape[0] - 1):
        moved = widened(stored, (task + 1) * stored.shape[1] + start, number) - base
        top = larger(top, magnitude(moved))
        moved = kept(merging, task, moved, place, number)
        if per_task[ballots, task] != 0:
            sum_of_all = sum_of_all + moved * floats(per_task[ballots, task])
        moved = moved * floats(per_task[shares, task]) if is_sum else moved
        store(scratch, task * LANES, None, as_ints(moved))
    # What has the same sign is above zero once both signs are taken off; this is half of the instructions.
    sign = as_ints(sum_of_all) & ints(~MAGNITUDE)
    for task in range(stored.shape[0] - 1):
        held = load(scratch, task * LANES, None)
        agrees, moved = as_floats(held ^ sign) > zero, as_floats(held)
        if is_sum:
            total = choose(agrees, total + moved, total)
        else:
            total = choose(agrees, total + moved * floats(per_task[weights, task]), total)
            mass = choose(agrees, mass + floats(per_task[shares, task]), mass)
    if is_sum:
        return choose(abs(sum_of_all) > zero, total, zero), top
    agrees = (abs(sum_of_all) > zero) & (mass > zero)
    return choose(agrees, total / mass, zero), top


@inlined
def stitched(merging, stored, start, number, base):
    """Return the weighted mean of the tasks that keep an element, and the largest magnitudes."""
    per_task, zero = merging.per_task, floats(0.0)
    top, alone, total, mass, count = ints(0), zero, zero, zero, ints(0)
    for task in range(stored.shape[0] - 1):
        moved = widened(stored, (task + 1) * stored.shape[1] + start, number) - base
        top = larger(top, magnitude(moved))
        weight = per_task[2, task]
        if weight != 0:
            moved = kept(merging, task, moved, 0, None)
            is_kept = abs(moved) > zero
            alone = choose(is_kept, moved * floats(per_task[1, task]), alone)
            total = choose(is_kept, total + moved * floats(weight), total)
            mass = choose(is_kept, mass + floats(weight), mass)
            count = choose(is_kept, count + ints(1), count)
    return choose(count > ints(1), total / mass, alone), top
