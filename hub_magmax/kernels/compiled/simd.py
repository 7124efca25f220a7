"""Sixteen numbers at a time, for compiled loops: `Ints` are int32, `Floats` float32, a `Mask` is bits; and
where 32 bits are too few, `Longs` are int64, and `Doubles` float64.

Short loops, one for each step over a block in memory, become vector instructions by themselves, but spend
most of their time on loads and stores, and on starting. Written with these, one loop takes all steps on
sixteen elements, which stay in registers: choosing the winners among five tasks takes .7 ns per element
instead of 2.9, and merging by winners .4 instead of 1.6, measured.

    total = floats(0.0)
    for row in range(rows.shape[0]):
        total = total + as_floats(load(rows[row], start, None)) * floats(weights[row])
    store(merged, start, None, as_ints(total))

`+`, `-`, `*`, `/` and `abs` are of floats, `&`, `|`, `+`, `<<` and `>>` of integers, and comparisons of both.
Integers wrap around, are compared as signed, and zeros are shifted in. Floats are rounded after each
operation, and nothing is reordered or fused.
"""

# numba compiles what types it finds, so functions here have none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from hub_magmax.kernels.compiled.cache import LANES

_intrinsic: Any = intrinsic
_njit: Any = njit

#: Compiles a function. Other threads run meanwhile, and a division by zero raises nothing. Nothing is
#: allocated, so no references are counted: numba counts the users of an array, even for a call or a row of
#: it, and that took half of the time of functions on sixteen elements.
compiled: Any = _njit(nogil=True, error_model="numpy", _nrt=False)
#: Compiles a function on sixteen elements into its callers, because a call would take longer than that.
inlined: Any = _njit(nogil=True, error_model="numpy", _nrt=False, forceinline=True)


def _lanes_of(element):
    return ir.VectorType(element, LANES)


_INT = ir.IntType(32)


class _Lanes(types.Type):
    """The type of sixteen numbers."""

    def __init__(self, name, element):
        super().__init__(name=name)
        self.element = element


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _lanes_of(kind.element))


INTS, FLOATS, MASK = _Lanes("Ints", _INT), _Lanes("Floats", ir.FloatType()), _Lanes("Mask", ir.IntType(1))
LONGS, DOUBLES = _Lanes("Longs", ir.IntType(64)), _Lanes("Doubles", ir.DoubleType())

#: By operator and type of both arguments: the type of the result, and the instruction of `llvmlite.ir`.
_INSTRUCTIONS = {
    operator.add: {
        FLOATS: (FLOATS, "fadd"),
        DOUBLES: (DOUBLES, "fadd"),
        INTS: (INTS, "add"),
        LONGS: (LONGS, "add"),
    },
    operator.sub: {FLOATS: (FLOATS, "fsub"), DOUBLES: (DOUBLES, "fsub")},
    operator.mul: {FLOATS: (FLOATS, "fmul"), DOUBLES: (DOUBLES, "fmul"), LONGS: (LONGS, "mul")},
    operator.truediv: {FLOATS: (FLOATS, "fdiv"), DOUBLES: (DOUBLES, "fdiv")},
    operator.and_: {INTS: (INTS, "and_"), MASK: (MASK, "and_")},
    operator.or_: {INTS: (INTS, "or_"), MASK: (MASK, "or_")},
    operator.xor: {INTS: (INTS, "xor"), LONGS: (LONGS, "xor")},
    operator.lshift: {INTS: (INTS, "shl")},
    operator.rshift: {INTS: (INTS, "lshr"), LONGS: (LONGS, "lshr")},
}
_COMPARISONS = {operator.eq: "==", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">="}


def _operation(gives, takes, instruction):
    @_intrinsic
    def operation(context, left, right):
        def emit(context, builder, signature, values):
            return getattr(builder, instruction)(*values)

        return gives(takes, takes), emit

    return operation


def _comparison(takes, sign):
    @_intrinsic
    def comparison(context, left, right):
        def emit(context, builder, signature, values):
            compare = builder.icmp_signed if takes in (INTS, LONGS) else builder.fcmp_ordered
            return compare(sign, *values)

        return MASK(takes, takes), emit

    return comparison


def _let_numba_compile(operator_, operations):
    """Have an operator compiled by the one of `operations` that takes the type of its arguments."""

    @overload(operator_)
    def overloaded(left, right):
        operation = operations.get(left) if left == right else None
        # numba looks at the names of an implementation's arguments.
        return None if operation is None else lambda left, right: operation(left, right)  # noqa: PLW0108


for _operator, _by_type in _INSTRUCTIONS.items():
    _let_numba_compile(
        _operator, {takes: _operation(gives, takes, name) for takes, (gives, name) in _by_type.items()}
    )
for _operator, _sign in _COMPARISONS.items():
    _let_numba_compile(
        _operator, {takes: _comparison(takes, _sign) for takes in (FLOATS, DOUBLES, INTS, LONGS)}
    )


def _splat(builder, value):
    nothing = ir.Constant(_lanes_of(value.type), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_lanes_of(_INT), [0] * LANES))


def _same(lanes, number):
    """Return what gives sixteen times the same number; `number` is the type of one, and `lanes` of all."""

    @_intrinsic
    def splat(context, value):
        def emit(context, builder, signature, values):
            return _splat(builder, context.cast(builder, values[0], signature.args[0], number))

        return lanes(value), emit

    return splat


#: Sixteen times the same number.
ints, floats = _same(INTS, types.int32), _same(FLOATS, types.float32)
longs, doubles = _same(LONGS, types.int64), _same(DOUBLES, types.float64)


@_intrinsic
def _magnitude(context, value):
    def emit(context, builder, signature, values):
        bits = builder.bitcast(values[0], _lanes_of(_INT))
        without_sign = builder.and_(bits, ir.Constant(_lanes_of(_INT), [0x7FFFFFFF] * LANES))
        return builder.bitcast(without_sign, _lanes_of(FLOATS.element))

    return FLOATS(FLOATS), emit


@overload(abs)
def _abs(value):
    return (lambda value: _magnitude(value)) if value == FLOATS else None  # noqa: PLW0108


def _cast(gives, takes, instruction):
    @_intrinsic
    def cast(context, value):
        def emit(context, builder, signature, values):
            return getattr(builder, instruction)(values[0], _lanes_of(gives.element))

        return gives(takes), emit

    return cast


#: Take the bits of integers for those of floats, and the other way round.
as_floats, as_ints = _cast(FLOATS, INTS, "bitcast"), _cast(INTS, FLOATS, "bitcast")
#: Widen floats; turn whole numbers into integers.
as_doubles, as_longs = _cast(DOUBLES, FLOATS, "fpext"), _cast(LONGS, DOUBLES, "fptosi")
#: Round doubles to floats.
narrow = _cast(FLOATS, DOUBLES, "fptrunc")
#: Return 1 for each bit that is set, else 0.
as_numbers = _cast(INTS, MASK, "zext")
#: Widen integers.
as_wide = _cast(LONGS, INTS, "sext")
#: Return the lower halves.
lower = _cast(INTS, LONGS, "trunc")


@_intrinsic
def highest_bits(context, value):
    """Return the place of the highest bit that is set in each of sixteen integers, 0 if none is."""

    def emit(context, builder, signature, values):
        vector = _lanes_of(_INT)
        kind = ir.FunctionType(vector, [vector, MASK.element])
        count = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctlz.v{LANES}i32")
        above = builder.call(
            count, [builder.or_(values[0], ir.Constant(vector, [1] * LANES)), MASK.element(1)]
        )
        return builder.sub(ir.Constant(vector, [_INT.width - 1] * LANES), above)

    return INTS(INTS), emit


@_intrinsic
def as_bits(context, mask):
    """Return a mask as an int64, the bit of the first element lowest."""

    def emit(context, builder, signature, values):
        bits = builder.bitcast(values[0], ir.IntType(LANES))
        return builder.zext(bits, LONGS.element)

    return types.int64(MASK), emit


@_intrinsic
def lowest_bit(context, bits):
    """Return the place of the lowest bit that is set in an int64 other than zero."""

    def emit(context, builder, signature, values):
        return builder.cttz(values[0], ir.Constant(MASK.element, 1))

    return types.int64(types.int64), emit


@_intrinsic
def steps(context):
    """Return the numbers from 0 to 15."""

    def emit(context, builder, signature, values):
        return ir.Constant(_lanes_of(LONGS.element), list(range(LANES)))

    return LONGS(), emit


def _of_doubles(name):
    """Return what calls a function of LLVM on each of sixteen doubles."""

    @_intrinsic
    def call(context, value):
        def emit(context, builder, signature, values):
            kind = ir.FunctionType(_lanes_of(DOUBLES.element), [_lanes_of(DOUBLES.element)])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f64")
            return builder.call(function, values)

        return DOUBLES(DOUBLES), emit

    return call


@_intrinsic
def power_of_two(context, exponent):
    """Return the doubles with these exponents as they are stored, from 1 to 2046."""

    def emit(context, builder, signature, values):
        shift = ir.Constant(_lanes_of(LONGS.element), [52] * LANES)
        return builder.bitcast(builder.shl(values[0], shift), _lanes_of(DOUBLES.element))

    return DOUBLES(LONGS), emit


#: Round to whole numbers, to the even one of two; return square roots, rounded once.
nearest, square_root = _of_doubles("rint"), _of_doubles("sqrt")


@_intrinsic
def choose(context, mask, chosen, other):
    """Return what is in `chosen` where a bit is set, else what is in `other`."""
    return chosen(MASK, chosen, chosen), lambda context, builder, signature, values: builder.select(*values)


def _one_of(sign):
    @_intrinsic
    def one(context, left, right):
        def emit(context, builder, signature, values):
            return builder.select(builder.icmp_signed(sign, *values), *values)

        return INTS(INTS, INTS), emit

    return one


#: Return the larger integer of each two, and the smaller one.
larger, smaller = _one_of(">"), _one_of("<")


def _folded(combine):
    @_intrinsic
    def folded(context, value):
        def emit(context, builder, signature, values):
            found, distance = values[0], LANES // 2
            while distance:
                places = ir.Constant(_lanes_of(_INT), [(place + distance) % LANES for place in range(LANES)])
                found = combine(builder, found, builder.shuffle_vector(found, found, places))
                distance //= 2
            return builder.extract_element(found, ir.Constant(_INT, 0))

        return types.int32(INTS), emit

    return folded


#: Return the largest of sixteen integers, and their sum.
largest = _folded(
    lambda builder, one, other: builder.select(builder.icmp_signed(">", one, other), one, other)
)
total = _folded(lambda builder, one, other: builder.add(one, other))


def _copy(builder, number, source, target):
    """Copy elements one by one."""
    with cgutils.for_range(builder, number) as loop:
        value = builder.load(builder.gep(source, [loop.index]))
        builder.store(value, builder.gep(target, [loop.index]))


def _memory(builder, element):
    """Return memory for sixteen elements, with zeros in it."""
    zeros = ir.Constant(_lanes_of(element), None)
    memory = cgutils.alloca_once_value(builder, zeros)
    return builder.bitcast(memory, element.as_pointer())


@_intrinsic
def load(context, array, start, number):
    """Return sixteen integers from `start` on: of up to 32 bits, without a sign, or of 64.

    Args:
        array: Without gaps; where it has rows, elements are counted row after row.
        start: Of the first element.
        number: If not None, how many there are, fewer than sixteen; zeros follow. That is slow.
    """
    element = ir.IntType(array.dtype.bitwidth)

    def emit(context, builder, signature, values):
        memory = builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])
        memory = builder.bitcast(memory, element.as_pointer())
        if number != types.none:
            some, memory = memory, _memory(builder, element)
            _copy(builder, values[2], some, memory)
        found = builder.load(builder.bitcast(memory, _lanes_of(element).as_pointer()), align=1)
        return builder.zext(found, _lanes_of(_INT)) if element.width < _INT.width else found

    return (LONGS if element.width > _INT.width else INTS)(array, types.intp, number), emit


@_intrinsic
def load_doubles(context, array, start):
    """Return sixteen numbers of an array of float64 from `start` on."""

    def emit(context, builder, signature, values):
        memory = builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])
        return builder.load(builder.bitcast(memory, _lanes_of(DOUBLES.element).as_pointer()), align=1)

    return DOUBLES(array, types.intp), emit


@_intrinsic
def store(context, array, start, number, value):
    """Write sixteen numbers, or the first `number`, to an array from `start` on; of integers the low bits."""
    element = ir.IntType(array.dtype.bitwidth) if value == INTS else value.element

    def emit(context, builder, signature, values):
        memory = builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])
        memory = builder.bitcast(memory, element.as_pointer())
        is_narrow = value == INTS and element != _INT
        found = builder.trunc(values[3], _lanes_of(element)) if is_narrow else values[3]
        if number == types.none:
            builder.store(found, builder.bitcast(memory, _lanes_of(element).as_pointer()), align=1)
        else:
            whole = _memory(builder, element)
            builder.store(found, builder.bitcast(whole, _lanes_of(element).as_pointer()), align=1)
            _copy(builder, values[2], whole, memory)
        return context.get_dummy_value()

    return types.void(array, types.intp, number, value), emit
