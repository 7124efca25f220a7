"""DELLA: which elements are kept by their rank in a row, and what becomes of them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.kernels.row_ranks import RankTable
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import draws
from tests import oracles, oracles_sparse
from tests.families import write_checkpoint
from tests.test_merging import hashes, merged
from tests.test_methods import CASES, multipliers, preferences

VECTORS = torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(0))


def length_of(vectors: torch.Tensor) -> int:
    return math.prod(vectors.shape[2:] or vectors.shape[1:])


@pytest.mark.parametrize("rescale", ["probability", "norm", "none"])
@pytest.mark.parametrize("case", CASES)
def test_della_agrees_with_its_oracle(case, rescale):
    vectors, options = CASES[case], {"density": 0.6, "epsilon": 0.3, "rescale": rescale}
    flat = vectors.reshape(len(vectors), -1).numpy()
    pruned = oracles_sparse.della(flat, length_of(vectors), 0.6, 0.3, rescale)
    no_thresholds = [0.0] * len(vectors)
    for weights in preferences(len(vectors)):
        numbers = multipliers(weights)
        added = [math.fsum(np.array(numbers) * column) for column in pruned.T]
        for method, consensus, expected in (
            ("della", {}, oracles.ties_merge(pruned, no_thresholds, weights)),
            ("della", {"consensus": "sum"}, oracles.ties_sum(pruned, no_thresholds, numbers)),
            ("della_linear", {}, added),
        ):
            if case == "ties and zeros" and method == "della":
                continue  # sums of rescaled elements that nearly cancel have the sign of their roundings
            found = merge_tensors(vectors, preference=weights, method=method, **options, **consensus)
            wanted = torch.tensor(expected, dtype=torch.float64).reshape(vectors.shape[1:])
            tolerance = 1e-6 * float(np.abs(pruned).max()) + 1e-44
            torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=tolerance)


def test_della_by_hand(monkeypatch):
    # Rows of three: of the first, 1, 2 and 3 are kept with .3, .5 and .7; of the second, two are equal and
    # share .4. Draws of .45 keep what is kept more often than that.
    monkeypatch.setattr(Reference, "factors_by_rank", of_draws(0.45))
    vectors = torch.tensor([[[2.0, -1.0, 3.0], [4.0, -4.0, 8.0]]])
    found = merge_tensors(vectors, method="della_linear", density=0.5, epsilon=0.2)
    expected = torch.tensor([[2 / 0.5, 0.0, 3 / 0.7], [0.0, 0.0, 8 / 0.7]])
    torch.testing.assert_close(found, expected)
    # The sums of magnitudes are 6 and 16, of which 5 and 8 are kept: 22 of 13.
    found = merge_tensors(vectors, method="della_linear", density=0.5, epsilon=0.2, rescale="norm")
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 8.0]]) * 22 / 13)


def of_draws(share):
    """Return a backend's method with the same draw for every element."""

    def factors(self, start, chunk, generator, streams, table):
        from hub_magmax.kernels.row_ranks import factors_by_rank

        vectors = torch.from_numpy(chunk.task_vectors())
        drawn = torch.full(vectors.shape, int(share * 2**32))
        numbers = torch.from_numpy(table.most.astype(np.int64)), torch.from_numpy(table.factors)
        return factors_by_rank(vectors, drawn, *numbers).numpy()

    return factors


@pytest.mark.parametrize(
    ("density", "epsilon", "least", "most"),
    [(0.5, 0.2, 0.3, 0.7), (0.9, 0.3, 0.8, 1.0), (0.2, 0.5, 0.0, 0.4), (1.0, 0.5, 1.0, 1.0)],
)
def test_probabilities_of_a_row_have_the_density_as_their_mean(density, epsilon, least, most):
    """A reach that would leave the range from 0 to 1 is shortened on both sides."""
    bounds, factors = draws.rank_table(11, (density,), (epsilon,), is_rescaled=True)
    kept = (bounds[0, ::2].astype(np.float64) + 1) / 2**32
    assert kept.mean() == pytest.approx(density, abs=1e-9)
    assert (kept[0], kept[-1]) == (pytest.approx(least, abs=1e-9), pytest.approx(most, abs=1e-9))
    assert np.allclose(factors[0, ::2] * kept, 1, rtol=1e-6)


def test_large_elements_are_kept_more_often_and_the_share_is_the_density():
    number, ranks = 300, torch.arange(40.0)
    vector = (1 + ranks).repeat(number, 1)[None]
    found = merge_tensors(vector, method="della_linear", density=0.5, epsilon=0.3, rescale="none")
    kept = (found != 0).sum(dim=0)
    for rank in range(40):
        assert stats.binomtest(int(kept[rank]), number, 0.2 + 0.6 * rank / 39).pvalue > 1e-4


def test_without_a_reach_what_dare_keeps_is_kept():
    for density in (0.3, 0.8):
        found = merge_tensors(VECTORS, method="della_linear", density=density, epsilon=0.0, name="w", seed=5)
        expected = merge_tensors(VECTORS, method="dare", density=density, name="w", seed=5)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_mean_over_seeds_is_the_plain_sum():
    num_seeds = 300
    options = {"density": 0.7, "epsilon": 0.2}
    found = torch.stack([
        merge_tensors(VECTORS, method="della_linear", seed=seed, **options) for seed in range(num_seeds)
    ])  # fmt: skip
    ranks = VECTORS.abs().argsort(dim=-1).argsort(dim=-1)
    kept = 0.5 + 0.4 * ranks / 24
    deviation = ((1 / kept - 1) * VECTORS.square()).sum(dim=0).div(num_seeds).sqrt()
    scores = (found.mean(dim=0) - VECTORS.sum(dim=0)) / deviation
    assert scores.abs().max() < 4.5
    assert stats.kstest(scores.flatten().numpy(), "norm").pvalue > 1e-3


def test_norms_of_task_vectors_stay_what_they_were():
    for task in range(3):
        one = VECTORS[task : task + 1]
        found = merge_tensors(one, method="della_linear", density=0.4, epsilon=0.1, rescale="norm")
        assert float(found.abs().sum()) == pytest.approx(float(one.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("length", [1, 5, 16, 75])
def test_sums_of_magnitudes_are_the_same_for_any_rows_at_a_time(length):
    flat, kept = VECTORS.reshape(3, -1)[:, :900].numpy(), (VECTORS.reshape(3, -1)[:, :900] > 0).numpy()
    factors = kept.astype(np.float32)
    flat, factors = flat[:, : 900 // length * length], factors[:, : 900 // length * length]
    chunk = RawChunk.of_vectors(np.ascontiguousarray(flat))
    backends = Reference(), Reference(piece_elements=200), Compiled()
    found = [backend.magnitude_sums(chunk, factors, length) for backend in backends]
    assert len({one.tobytes() for one in found}) == 1
    by_row = np.abs(flat).astype(np.float64).reshape(3, -1, length)
    np.testing.assert_allclose(found[0][0], by_row.sum(axis=-1), rtol=1e-14)
    np.testing.assert_allclose(found[0][1], (by_row * factors.reshape(by_row.shape)).sum(axis=-1), rtol=1e-14)


@pytest.mark.parametrize("rescale", ["probability", "norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chunks_and_backends_change_no_byte(tmp_path, dtype, rescale):
    """Rows are longer and shorter than chunks, and of tensors with one, two and three dimensions."""
    shapes = {"long": (5, 3001), "short": (3000, 4), "cube": (30, 20, 11), "bias": (2500,), "one": ()}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("base", "a", "b", "c"):
        moved = {
            key: value + 0.1 * (name != "base") * torch.randn(value.shape, generator=generator)
            for key, value in base.items()
        }
        write_checkpoint(tmp_path / name, {key: value.to(dtype) for key, value in moved.items()})
    method = {"name": "della", "density": {"a": 0.5, "b": 0.9, "c": 1.0}, "rescale": rescale}
    reports = [
        merged(tmp_path, f"out-{number}", method=method, chunk_elements=size, backend=backend)
        for number, (size, backend) in enumerate(
            [(2**18, Reference()), (1000, Reference()), (1000, Compiled()), (2**18, Compiled())]
        )
    ]
    assert len({tuple(report.shards) for report in reports}) == 1
    assert len({str(hashes(tmp_path / f"out-{number}")) for number in range(4)}) == 1


def row_of(kind: str, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Return a row of bfloat16 whose differences from ones are hard to count in bins."""
    if kind == "far apart":
        return torch.from_numpy(1 + 2.0 ** rng.integers(-7, 120, length)).bfloat16()
    if kind == "near each other":
        return torch.from_numpy(1 + 3 + rng.integers(0, 2, length) * 2.0**-5).bfloat16()
    if kind == "equal":
        return torch.full((length,), 3.0).bfloat16()
    if kind == "zeros":
        return torch.ones(length).bfloat16()
    base = rng.standard_normal(length) * np.exp(rng.standard_normal(length) * 8)
    return torch.from_numpy(base).bfloat16()


@pytest.mark.parametrize("length", [1, 15, 33, 1000])
@pytest.mark.parametrize("kind", ["far apart", "near each other", "equal", "zeros", "any exponent"])
def test_rows_of_any_magnitudes_are_ranked_as_by_the_reference(kind, length):
    """With any exponent, differences have up to 24 bits, and most share a bin with others."""
    rng = np.random.default_rng(length)
    rows = [row_of(kind, 3 * length, rng) for _ in range(3)]
    base = rng.standard_normal(3 * length) * 1e-4 + 1.0 if kind == "any exponent" else np.ones(3 * length)
    if kind == "any exponent":
        base = base * np.exp(rng.standard_normal(3 * length) * 8)
    stored = torch.stack([torch.from_numpy(base).bfloat16(), *rows]).view(torch.int16).numpy().view(np.uint16)
    table = RankTable(*draws.rank_table(length, (0.3, 0.5, 0.9), (0.3, 0.5, 0.1), is_rescaled=True))
    found, expected = (
        backend.factors_by_rank(
            length,
            RawChunk([(0, 3 * length)], lambda: Stored(stored, "BF16")),
            CounterGenerator(3, "w"),
            draws.streams_of(3),
            table,
        )
        for backend in (Compiled(), Reference())
    )
    assert found.tobytes() == expected.tobytes()
