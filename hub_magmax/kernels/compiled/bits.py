"""Find few bytes among many: 64 of them are compared at a time, and become one number with a bit for each.

Appending element by element costs .5 to .8 ns of each, measured, because every place waits for the count
before it. Here it is .06 ns where a hundredth is sought, .2 where a fifth is.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hub_magmax.kernels.compiled.cache import SPARE
from hub_magmax.kernels.compiled.simd import compiled

_intrinsic: Any = intrinsic

_WIDTH = 64
_BYTES = ir.VectorType(ir.IntType(8), _WIDTH)
_LANES = ir.VectorType(ir.IntType(32), _WIDTH)
_ONE = np.uint64(1)


@_intrinsic
def _equal_bits(context, values, start, value):
    """Return a uint64 that says which of 64 bytes from `start` on equal a value."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        memory = builder.gep(array.data, [arguments[1]])
        found = builder.load(builder.bitcast(memory, _BYTES.as_pointer()), align=1)
        undefined = ir.Constant(_BYTES, ir.Undefined)
        first = builder.insert_element(undefined, arguments[2], ir.Constant(ir.IntType(32), 0))
        everywhere = builder.shuffle_vector(first, undefined, ir.Constant(_LANES, [0] * _WIDTH))
        return builder.bitcast(builder.icmp_unsigned("==", found, everywhere), ir.IntType(_WIDTH))

    return types.uint64(values, types.intp, types.uint8), generate


@_intrinsic
def _lowest(context, bits):
    """Return the place of the lowest bit that is set, 64 if none is."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_intrinsic
def _number(context, bits):
    """Return how many bits are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@compiled
def count(values, value):
    """Return how many bytes equal `value` (uint8)."""
    found = np.uint64(0)
    whole = values.shape[0] // _WIDTH * _WIDTH
    for start in range(0, whole, _WIDTH):
        found += _number(_equal_bits(values, start, value))
    for i in range(whole, values.shape[0]):
        found += np.uint64(values[i] == value)
    return np.int64(found)


@compiled
def part(owner, codes, value, bits, name):
    """Rename elements of an owner whose codes have none of some bits, and return their number.

    Args:
        owner: uint8 per element.
        codes: Unsigned integers, of up to 32 bits.
        value, name: uint8, the owner and the new one.
        bits: uint32.
    """
    found = np.int64(0)
    for i in range(owner.shape[0]):
        is_part = (owner[i] == value) & (codes[i] & bits == 0)
        owner[i] = name if is_part else owner[i]
        found += is_part
    return found


@compiled
def find(values, value, found):
    """Write the places at which bytes equal `value` (uint8), and return how many there are.

    `found` has `SPARE` places more than there are bytes; what is in the places after the last is anything.
    """
    count = np.uint64(0)  # unsigned: an index that may be negative is looked at twice
    whole = values.shape[0] // _WIDTH * _WIDTH
    for start in range(0, whole, _WIDTH):
        bits = _equal_bits(values, start, value)
        place = count
        count += _number(bits)
        while bits:
            for _ in range(SPARE):  # loops of a varying length are mispredicted
                found[place] = start + np.int64(_lowest(bits))
                bits &= bits - _ONE
                place += _ONE
    for i in range(whole, values.shape[0]):
        found[count] = i
        count += np.uint64(values[i] == value)
    return np.int64(count)
