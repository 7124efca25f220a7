"""Stored values as numbers, sixteen at a time."""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from hub_magmax.kernels.compiled.simd import as_floats, as_ints, compiled, floats, inlined, ints, load

#: All bits of a number but its sign.
MAGNITUDE = 0x7FFFFFFF


@inlined
def widen(bits, itemsize):
    """Return stored bits as float32: bfloat16 is its upper half, and float32 itself."""
    return as_floats(bits << ints(32 - 8 * itemsize))


@inlined
def widened(stored, start, number):
    """Return stored values as float32."""
    return widen(load(stored, start, number), stored.itemsize)


@inlined
def magnitude(values):
    """Return magnitudes as bits, which sort like the numbers."""
    return as_ints(abs(values))


@inlined
def base_at(base, start, number):
    """Return the base model's elements, zeros where it is subtracted already."""
    return widened(base, start, number) if base.shape[0] else floats(0.0)


@compiled
def magnitude_at(stored, place, start):
    """Return the magnitude of one element, at `place` in the rows of `Bits` and at `start` in its base."""
    shift = np.uint32(32 - 8 * stored.rows.itemsize)
    value, below = np.uint32(np.uint32(stored.rows[place]) << shift).view(np.float32), np.float32(0.0)
    if stored.base.shape[0]:
        below = np.uint32(np.uint32(stored.base[start]) << shift).view(np.float32)
    return np.float32(abs(np.float32(value - below)))
