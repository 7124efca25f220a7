import math
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from hub_magmax.kernels import competition, ops, reference
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.structures import Bits, Histograms
from hub_magmax.methods import draws, thresholds
from hub_magmax.methods.chunks import ArrayChunks
from tests import oracles

SETTINGS = settings(derandomize=True, deadline=None)
GENERATOR = CounterGenerator(seed=0, name="weight")

# Bits of the mantissa with the leading one, and the exponent of the smallest normal number.
FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(values: Tensor) -> list[int]:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).tolist()


def tied(num_tasks: int, num_elements: int, seed: int) -> Tensor:
    """Small whole numbers and zeros, as ties are common in 16-bit checkpoints."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.integers(-4, 5, (num_tasks, num_elements)), dtype=torch.float32)


# Task vectors and the update


def test_task_vectors_by_hand():
    base = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    first = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    second = torch.tensor([0.0, 3.0], dtype=torch.float16)

    found = ops.task_vectors(base, [first, second])

    assert found.tolist() == [[0.5, 0.0], [-1.0, 5.0]]
    assert found.dtype == torch.float32


def test_task_vectors_of_16_bit_numbers_are_differences_in_float32():
    # 256 − 1/256 has 17 bits: neither 16-bit format could hold it.
    found = ops.task_vectors(torch.tensor([2.0**-8]).bfloat16(), [torch.tensor([256.0]).bfloat16()])

    assert found.item() == 256 - 2.0**-8


def test_task_vectors_of_float64_are_rounded_after_the_difference():
    base = torch.tensor([1.0], dtype=torch.float64)
    checkpoint = torch.tensor([1 + 2.0**-40], dtype=torch.float64)

    assert ops.task_vectors(base, [checkpoint, base]).tolist() == [[2.0**-40], [0.0]]
    assert ops.task_vectors(base.float(), [checkpoint]).item() == 2.0**-40


def test_task_vectors_of_a_checkpoint_in_eight_bits():
    base = torch.tensor([1.0, 2.0])

    found = ops.task_vectors(base, [torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)])

    assert found.tolist() == [[0.5, -4.0]]


@pytest.mark.parametrize("output", FORMATS, ids=str)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_an_update_is_computed_wide_and_rounded_once(stored, output):
    wide = FORMATS[torch.float64 if torch.float64 in (stored, output) else torch.float32]
    base, merged, scaling = normal(200, dtype=torch.float64).to(stored), normal(200, seed=1), 0.3
    factor = oracles.nearest(Fraction(scaling), *wide)

    found = reference.apply_update(base, merged, scaling, output)

    for start, change, result in zip(base.tolist(), merged.tolist(), found.tolist(), strict=True):
        update = oracles.nearest(factor * Fraction(change), *wide)
        total = oracles.nearest(Fraction(start) + update, *wide)
        assert result == oracles.nearest(total, *FORMATS[output])
    assert found.dtype == output


@pytest.mark.parametrize("output", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_near_tie_in_float64_is_not_rounded_twice(output, sign):
    step = 2.0 ** (1 - FORMATS[output][0])
    near_ties = [1 + step / 2 + 2.0**-40, 1 + 3 * step / 2 - 2.0**-40, 1 + step / 2, 1 + 3 * step / 2]
    base = sign * torch.tensor(near_ties, dtype=torch.float64)

    found = reference.apply_update(base, torch.zeros(4), 1.0, output)

    assert (sign * found.double()).tolist() == [1 + step, 1 + step, 1, 1 + 2 * step]


def test_an_update_of_float64_that_16_bits_cannot_hold_overflows_as_a_cast_does():
    base = torch.tensor([1e300, -1e300, 1e-300, 65519.999], dtype=torch.float64)

    found = reference.apply_update(base, torch.zeros(4), 1.0, torch.float16)

    assert found.tolist() == [math.inf, -math.inf, 0.0, 65504.0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_where_the_update_is_zero_the_base_model_keeps_its_bits(dtype):
    base = torch.tensor([-0.0, 0.0, 1e-30, -3.0, -0.0]).to(dtype)
    merged = torch.tensor([0.0, -0.0, 0.0, -0.0, -1e-45])

    found = reference.apply_update(base, merged, 0.5, dtype)

    if dtype == torch.float64:
        base[-1] = -0.5 * merged[-1].double().abs()
    assert bits(found) == bits(base)


def test_a_scaling_of_zero_returns_the_base_model():
    base = normal(1000).bfloat16()

    assert bits(reference.apply_update(base, normal(1000, seed=1), 0.0, torch.bfloat16)) == bits(base)


# Sums


@SETTINGS
@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 10**6))
def test_weighted_sums_are_those_of_separate_products_and_sums(num_tasks, num_elements, seed):
    task_vectors = normal(num_tasks, num_elements, seed=seed)
    weights = np.random.default_rng(seed).dirichlet(np.ones(num_tasks)).tolist()

    found = ops.weighted_sum(task_vectors, weights)

    assert (found.numpy() == oracles.weighted_sum(task_vectors.numpy(), weights)).all()


def test_a_one_hot_sum_returns_the_task_vector_bit_for_bit():
    task_vectors = normal(3, 100)
    task_vectors[1, :4] = torch.tensor([-0.0, 0.0, 1e-45, -3e38])

    assert bits(ops.weighted_sum(task_vectors, [0.0, 1.0, 0.0])) == bits(task_vectors[1])


def test_a_weight_of_zero_keeps_even_infinities_out():
    found = ops.weighted_sum(torch.tensor([[math.inf], [2.0]]), [0.0, 0.5])

    assert found.item() == 1.0


def test_a_sum_without_weights_is_zero():
    assert ops.weighted_sum(normal(2, 3), [0.0, 0.0]).tolist() == [0.0] * 3


def test_a_sum_keeps_the_shape_and_its_argument():
    task_vectors = normal(2, 3, 4)
    before = task_vectors.clone()

    assert ops.weighted_sum(task_vectors, [0.25, 0.75]).shape == (3, 4)
    assert torch.equal(task_vectors, before)


def test_functions_of_competition_are_as_exact_as_float64_is():
    exponents = -torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 300
    found = competition.exponential(exponents)
    assert ((found - exponents.exp()) / exponents.exp()).abs().max() < 1e-15
    for scale in (1e-300, 1e-9, 0.1, 1.0, 30.0):
        values = scale * torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
        assert ((competition.tangent(values) - values.tanh()) / values.tanh()).abs().max() < 1e-15
    assert competition.tangent(torch.zeros(1).double()).item() == 0


# Thresholds


def thresholds_of(chunks: ArrayChunks, rank: int) -> Tensor:
    return thresholds_at(chunks, [rank])[0]


def thresholds_at(chunks: ArrayChunks, ranks: list[int]) -> Tensor:
    of_each = np.tile(np.array(ranks, np.int64)[:, None], chunks.num_tasks)
    return torch.from_numpy(np.ascontiguousarray(thresholds.magnitude_thresholds(chunks, of_each)))


def random_mix(start: int, count: int, weights: list[float]) -> Tensor:
    return torch.from_numpy(draws.random_mix(start, count, weights, GENERATOR, Reference()))


@pytest.fixture(params=["held", "counted"])
def size(request, monkeypatch):
    """Make every tensor a small or a large one."""
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 1 << 20 if request.param == "held" else 0)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("kind", ["normal", "tied", "subnormal", "zeros", "scales"])
def test_thresholds_are_the_magnitudes_of_that_rank(kind):
    task_vectors = {
        "normal": normal(3, 50),
        "tied": tied(3, 50, seed=0),
        "subnormal": tied(3, 50, seed=1) * 1e-44,
        "zeros": torch.zeros(3, 50),
        "scales": normal(3, 50) * 10.0 ** torch.arange(-30.0, 20.0),
    }[kind]

    ranks = (1, 2, 25, 49, 50, 25)
    found = thresholds_at(ArrayChunks(task_vectors, chunk_elements=7), ranks)
    assert found.tolist() == [
        [oracles.threshold(vector, rank) for vector in task_vectors.numpy()] for rank in ranks
    ]


@pytest.mark.usefixtures("size")
def test_a_threshold_that_keeps_nothing_is_infinite():
    assert thresholds_of(ArrayChunks(normal(2, 5)), 0).tolist() == [math.inf] * 2
    assert thresholds_of(ArrayChunks(torch.zeros(2, 0)), 0).tolist() == [math.inf] * 2
    assert thresholds_at(ArrayChunks(normal(2, 5)), []).shape == (0, 2)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("chunk_elements", [1, 7, 4096, 1 << 20])
def test_thresholds_do_not_depend_on_the_chunks(chunk_elements):
    task_vectors = tied(2, 500, seed=3) / 3

    found = thresholds_of(ArrayChunks(task_vectors, chunk_elements), 123)

    assert torch.equal(found, thresholds_of(ArrayChunks(task_vectors), 123))


@pytest.mark.parametrize("keep", [1, 60, 3000, 5900, 6000])
@pytest.mark.parametrize("sampled", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("bins", [1 << 20, 4])
def test_a_sample_that_misleads_costs_passes_and_changes_nothing(keep, sampled, bins, monkeypatch):
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 0)
    monkeypatch.setattr(thresholds, "MOST_BINS", bins)
    task_vectors = normal(2, 6000)
    task_vectors[:, : thresholds.SAMPLE_RUN] *= sampled

    found = thresholds_at(ArrayChunks(task_vectors, 1000), [keep, 300])

    assert torch.equal(found, task_vectors.abs().sort(dim=1, descending=True).values[:, [keep - 1, 299]].T)


def test_large_tensors_are_counted_and_give_what_sorting_gives():
    task_vectors = normal(2, 700_000)

    found = thresholds_of(ArrayChunks(task_vectors), 140_000)

    assert torch.equal(found, task_vectors.abs().sort(dim=1, descending=True).values[:, 139_999])


# TIES


def test_ties_by_hand():
    # Trimmed: 3 and −4 and 5; 3 and −1; nothing. The sum of the first is +, of the second +.
    task_vectors = torch.tensor([[3.0, 3.0, 0.5], [-4.0, -1.0, 0.5], [5.0, 0.5, -0.5]])

    found = ops.ties_merge(task_vectors, torch.tensor([1.0, 1.0, 1.0]), [0.5, 0.25, 0.25])

    assert found.tolist() == [pytest.approx((0.5 * 3 + 0.25 * 5) / 0.75), 3.0, 0.0]


def test_elements_equal_to_the_threshold_are_kept():
    found = ops.ties_merge(torch.tensor([[2.0, -2.0, 1.9]]), torch.tensor([2.0]), [1.0])

    assert found.tolist() == [2.0, -2.0, 0.0]


def test_masses_that_cancel_exactly_elect_nobody():
    found = ops.ties_merge(torch.tensor([[2.0], [-1.0]]), torch.zeros(2), [0.25, 0.5])

    assert found.tolist() == [0.0]


@SETTINGS
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 10**6), st.floats(0, 1))
def test_ties_agrees_with_exact_arithmetic(num_tasks, num_elements, seed, density):
    # Whole numbers and weights in eighths: sums are exact in float32, so signs are too.
    task_vectors = tied(num_tasks, num_elements, seed)
    weights = (np.random.default_rng(seed).multinomial(8, np.ones(num_tasks) / num_tasks) / 8).tolist()
    thresholds = thresholds_of(ArrayChunks(task_vectors), math.ceil(density * num_elements))

    found = ops.ties_merge(task_vectors, thresholds, weights)

    expected = oracles.ties_merge(task_vectors.numpy(), thresholds.tolist(), weights)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_ties_with_a_one_hot_preference_is_that_task_trimmed():
    task_vectors = normal(3, 100)
    thresholds = thresholds_of(ArrayChunks(task_vectors), 20)

    found = ops.ties_merge(task_vectors, thresholds, [0.0, 1.0, 0.0])

    kept = task_vectors[1].abs() >= thresholds[1]
    assert kept.sum() == 20
    assert torch.equal(found, task_vectors[1] * kept)


# Breadcrumbs


def test_magnitudes_that_equal_a_bound_are_in_the_band():
    task_vectors = torch.tensor([[3.0, -3.0, 3.1, 2.0, -1.9], [1.0, 2.0, -4.0, 0.0, 1.0]])

    found = ops.banded_sum(task_vectors, torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0]), [1.0, 0.5])

    assert found.tolist() == [3.5, -3.0, 0.0, 2.0, 0.5]


# Random mix


def test_random_mix_takes_the_task_whose_share_holds_the_draw():
    weights = [0.25, 0.0, 0.5, 0.25]

    found = random_mix(10, 2000, weights)

    draws = GENERATOR.uniform(10, 2000, stream=0).tolist()
    assert found.tolist() == list(oracles.random_mix(draws, weights))
    assert found.dtype == torch.uint8


class FixedDraws(CounterGenerator):
    """Draws 0, ¼, ½ and ¾."""

    def keys(self, indices: np.ndarray, stream: int) -> np.ndarray:
        return (np.arange(4, dtype=np.uint64) << np.uint64(62)).view(np.int64)


def test_a_draw_between_two_shares_belongs_to_the_later_one():
    assert draws.random_mix(0, 4, [0.25, 0.25, 0.5], FixedDraws(0, ""), Reference()).tolist() == [
        0,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.0, 1 / 3, 1 / 3, 0.0, 1 / 3, 0.0], [1 / 49] * 49])
def test_random_mix_takes_each_task_as_often_as_preferred(weights):
    counts = torch.bincount(random_mix(0, 60_000, weights), minlength=len(weights))
    wanted = [task for task, weight in enumerate(weights) if weight]

    assert counts.sum() == counts[wanted].sum() == 60_000
    expected = np.array(weights)[wanted] / sum(weights) * 60_000
    assert stats.chisquare(counts[wanted], expected).pvalue > 1e-3


def test_random_mix_with_a_one_hot_preference_takes_that_task_always():
    for task in range(3):
        weights = [float(t == task) for t in range(3)]
        assert (random_mix(0, 5000, weights) == task).all()


def test_random_mix_does_not_depend_on_the_chunks():
    whole = random_mix(0, 1000, [0.5, 0.5])

    for step in (1, 7, 512):
        parts = [random_mix(start, min(step, 1000 - start), [0.5, 0.5]) for start in range(0, 1000, step)]
        assert torch.equal(torch.cat(parts), whole)


# Chunks


@pytest.mark.parametrize("step", [1, 7, 33, 1024])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_no_element_depends_on_its_place_in_a_chunk(step, stored):
    """A vector body and its scalar tail must round alike."""
    base, checkpoints = normal(2000).to(stored), [normal(2000, seed=t).to(stored) for t in (1, 2, 3)]
    weights, thresholds = [0.1, 0.3, 0.6], torch.tensor([0.5, 0.7, 0.9])

    def merged(part: slice) -> Tensor:
        task_vectors = ops.task_vectors(base[part], [checkpoint[part] for checkpoint in checkpoints])
        found = (
            ops.weighted_sum(task_vectors, weights),
            ops.ties_merge(task_vectors, thresholds, weights),
            ops.banded_sum(task_vectors, thresholds, 2 * thresholds, weights),
        )
        return torch.stack([reference.apply_update(base[part], one, 0.3, stored) for one in found])

    parts = [merged(slice(start, start + step)) for start in range(0, 2000, step)]
    assert torch.equal(torch.cat(parts, dim=1), merged(slice(0, 2000)))


@pytest.mark.parametrize("keep", [1, 1000, 100_000, 299_999])
@pytest.mark.parametrize("decimals", [1, 5])
def test_compiled_loops_find_the_same_thresholds(keep, decimals):
    task_vectors = normal(4, 300_000).round(decimals=decimals)
    slow, fast = (
        thresholds_at(ArrayChunks(task_vectors, 70_000, backend), [keep, 2000])
        for backend in (Reference(), Compiled())
    )
    assert torch.equal(slow, fast)
    assert torch.equal(fast, task_vectors.abs().sort(dim=1, descending=True).values[:, [keep - 1, 1999]].T)


@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
@pytest.mark.parametrize("shares", [(0.35, 0.25, 0.2, 0.2), (0.79, 0.15, 0.05, 0.01), (0, 0.5, 0, 0.5)])
def test_thresholds_at_the_edges_of_classes_of_equals(backend, shares):
    """Magnitudes 0 to 3, so many of each: the last rank of a class, the first of the next, and two beside."""
    rng, size = np.random.default_rng(1), 300_000
    counts = [round(share * size) for share in shares]
    rows = np.repeat([0.0, 1.0, 2.0, 3.0], counts).astype(np.float32) * rng.choice([-1, 1], size)
    task_vectors = torch.from_numpy(np.stack([rng.permutation(rows) for _ in range(4)]).astype(np.float32))
    edges = np.cumsum(counts[::-1])
    ranks = sorted({min(max(1, int(edge) + step), size) for edge in edges for step in (-1, 0, 1, 2)})
    found = thresholds_at(ArrayChunks(task_vectors, 70_001, backend), ranks)
    expected = [3.0 - int(np.searchsorted(edges, rank)) for rank in ranks]
    assert found.tolist() == [[value] * 4 for value in expected]


def test_magnitudes_at_both_bounds_are_counted_apart():
    """Nine elements: zeros that fill up sixteen equal a bound of zero, and do not count."""
    row = np.array([0, -1, 2, -2, 3, 0, 5, 1, -2], np.float32)
    low, high = (int(np.float32(bound).view(np.int32)) for bound in (0, 2))
    bounds = np.array([[low, high, 22, low + 1, high - 1]], np.int32)
    num_bins = ((high - low) >> 22) + 1
    bins, extremes = np.zeros(num_bins, np.int64), np.zeros((2, num_bins), np.int32)
    outside, opened = np.zeros((1, 3), np.int64), np.zeros(9, np.uint8)
    stored = Bits(row.view(np.uint32), 9, np.empty(0, np.uint32))
    histograms = Histograms(1, bounds, np.array([0, num_bins]), bins, *extremes, outside)
    scratch = np.empty(cache.BLOCK + cache.SPARE, np.int64), np.empty(cache.BLOCK, np.uint8)
    met = cache.count_magnitudes(stored, 9, histograms, opened, *scratch)
    assert np.int32(met).view(np.float32) == 5
    assert outside.tolist() == [[2, 3, 2]]  # above 2, at 2, at 0
    assert bins.sum() == 2
    assert opened.tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0]


class ReadChunks(ArrayChunks):
    """Task vectors that count how often they are read; the sample does not count."""

    reads: ClassVar[list[int]] = []

    def map(self, work, **how):
        self.reads.append(1)
        return super().map(work, **how)


@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
def test_tensors_whose_rows_differ_are_read_once(backend):
    rows = normal(2, 600, 4096) * normal(600, 1, seed=5).mul(0.5).exp()
    task_vectors = rows.bfloat16().float().reshape(2, -1)
    chunks = ReadChunks(task_vectors, 1 << 18, backend)
    chunks.reads.clear()

    found = thresholds_at(chunks, [500_000])[0]

    assert len(chunks.reads) == 1
    assert torch.equal(found, task_vectors.abs().sort(dim=1, descending=True).values[:, 499_999])
