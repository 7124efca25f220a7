"""Many small tensors that are merged together give the bytes that they give one by one."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.golden_cases import ALIKE, METHODS
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator, JoinedGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging import bundles
from hub_magmax.merging.execution import merge
from hub_magmax.methods import get_method
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.selection import algorithm_1, quotas, top_n
from hub_magmax.methods.selection.side_by_side import algorithm_1_side_by_side
from hub_magmax.methods.selection.unique_optima import unique_optima
from hub_magmax.methods.small_tensors import Tensors
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import accepted, write_checkpoint, write_recipe

TASKS = ("a", "b", "c")
SHAPES = {f"expert.{n:02}.weight": (4, 8) for n in range(12)} | {"norm.weight": (7,), "one.weight": (1,)}


def write_many(folder, dtype=torch.float32):
    """Write a family of many small tensors, one large one, and counters; some elements tie, some are zero."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (300, 64), **SHAPES, "last.bias": (5,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("base", *TASKS):
        steps = {key: torch.randint(-3, 4, value.shape, generator=generator) for key, value in base.items()}
        moved = {key: value + steps[key] / 64 * (name != "base") for key, value in base.items()}
        tensors = {key: value.to(dtype) for key, value in moved.items()}
        write_checkpoint(folder / name, tensors | {"position_ids": torch.arange(3)})


#: Methods, by title, that merge small tensors together.
TOGETHER = {
    title: method for title, method in {**METHODS, **ALIKE}.items() if get_method(method["name"]).is_bundled
}


def merged_files(folder, name, **changes):
    recipe = write_recipe(
        folder, names=TASKS, preference={"weights": {"a": 0.5, "b": 0.35, "c": 0.15}}, **changes
    )
    made = accepted(plan(load_recipe(recipe)))
    report = merge(made, folder / name, backend=changes.pop("backend", None))
    return {shard.file: shard for shard in report.shards}


@pytest.mark.parametrize(
    ("title", "dtype"),
    [(title, torch.bfloat16) for title in TOGETHER]
    + [
        ("ties scope=tensor", torch.float32),
        ("dare", torch.float64),
        ("breadcrumbs scope=tensor", torch.float64),
    ],
)
def test_tensors_merged_together_are_those_merged_one_by_one(tmp_path, monkeypatch, title, dtype):
    write_many(tmp_path, dtype)
    changes = {"method": TOGETHER[title], "output": {"path": "m", "shard_size": "1KB"}}
    together = merged_files(tmp_path, "together", **changes)
    monkeypatch.setattr(bundles, "SMALL_ELEMENTS", 0)
    assert merged_files(tmp_path, "one-by-one", **changes) == together


def test_small_neighbours_are_together_and_a_large_one_is_alone(tmp_path):
    write_many(tmp_path)
    made = accepted(plan(load_recipe(write_recipe(tmp_path, names=TASKS))))
    with open_inputs(made.recipe, made.lock) as sources:
        units = [*bundles.bundled(made.jobs, sources, 100, made.values_of)]
    sizes = [
        [job.name for job in unit.jobs] if isinstance(unit, bundles.Bundle) else unit.name for unit in units
    ]
    assert sizes == [
        "position_ids",
        "embed.weight",
        [f"expert.{n:02}.weight" for n in range(3)],
        [f"expert.{n:02}.weight" for n in range(3, 6)],
        [f"expert.{n:02}.weight" for n in range(6, 9)],
        [f"expert.{n:02}.weight" for n in range(9, 12)],
        ["last.bias", "norm.weight", "one.weight"],
    ]


def test_value_that_is_not_finite_is_told_with_tensor_and_element(tmp_path):
    write_many(tmp_path)
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["expert.05.weight"][1, 2] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    for method in ("average", "ties", "dare", "tunable_magmax"):
        with pytest.raises(NonFiniteError, match=r"tensor 'expert\.05\.weight', byte .*element 10 is inf"):
            merged_files(tmp_path, method, method={"name": method})
        assert not (tmp_path / method).exists()


#: Task vectors of six tensors of nine elements, as integers, so that many tie.
def tied(num_tasks, low, high):
    generator = np.random.default_rng(num_tasks)
    return generator.integers(low, high, (num_tasks, 6, 9)).astype(np.float32)


@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
@pytest.mark.parametrize(
    "vectors",
    [tied(1, -2, 3), tied(2, -1, 2), tied(3, -2, 3), tied(3, 0, 1), tied(5, -9, 10), tied(9, -1, 2)],
    ids=lambda vectors: f"{len(vectors)} tasks to {vectors.max():.0f}",
)
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.1, 0.0])
def test_algorithm_1_side_by_side_selects_as_it_does_alone(vectors, ratio, backend):
    raw = np.array([ratio**task for task in range(len(vectors))])
    shares = quotas(tuple(raw / raw.sum()), vectors.shape[2])
    generators = [CounterGenerator(7, f"tensor {number}") for number in range(vectors.shape[1])]
    owner, unaligned = algorithm_1_side_by_side(vectors, shares, generators, backend)
    for number, generator in enumerate(generators):
        alone = algorithm_1(ArrayChunks(vectors[:, number].copy(), backend=backend), shares, generator)
        assert owner[number].tolist() == alone.owner.tolist()
        assert tuple(unaligned[number].tolist()) == alone.num_unaligned


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.05, 0.0])
def test_one_best_selection_is_that_of_top_n(num_tasks, ratio):
    generator = np.random.default_rng(num_tasks)
    vectors = generator.integers(-(2**20), 2**20, (num_tasks, 12, 40)).astype(np.float32) / 2**20
    vectors[:, 0] = np.rint(3 * vectors[:, 0])  # many tie
    raw = np.array([ratio**task for task in range(num_tasks)])
    shares = quotas(tuple(raw / raw.sum()), 40)
    owner, is_settled = unique_optima(vectors, shares)
    assert is_settled[1:].all()
    for number in np.flatnonzero(is_settled):
        keys = CounterGenerator(7, f"tensor {number}")
        alone = top_n(ArrayChunks(vectors[:, number].copy()), shares, keys)
        assert owner[number].tolist() == alone.owner.tolist() and alone.duality_gap == 0


def test_magnitudes_off_the_grid_and_zeros_are_left_to_top_n():
    vectors = np.ones((2, 3, 4), np.float32) * np.float32([[[1, 2, 3, 4]], [[4, 3, 2, 1.5]]])
    vectors[0, 0, 0] = 2.0**-60
    vectors[:, 1] = 0  # every selection is the best one
    assert unique_optima(vectors, (2, 2))[1].tolist() == [False, False, True]


def test_joined_generator_gives_each_tensor_its_own_keys():
    generators = [CounterGenerator(1, name) for name in "xyz"]
    joined = JoinedGenerator.of(generators, [2, 3, 1])
    alone = [
        generator.keys(np.arange(size), 5) for generator, size in zip(generators, (2, 3, 1), strict=True)
    ]
    assert joined.keys(np.arange(6), 5).tolist() == np.concatenate(alone).tolist()
    assert joined.keys(np.array([4, 0]), 5).tolist() == [alone[1][2], alone[0][0]]


def test_tensors_of_one_size_are_taken_together_in_parts_that_stay_in_the_cache():
    sizes = [3, 70_000, 3, 1]
    tensors = Tensors(np.empty((2, 0), np.float32), sizes, [], Reference())
    found = [(size, some.tolist(), elements[:, 0].tolist()) for size, some, elements in tensors.of_one_size()]
    assert found == [(1, [3], [70_006]), (3, [0, 2], [0, 70_003]), (70_000, [1], [3])]
