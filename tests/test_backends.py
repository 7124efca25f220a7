"""Operations × backends: every backend returns the reference's bytes, counts and notices."""

import functools
import math
import operator

import numpy as np
import pytest
import torch

from hub_magmax.kernels import dispatch, ops, products, reference, spreads
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.device import Device
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.dtypes import dtype_name
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.kernels.ops import Inputs, Op
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.row_ranks import RankTable
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import Draw, Histograms
from hub_magmax.kernels.winners import Classes, compare
from hub_magmax.methods import draws
from hub_magmax.methods.selection.looks import Contest
from hub_magmax.methods.selection.prices import Box

REFERENCE = Reference()
BACKENDS = {
    "pieces": Reference(piece_elements=777),
    "compiled": Compiled(),
    "device": Device(device=torch.device("cpu")),
}
OWN = Op(lambda rows, weights: sum(row * weight for row, weight in zip(rows, weights, strict=True)))
OWN_CHOICE = Op(lambda rows: torch.stack(list(rows)).abs().argmin(0).to(torch.uint8), selects=True)
OPS = ops.OPS | {"a plug-in's": OWN, "a plug-in's that selects": OWN_CHOICE}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GENERATOR = CounterGenerator(7, "t")


def chunk_of(length, dtype, num_tasks=3, other=None):
    """A chunk in which ties, zeros of both signs and elements that do not move are common."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(length, generator=generator).to(dtype)
    keep = [torch.rand(length, generator=generator) < 0.5 for _ in range(num_tasks)]
    steps = [0.1 * torch.randn(length, generator=generator).round(decimals=1) * k for k in keep]
    checkpoints = [(base.double() + step).to(dtype) for step in steps]
    if length > 3:
        base[:2], checkpoints[0][1] = torch.tensor([0.0, -0.0]), 0.0
    if other is not None:
        values = [base, checkpoints[0].to(other), *checkpoints[1:]]
        return RawChunk([(0, length)], lambda: [Stored.of(row) for row in values])
    return chunk_with(torch.stack([base, *checkpoints]))


def chunk_with(values):
    rows = Stored.of(values)
    return RawChunk([(0, values.shape[1])], lambda: rows)


def inputs_of(op, length, num_tasks=3):
    """Numbers for an operation, one weight of them zero."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.tensor([0.5, 0.0, *[0.5] * (num_tasks - 2)])
    signed = torch.tensor([1.5, 0.0, -0.5, *[1.0] * (num_tasks - 3)])
    bounds = 0.1 * torch.rand(num_tasks, generator=generator)
    factors = torch.rand((num_tasks, length), generator=generator).mul(2).floor().mul(1.25)
    kept = torch.randint(0, 256, ((num_tasks + 7) // 8, length), generator=generator, dtype=torch.uint8)
    with_base = torch.cat([torch.tensor([-0.25]), weights])
    return {
        "affine_sum": Inputs((), (with_base,)),
        "affine_sum_of_each": Inputs((with_base * (torch.arange(length)[:, None] % 3),)),
        "ties": Inputs((), (bounds, weights)),
        "ties_sum": Inputs((), (bounds, signed)),
        "band": Inputs((), (bounds, 2 * bounds, weights)),
        "band_ties": Inputs((), (bounds, 2 * bounds, weights)),
        "band_ties_sum": Inputs((), (bounds, 2 * bounds, signed)),
        "rescaled_ties": Inputs((), (bounds, weights, 1.3 * weights)),
        "scaled": Inputs((factors.T,), (signed,)),
        "scaled_ties": Inputs((factors.T,), (weights, weights / 0.3)),
        "scaled_ties_sum": Inputs((factors.T,), (signed,)),
        "selected_ties": Inputs((kept.T,), (weights * 0.3, signed.abs())),
        "balanced": Inputs((), (bounds / 9, bounds, bounds / 99, bounds, 3 * weights, weights)),
        "stitched": Inputs((), (bounds / 2, 1 + bounds, weights)),
        "clipped": Inputs((), (bounds, weights)),
        "dropped": Inputs((kept.T,), (weights / 0.3,)),
        "dropped_ties": Inputs((kept.T,), (weights * 0.3, weights)),
        "dropped_ties_sum": Inputs((kept.T,), (signed / 0.3, signed)),
        "largest": Inputs(),
        "precomputed": Inputs((torch.randn(length, generator=generator),)),
        "chosen": Inputs((kept[0] % num_tasks,)),
    }.get(op.name, Inputs() if op is OWN_CHOICE else Inputs((), (weights,)))


def assert_same(found, expected, name=None):
    assert found.values.dtype == expected.values.dtype, name
    assert found.values.bits.tobytes() == expected.values.bits.tobytes(), name
    assert found.counts.tolist() == expected.counts.tolist(), name
    assert math.isfinite(found.probe) and math.isfinite(expected.probe), name


@pytest.mark.parametrize("length", [0, 1, 7, cache.BLOCK, 5 * cache.BLOCK + 3])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_backend_merges_to_the_same_bytes(op, dtype, out, length):
    chunk, inputs = chunk_of(length, dtype), inputs_of(OPS[op], length)
    expected = REFERENCE.merge(OPS[op], chunk, inputs, dtype_name(out), 0.3)
    for name, backend in BACKENDS.items():
        found = backend.merge(OPS[op], chunk, inputs, dtype_name(out), 0.3)
        assert_same(found, expected, name)
        assert found.counts.sum() == (length if OPS[op].selects else 0), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_checkpoints_of_several_dtypes_merge_to_the_same_bytes(op, backend):
    chunk, inputs = chunk_of(1000, torch.bfloat16, other=torch.float32), inputs_of(OPS[op], 1000)
    found, expected = (
        one.merge(OPS[op], chunk, inputs, "BF16", 0.3) for one in (BACKENDS[backend], REFERENCE)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_eleven_tasks_merge_to_the_same_bytes(op, backend):
    """Bits of what is kept for more than eight tasks take two bytes for each element."""
    length = cache.BLOCK + 7
    chunk, inputs = chunk_of(length, torch.bfloat16, num_tasks=11), inputs_of(OPS[op], length, num_tasks=11)
    found, expected = (
        one.merge(OPS[op], chunk, inputs, "BF16", 0.3) for one in (BACKENDS[backend], REFERENCE)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_probe_is_not_finite_where_an_input_is_not(op, value, backend):
    chunk = chunk_of(5000, torch.float32)
    chunk.checkpoints[1][4321] = value
    inputs = inputs_of(OPS[op], 5000)
    assert not math.isfinite(BACKENDS[backend].merge(OPS[op], chunk, inputs, "F32", 0.3).probe)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_probe_is_not_finite_where_the_merged_value_is_too_large(dtype, backend):
    rows = torch.zeros((2, 10), dtype=dtype)
    rows[1, 3] = 0.4 * torch.finfo(dtype).max
    inputs = Inputs((), (torch.ones(1),))
    probes = [
        BACKENDS[backend].merge(ops.WEIGHTED_SUM, chunk_with(rows), inputs, dtype_name(dtype), scaling).probe
        for scaling in (3.0, 0.5)
    ]
    assert [math.isfinite(probe) for probe in probes] == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize(("base", "other", "is_finite"), [(3e38, 3e38, True), (3e38, -3e38, False)])
def test_probe_counts_task_vectors_that_are_not_chosen(base, other, is_finite, dtype, backend):
    """A number that is far from the base model's is noticed, as are all that are not finite."""
    stored = torch.ones(3, cache.BLOCK + 5, dtype=dtype)
    stored[0, -1], stored[2, -1] = base, other
    stored[1, -1] = base
    length = stored.shape[1]
    first = Inputs((torch.zeros(length, dtype=torch.uint8),))
    found = BACKENDS[backend].merge(ops.CHOSEN, chunk_with(stored), first, dtype_name(dtype), 0.5)
    assert math.isfinite(found.probe) == is_finite
    assert torch.equal(found.values.tensor, stored[1]) and found.counts.tolist() == [length, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_task_vectors_are_the_same_bytes(dtype, backend):
    chunk = chunk_of(3 * cache.BLOCK + 1, dtype)
    room = np.empty((3, chunk.num_elements), np.float32)
    found = BACKENDS[backend].task_vectors(chunk, lambda: room)
    expected = ops.task_vectors(chunk.base, chunk.checkpoints).numpy()
    assert found.tobytes() == expected.tobytes()


PRODUCT_CHUNKS = {
    "nothing": lambda: chunk_of(0, torch.float32),
    "one element": lambda: chunk_of(1, torch.bfloat16),
    "no whole row": lambda: chunk_of(products.LANES + 3, torch.float16),
    "no whole group": lambda: chunk_of(products.ROWS * products.LANES - 1, torch.float32),
    "five groups": lambda: chunk_of(5 * products.ROWS * products.LANES, torch.bfloat16),
    "three blocks": lambda: chunk_of(2 * products.BLOCK + 2000, torch.bfloat16),
    "float64": lambda: chunk_of(products.BLOCK + 1, torch.float64),
    "mixed": lambda: chunk_of(3000, torch.bfloat16, other=torch.float32),
    "one task": lambda: chunk_of(3000, torch.float32, num_tasks=1),
    "two tasks": lambda: chunk_of(3000, torch.float32, num_tasks=2),
    "four tasks": lambda: chunk_of(3000, torch.bfloat16, num_tasks=4),
    "five tasks": lambda: chunk_of(3000, torch.bfloat16, num_tasks=5),
    "six tasks": lambda: chunk_of(3000, torch.bfloat16, num_tasks=6),
    "eight tasks": lambda: chunk_of(3000, torch.float32, num_tasks=8),
    "eleven tasks": lambda: chunk_of(3000, torch.bfloat16, num_tasks=11),
    "task vectors": lambda: RawChunk.of_vectors(chunk_of(3000, torch.float32).task_vectors()),
    "task vectors and base": lambda: with_base_apart(chunk_of(3000, torch.float32)),
}


def with_base_apart(chunk):
    base, *_ = chunk.vectors()
    return RawChunk.of_vectors(chunk.task_vectors(), base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", PRODUCT_CHUNKS)
def test_every_backend_forms_the_same_products(chunk, backend):
    chunk = PRODUCT_CHUNKS[chunk]()
    found, expected = (one.products(chunk) for one in (BACKENDS[backend], REFERENCE))
    num_vectors = 1 + num_tasks_of(chunk)
    assert found.shape == (products.num_pairs(num_vectors), math.ceil(chunk.num_elements / products.BLOCK))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("chunk", PRODUCT_CHUNKS)
def test_products_of_task_vectors_alone_are_those_beside_the_base_model(chunk, backend):
    chunk, one = PRODUCT_CHUNKS[chunk](), {**BACKENDS, "reference": REFERENCE}[backend]
    found, expected = (one.products(chunk, with_base=with_base) for with_base in (False, True))
    assert found.tobytes() == expected[1 + num_tasks_of(chunk) :].tobytes()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_products_are_added_in_the_order_that_is_written_down(backend):
    chunk = chunk_of(products.BLOCK + 5000, torch.float32, num_tasks=1)
    base, moved = ([*map(float, row)] for row in chunk.vectors())
    expected = [[added_in_order(one, other)] for one, other in ((base, base), (base, moved), (moved, moved))]
    found = {**BACKENDS, "reference": REFERENCE}[backend].products(chunk)
    assert found.tolist() == [sums for (sums,) in expected]
    whole = products.total([found], 2)
    exact = math.fsum(one * other for one, other in zip(base, moved, strict=True))
    assert whole[0, 1] == whole[1, 0] == pytest.approx(exact, rel=1e-12)


def added_in_order(one, other):
    """Sums of products as `kernels.products` describes them: rows, then groups and lanes by halves."""
    sums = []
    for first in range(0, len(one), products.BLOCK):
        terms = [
            a * b for a, b in zip(*(row[first : first + products.BLOCK] for row in (one, other)), strict=True)
        ]
        terms += [0.0] * (products.BLOCK - len(terms))
        left = []
        for start in range(products.GROUPS * products.LANES):
            group, lane = divmod(start, products.LANES)
            own = terms[group * products.ROWS * products.LANES + lane :: products.LANES][: products.ROWS]
            left.append(functools.reduce(operator.add, own, 0.0))
        while len(left) > 1:
            left = [a + b for a, b in zip(left[: len(left) // 2], left[len(left) // 2 :], strict=True)]
        sums.append(left[0])
    return sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 15, cache.BLOCK, 3 * cache.BLOCK + 5])
@pytest.mark.parametrize("edges", [[], [1], [1 << 40, 1 << 63, (1 << 63) + 5], [1 << 52, 1 << 52]])
def test_every_backend_mixes_alike(edges, count, backend):
    call = 123_456, count, GENERATOR, np.array(edges, np.uint64), np.arange(len(edges) + 1, dtype=np.uint8)
    assert BACKENDS[backend].mix(*call).tolist() == REFERENCE.mix(*call).tolist()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("num_tasks", [11, 12])
def test_a_key_on_an_edge_is_of_the_part_above_it(num_tasks, backend):
    """A task more than there are parts is never drawn."""
    keys = GENERATOR.keys(np.arange(100), stream=0).view(np.uint64)
    order = np.argsort(keys)
    edges = keys[order[9::10]]
    tasks = np.arange(num_tasks, dtype=np.uint8)
    found = {**BACKENDS, "reference": REFERENCE}[backend].mix(0, 100, GENERATOR, edges, tasks)
    assert found[order].tolist() == ((np.arange(100) + 1) // 10).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 15, cache.BLOCK + 5])
@pytest.mark.parametrize("num_pairs", [1, 4, 5, 9])
@pytest.mark.parametrize("most", [0, 1 << 31, (1 << 32) - 1])
def test_every_backend_drops_alike(most, num_pairs, count, backend):
    bounds = np.resize(np.array([most, 1 << 31, most, 7], np.uint32), 2 * num_pairs)
    call = 123_456, count, GENERATOR, range(40, 40 + num_pairs), bounds
    assert BACKENDS[backend].drop(*call).tolist() == REFERENCE.drop(*call).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length"), [(0, 3), (1, 1), (5, 1), (3, 7), (2, cache.BLOCK + 5), (40, 64)])
def test_every_backend_keeps_by_rank_alike(rows, length, dtype, backend):
    chunk = chunk_of(rows * length, dtype, num_tasks=5)
    table = draws.rank_table(length, (0.1, 0.5, 0.5, 0.9, 1.0), (0.05, 0.0, 0.5, 0.2, 0.1), is_rescaled=True)
    call = 7 * length, chunk, GENERATOR, draws.streams_of(5), RankTable(*table)
    found, expected = (one.factors_by_rank(*call) for one in (BACKENDS[backend], REFERENCE))
    assert found.shape == (5, rows * length)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_every_backend_scores_alike(scale, dtype, backend):
    chunk = chunk_of(cache.BLOCK + 7, dtype, num_tasks=4)
    vectors = scale * chunk.task_vectors()
    numbers = np.array([[0.0, 0.01, 0.2, 0.0], [0.3, 0.02, 0.2, 0.4], [1.5, 0.0, 0.5, 1.0]], np.float32)
    numbers[:2] *= np.float32(scale)
    for one in (chunk, RawChunk.of_vectors(vectors)):
        found, expected = (backend.scores(one, numbers) for backend in (BACKENDS[backend], REFERENCE))
        assert found.tobytes() == expected.tobytes()
        assert (found >= 0).all() and not found[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 15, spreads.BLOCK, 2 * spreads.BLOCK + 21])
def test_every_backend_finds_the_same_spreads_and_sums_of_squares(length, dtype, backend):
    chunk, active = chunk_of(length, dtype, num_tasks=4), np.array([0, 2, 3])
    found = []
    for one in (BACKENDS[backend], REFERENCE):
        spread, sums = np.empty(length, np.float32), np.empty((4, -(-length // spreads.BLOCK)))
        one.spreads(chunk, active, spread)
        one.square_sums(chunk, spread, np.float32(0.05), sums)
        found.append((spread.tobytes(), sums.tobytes()))
    assert found[0] == found[1]


CHUNKS = {
    "bfloat16": lambda: chunk_of(3 * cache.BLOCK + 5, torch.bfloat16),
    "float64": lambda: chunk_of(1000, torch.float64),
    "mixed": lambda: chunk_of(1000, torch.bfloat16, other=torch.float32),
    "eleven tasks": lambda: chunk_of(1000, torch.float32, num_tasks=11),
    "forty tasks": lambda: chunk_of(500, torch.float32, num_tasks=40),
    "task vectors": lambda: RawChunk.of_vectors(chunk_of(1000, torch.float32).task_vectors()[:, 3:]),
    "one element": lambda: chunk_of(1, torch.float32),
}


def num_tasks_of(chunk):
    return len(chunk.values) - chunk.has_base


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_backend_ranks_alike(chunk, backend):
    chunk = CHUNKS[chunk]()
    num_tasks, size = num_tasks_of(chunk), chunk.num_elements
    for wanted in (np.ones(num_tasks, np.uint8), np.arange(num_tasks, dtype=np.uint8) % 2):
        found = []
        for one in (BACKENDS[backend], REFERENCE):
            owner, codes = np.empty(size, np.uint8), np.empty(size, "u8" if num_tasks > 32 else "u4")
            one.rank(chunk, wanted, owner, codes)
            found.append((owner.tolist(), codes.tolist()))
        assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 15, 3 * cache.BLOCK + 5])
@pytest.mark.parametrize("codes_dtype", ["u1", "u4", "u8"])
@pytest.mark.parametrize(("low", "high"), [(-(2**63), 2**63 - 1), (-(2**62), 2**61), (2**62, -(2**62))])
def test_every_backend_draws_counts_and_renames_alike(low, high, codes_dtype, size, backend):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, size).astype(codes_dtype)
    before = rng.choice(np.array([0, 7, 64, 254], np.uint8), size)
    draw = Draw(np.uint8(7), 0b101101, np.uint8(64), *GENERATOR.constants(3, 100), low, high)
    names = rng.integers(0, 256, 256).astype(np.uint8)
    found = []
    for one in (BACKENDS[backend], REFERENCE):
        owner = before.copy()
        window = one.draw(owner, codes, draw, room=3)
        count = one.count(owner, 7)
        drawn = owner.tolist()
        parted = one.part(owner, codes, 64, 0b1001, 252), owner.tolist()
        one.rename(owner, names)
        found.append((window.tolist(), drawn, count, parted, owner.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_backend_counts_magnitudes_alike(chunk, backend):
    """Bounds that are equal, that many elements equal, and that nothing lies between."""
    chunk = CHUNKS[chunk]()
    num_tasks = num_tasks_of(chunk)
    bits = np.sort(np.abs(chunk.task_vectors()), axis=1).view(np.int32)
    bounds = []
    for row in bits:
        low, high = int(row[len(row) // 4]), int(row[-1 - len(row) // 4])
        shift = max(0, (high - low).bit_length() - 8)
        bounds += [(low, high, shift, low, high), (0, 0, 0, 1, 0)]
    num_bins = [((high - low) >> shift) + 1 for low, high, shift, *_ in bounds]
    edges = np.cumsum([0, *num_bins])
    found = []
    for one in (BACKENDS[backend], REFERENCE):
        histograms = Histograms(
            2, np.array(bounds, np.int32), edges, np.zeros(edges[-1], np.int64),
            *np.zeros((2, edges[-1]), np.int32), np.zeros((2 * num_tasks, 3), np.int64),
        )  # fmt: skip
        assert not one.histogram(chunk, histograms)
        found.append([values.tolist() for values in histograms[3:]])
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_backend_looks_alike(chunk, width, backend):
    """Winners at prices in a box, marks of a class, and elements near a tie."""
    chunk = CHUNKS[chunk]()
    active, scale = np.arange(0, num_tasks_of(chunk), 2), 2.0**30
    prices, widths = scale * 0.01 * np.arange(len(active)), np.full(len(active), width * scale)
    box = Box(prices, widths, widths)
    none = Contest(active, scale, box, Classes.none(len(active)))
    values = np.abs(chunk.task_vectors()[active])
    _, _, alike = compare(values, none.as_arrays())
    code = np.unique(alike.codes[alike.codes != 0])[:1]
    known = Classes(code, alike.distances[:, [alike.codes.tolist().index(one) for one in code]])
    contest, found = Contest(active, scale, box, known).as_arrays(), []
    for one in (BACKENDS[backend], REFERENCE):
        owner = np.empty(chunk.num_elements, np.uint8)
        counts, largest, kept = one.look([(0, chunk)], contest, owner)
        places, kept_values = kept.take()
        found.append((owner.tolist(), counts.tolist(), largest, places.tolist(), kept_values.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_surveys_notice_values_that_are_not_finite(backend):
    one, seen = {**BACKENDS, "reference": REFERENCE}[backend], []
    chunk = chunk_of(5000, torch.float32)
    chunk.checkpoints[1][4321] = torch.nan
    chunk.checked_by = lambda probe, chunk: seen.append(math.isfinite(probe))
    one.rank(chunk, np.ones(3, np.uint8), np.empty(5000, np.uint8), np.empty(5000, np.uint8))
    bounds = np.array([(1, 2, 0, 1, 2)] * 3, np.int32)
    arrays = (
        np.arange(0, 7, 2),
        np.zeros(6, np.int64),
        *np.zeros((2, 6), np.int32),
        np.zeros((3, 3), np.int64),
    )
    one.histogram(chunk, Histograms(1, bounds, *arrays))
    contest = Contest(np.arange(3), 1.0, Box.everywhere(np.zeros(3)), Classes.none(3)).as_arrays()
    one.look([(0, chunk)], contest, np.empty(5000, np.uint8))
    one.products(chunk)
    assert seen == [False] * 4


def test_merging_by_the_reference_is_its_steps():
    chunk = chunk_of(100, torch.float32)
    rows = ops.task_vectors(chunk.base, chunk.checkpoints)
    winners = ops.largest_magnitude(rows)
    found = REFERENCE.merge(ops.LARGEST, chunk, Inputs(), "F32", 0.5)
    assert found.counts.tolist() == torch.bincount(winners, minlength=3).tolist()
    update = ops.select_rows(rows, winners)
    assert found.values.tensor.equal(reference.apply_update(chunk.base, update, 0.5, torch.float32))


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(
    ("num_elements", "expected"),
    [
        (dispatch.LOAD_ABOVE_ELEMENTS - 1, (Reference, Reference)),
        (dispatch.LOAD_ABOVE_ELEMENTS, (Reference, Compiled)),
        (dispatch.COMPILE_ABOVE_ELEMENTS - 1, (Reference, Compiled)),
        (dispatch.COMPILE_ABOVE_ELEMENTS, (Compiled, Compiled)),
    ],
)
def test_merges_wait_for_a_compiler_where_it_pays(num_elements, expected, is_kept, monkeypatch):
    monkeypatch.setattr(Compiled, "is_kept", lambda: is_kept)
    assert type(choose_backend(num_elements)) is expected[is_kept]


def test_compiled_loops_are_found_again():
    Compiled().merge(ops.LARGEST, chunk_of(10, torch.float32), Inputs(), "F32", 0.3)
    assert Compiled.is_kept()


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
