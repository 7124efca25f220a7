"""Sums of magnitudes restored where a method keeps a part of each task vector, as mergekit does it."""

import numpy as np
import pytest
import torch

from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.rescaling import norm_factors
from tests.families import read_merged, write_checkpoint
from tests.test_merging import hashes, merged

VECTORS = torch.randn(3, 40, 25, generator=torch.Generator().manual_seed(0))
NORM = {"density": 0.4, "rescale": "norm"}


def test_rescaled_sums_and_means_by_hand():
    # Of the first task 4 and -3 stay, 7 of 10; of the second 6 and 2, 8 of 9.
    vectors = torch.tensor([[4.0, 1.0, -3.0, 2.0], [-1.0, 2.0, 6.0, 0.0]])
    half = {"density": 0.5, "rescale": "norm"}
    one, other = torch.tensor([4.0, 0, -3, 0]) * 10 / 7, torch.tensor([0.0, 2, 6, 0]) * 9 / 8
    for weights in (0.5, 0.5), (0.75, 0.25):
        first, second = 2 * weights[0] * one, 2 * weights[1] * other
        found = merge_tensors(vectors, method="breadcrumbs", preference=weights, outliers=0, **half)
        torch.testing.assert_close(found, first + second)
        # In the third element the first task gets 30/7 · w, the second one 27/4 · w.
        found = merge_tensors(vectors, method="ties", preference=weights, consensus="sum", **half)
        wins = [second, first][weights[0] > 0.5][2]
        torch.testing.assert_close(found, torch.stack([first[0], second[1], wins, torch.tensor(0.0)]))
        found = merge_tensors(vectors, method="ties", preference=weights, **half)
        wins = [other, one][weights[0] > 0.5][2]  # the mean of one task is its own, rescaled
        torch.testing.assert_close(found, torch.stack([one[0], other[1], wins, torch.tensor(0.0)]))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_sums_of_magnitudes_stay_what_they_were(method):
    for task in range(3):
        one = VECTORS[task : task + 1]
        found = merge_tensors(one, method=method, **NORM)
        assert float(found.abs().sum()) == pytest.approx(float(one.abs().sum()), rel=1e-5)
    assert merge_tensors(VECTORS, method=method, rescale="norm", **WHOLE[method]).equal(
        merge_tensors(VECTORS, method=method, **WHOLE[method])
    )


WHOLE = {
    "ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0},
}


def test_factors_are_the_same_for_any_chunks():
    vectors = np.random.default_rng(0).standard_normal((2, 70_001)).astype(np.float32)
    least, most = np.array([0.5, 0.1], np.float32), np.array([2, np.inf], np.float32)
    found = {
        norm_factors(ArrayChunks(vectors, chunk_elements, backend), least, most).tobytes()
        for chunk_elements in (1, 2**14 + 5, 2**18)
        for backend in (ArrayChunks(vectors).backend, Compiled())
    }
    assert len(found) == 1
    kept = np.where((np.abs(vectors) >= least[:, None]) & (np.abs(vectors) <= most[:, None]), vectors, 0)
    ratios = np.abs(vectors).sum(axis=1, dtype=float) / np.abs(kept).sum(axis=1, dtype=float)
    np.testing.assert_allclose(np.frombuffer(found.pop()), ratios, rtol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chunks_and_backends_change_no_byte(tmp_path, dtype, method, scope):
    """Small tensors are merged one by one, for each has a factor of its own."""
    shapes = {"long": (5, 3001), "large": (300, 150), "bias": (25,), "norm": (25,), "one": ()}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    models = {"base": base}
    for name in "abc":
        models[name] = {
            key: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(dtype)
            for key, value in base.items()
        }
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    how = {"name": method, "density": {"a": 0.5, "b": 0.9, "c": 1.0}, "rescale": "norm", "scope": scope}
    for number, (size, backend) in enumerate(
        [(2**18, Reference()), (1000, Reference()), (1000, Compiled()), (2**18, Compiled())]
    ):
        merged(tmp_path, f"out-{number}", method=how, chunk_elements=size, backend=backend)
    assert len({str(hashes(tmp_path / f"out-{number}")) for number in range(4)}) == 1
    if scope == "tensor" and dtype == torch.float32:
        of_task = {"method": method, "preference": (0.6, 0.3, 0.1), "density": (0.5, 0.9, 1.0)}
        found = read_merged(tmp_path / "out-0")
        scaling = 0.3 if method == "breadcrumbs" else 1.0
        for name, start in base.items():
            vectors = torch.stack([models[task][name] - start for task in "abc"])
            alone = merge_tensors(vectors, rescale="norm", **of_task)
            torch.testing.assert_close(found[name], start + scaling * alone)


def test_factors_of_what_is_zero_or_empty_are_one():
    bounds = np.zeros(2, np.float32), np.full(2, np.inf, np.float32)
    for size in (0, 5):
        assert norm_factors(ArrayChunks(np.zeros((2, size), np.float32)), *bounds).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ({"name": "breadcrumbs", "density": 0.5, "outliers": 0.06, "rescale": "norm"}, "tensor 'weight'"),
        (
            {"name": "breadcrumbs", "density": 0.5, "outliers": 0.06, "rescale": "norm", "scope": "model"},
            "the whole model",
        ),
        ({"name": "della_linear", "density": 0.2, "epsilon": 0.0, "rescale": "norm"}, "tensor 'weight'"),
    ],
    ids=str,
)
def test_a_factor_that_float32_does_not_hold_is_an_error(tmp_path, method, where):
    """One outlier holds all of the sum, and is not kept."""
    base = torch.zeros(20)
    moved = torch.full((20,), 1e-31)
    moved[0] = 1e10
    for name in ("base", *"abc"):
        write_checkpoint(tmp_path / name, {"weight": base if name == "base" else moved})
    for backend in (Reference(), Compiled()):
        with pytest.raises(NonFiniteError, match=f"^{where}: what is kept of task [012] would .* float32"):
            merged(tmp_path, method=method, backend=backend)
