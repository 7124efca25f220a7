"""Sixteen numbers at a time: each operation gives what numpy gives, and nothing beyond the end is touched."""

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_magmax.kernels.compiled import simd
from hub_magmax.kernels.compiled.cache import LANES
from hub_magmax.kernels.compiled.simd import (
    as_doubles,
    as_floats,
    as_ints,
    as_longs,
    as_numbers,
    choose,
    compiled,
    doubles,
    floats,
    ints,
    larger,
    load,
    longs,
    lower,
    nearest,
    steps,
    store,
)

SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 2**-149, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)
EDGES = np.array([0, 1, -1, 2**31 - 1, -(2**31), 0x7F800000, 12345], np.int32)
RANDOM = np.random.default_rng(0)
FLOATS = [
    np.concatenate([RANDOM.choice(SPECIAL, 40), RANDOM.standard_normal(40)]).astype(np.float32) for _ in "ab"
]
INTS = [np.concatenate([RANDOM.choice(EDGES, 40), RANDOM.integers(-9, 9, 40)]).astype(np.int32) for _ in "ab"]


def over(operation, kind):
    """Compile a binary operation over arrays, whose results are bits or, of comparisons, 0 and 1."""
    take = {"floats": as_floats, "ints": compiled(lambda value: value)}[kind]
    is_comparison = operation in (operator.eq, operator.lt, operator.le, operator.gt, operator.ge)
    give = as_numbers if is_comparison else {"floats": as_ints, "ints": take}[kind]

    @compiled
    def run(left, right, found):
        for start in range(0, found.shape[0], LANES):
            store(
                found,
                start,
                None,
                give(operation(take(load(left, start, None)), take(load(right, start, None)))),
            )

    def call(left, right):
        found = np.empty(len(left), np.int32)
        run(left.view(np.int32), right.view(np.int32), found)
        return found

    return call


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "eq", "lt", "le", "gt", "ge"])
def test_floats_are_rounded_and_compared_as_numpy_does(name):
    operation = getattr(operator, name)
    with np.errstate(all="ignore"):
        expected = operation(*FLOATS)
    found = over(operation, "floats")(*FLOATS)
    if expected.dtype == bool:
        assert found.tolist() == expected.tolist()
    else:
        is_nan = np.isnan(expected)
        assert np.isnan(found.view(np.float32)[is_nan]).all()
        assert np.array_equal(found[~is_nan], expected.view(np.int32)[~is_nan])


@pytest.mark.parametrize("name", ["add", "and_", "or_", "eq", "lt", "le", "gt", "ge"])
def test_integers_wrap_and_are_compared_as_numpy_does(name):
    operation = getattr(operator, name)
    with np.errstate(all="ignore"):
        expected = operation(*INTS)
    assert over(operation, "ints")(*INTS).tolist() == expected.astype(np.int32).tolist()


def test_shifts_bring_zeros():
    distance = RANDOM.integers(0, 32, 80).astype(np.int32)
    bits, by = INTS[0].view(np.uint32), distance.view(np.uint32)
    assert over(operator.lshift, "ints")(INTS[0], distance).view(np.uint32).tolist() == (bits << by).tolist()
    assert over(operator.rshift, "ints")(INTS[0], distance).view(np.uint32).tolist() == (bits >> by).tolist()


@compiled
def _reduced(values, number):
    return simd.largest(load(values, 0, number))


@compiled
def _added(values, number):
    return simd.total(load(values, 0, number))


@compiled
def _highest(values, found):
    store(found, 0, None, simd.highest_bits(load(values, 0, None)))


def test_sums_wrap_and_highest_bits_are_counted_from_the_lowest():
    values = np.array([0, 1, 2, 3, 4, 7, 8, 255, 256, 2**30, 2**31 - 1, -1, -(2**31), 5, 6, 9], np.int32)
    found = np.empty(16, np.int32)
    _highest(values, found)
    assert found.tolist() == [max(0, int(value).bit_length() - 1) for value in values.view(np.uint32)]
    assert _added(values, None) == int(values.sum(dtype=np.int32))
    assert _added(values, 9) == 536


@compiled
def _mixed(left, right, found):
    chosen = choose(
        load(left, 0, None) > load(right, 0, None), ints(7), simd.smaller(ints(9), load(left, 0, None))
    )
    store(found, 0, None, larger(chosen, ints(-3)))
    store(found, LANES, None, as_ints(abs(as_floats(load(left, 0, None)))))
    store(found, 2 * LANES, None, as_ints(floats(0.1)))


DOUBLES = np.concatenate([RANDOM.integers(-(2**50), 2**50, 28), [-0.5, 0.5, 1.5, 2.5]]).astype(np.float64)


@compiled
def _wide(values, scale, products, rounded, codes):
    for start in range(0, values.shape[0], LANES):
        product = as_doubles(as_floats(load(values, start, None))) * doubles(scale) - doubles(0.25)
        store(products, start, None, product)
        store(rounded, start, None, choose(product >= doubles(0.0), nearest(product), doubles(-1.0)))
        code = (as_longs(nearest(product)) ^ longs(12345)) * longs(0x9E3779B97F4A7C15 - 2**64)
        store(codes, start, None, code ^ code >> longs(29))


def test_wide_numbers_are_those_of_numpy():
    values = DOUBLES.astype(np.float32)
    products, rounded, codes = np.empty(32), np.empty(32), np.empty(32, np.int64)
    _wide(values.view(np.int32), 3.5, products, rounded, codes)
    expected = values.astype(np.float64) * 3.5 - 0.25
    assert products.tolist() == expected.tolist()
    assert rounded.tolist() == np.where(expected >= 0, np.rint(expected), -1).tolist()
    mixed = (np.rint(expected).astype(np.int64) ^ 12345) * np.int64(0x9E3779B97F4A7C15 - 2**64)
    shifted = (mixed.view(np.uint64) >> np.uint64(29)).view(np.int64)
    assert codes.tolist() == (mixed ^ shifted).tolist()


@compiled
def _halves(values, found, order):
    store(found, 0, None, lower(load(values, 0, None)))
    store(found, LANES, None, as_numbers(load(values, 0, None) + steps() > longs(7)))
    store(order, 0, None, steps())


def test_halves_and_steps_are_those_of_numpy():
    values = RANDOM.integers(-20, 20, LANES)
    values[:3] = 2**40 + 5, -(2**40) - 5, -1
    found, order = np.empty((2, LANES), np.int32), np.empty(LANES, np.int64)
    _halves(values, found, order)
    assert found[0].tolist() == values.astype(np.int32).tolist()
    assert found[1].tolist() == (values + np.arange(LANES) > 7).tolist()
    assert order.tolist() == list(range(LANES))


def test_choices_and_magnitudes_are_those_of_numpy():
    left, right = (values[:LANES] for values in INTS)
    found = np.empty((3, LANES), np.int32)
    _mixed(left, right, found)
    assert found[0].tolist() == np.maximum(np.where(left > right, 7, np.minimum(9, left)), -3).tolist()
    assert found[1].tolist() == (left & 0x7FFFFFFF).tolist()
    assert found[2].view(np.float32).tolist() == [np.float32(0.1)] * LANES


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=LANES))
def test_the_largest_counts_zeros_beyond_the_end(values):
    expected = max(values) if len(values) == LANES else max(0, *values)
    assert _reduced(np.array(values, np.int32), len(values)) == expected


@compiled
def _moved(values, start, number, found):
    store(found, start, number, load(values, start, number))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32])
@pytest.mark.parametrize("number", [0, 1, 7, 15])
def test_nothing_beyond_a_number_is_read_or_written(dtype, number):
    values = RANDOM.integers(1, 200, 40).astype(dtype)
    found = np.zeros(40, dtype)
    _moved(values, 3, number, found)
    assert found.tolist() == [0] * 3 + values[3 : 3 + number].tolist() + [0] * (37 - number)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_stored_values_have_no_sign_and_lose_high_bits(dtype):
    values, found = np.full(LANES, np.iinfo(dtype).max, dtype), np.zeros(LANES, np.int32)

    @compiled
    def widen(values, found):
        store(found, 0, None, load(values, 0, None))

    widen(values, found)
    assert found.view(np.uint32).tolist() == values.tolist()
    narrow = np.zeros(LANES, dtype)
    widen(np.full(LANES, 0x12345678, np.int32), narrow)
    assert narrow.tolist() == [0x12345678 % (np.iinfo(dtype).max + 1)] * LANES


def test_other_types_are_left_to_numba():
    @compiled
    def plain(left, right):
        return abs(left - right) + (left & right) + (left > right)

    assert plain(5, 7) == 2 + 5
