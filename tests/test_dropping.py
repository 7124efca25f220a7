"""DARE: which elements are kept, as drawn by element and task, and what becomes of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from hub_magmax import methods
from hub_magmax.kernels import ops
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.tensors import merge_tensors
from hub_magmax.methods import draws
from hub_magmax.methods.chunks import ArrayChunks
from tests import oracles

SETTINGS = settings(derandomize=True, deadline=None)
GENERATOR = CounterGenerator(seed=3, name="weight")
DENSITIES = st.floats(0, 1, exclude_min=True)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def masks(start: int, count: int, num_tasks: int, density: float) -> np.ndarray:
    """What is kept, a row per task."""
    found = draws.draw_kept(start, count, (density,) * num_tasks, GENERATOR, Reference())
    return np.unpackbits(found, axis=1, bitorder="little").T[:num_tasks].astype(bool)


@SETTINGS
@given(st.integers(0, 2**40), st.integers(1, 19), DENSITIES)
def test_what_is_kept_is_what_the_documentation_says(start, num_tasks, density):
    found = masks(start, 5, num_tasks, density)

    assert found.tolist() == [
        [oracles.is_kept(density, 3, "weight", task, start + i) for i in range(5)]
        for task in range(num_tasks)
    ]


def test_draws_of_a_task_do_not_depend_on_how_many_tasks_there_are():
    whole = masks(0, 1000, 19, 0.4)

    for num_tasks in range(1, 19):
        assert np.array_equal(masks(0, 1000, num_tasks, 0.4), whole[:num_tasks])


def test_a_higher_density_keeps_what_a_lower_one_keeps():
    found = [masks(0, 1000, 3, density) for density in (0.01, 0.3, 0.31, 0.99, 1.0)]

    assert all((more | less == more).all() for less, more in pairwise(found))
    assert found[-1].all()


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9])
def test_each_task_keeps_its_share_and_tasks_keep_independently(density):
    count = 60_000
    kept = masks(0, count, 9, density)

    for task in kept:
        assert stats.binomtest(int(task.sum()), count, density).pvalue > 1e-4
    for one in range(9):
        for other in range(one):
            both = int((kept[one] & kept[other]).sum())
            assert stats.binomtest(both, count, density**2).pvalue > 1e-4


@pytest.mark.parametrize("density", [2.0**-40, 2.0**-32, 0.1, 1 - 2.0**-40, 1.0])
def test_density_is_rounded_up_to_the_resolution_of_the_draws(density):
    found = draws.probability(density)

    assert density <= found < density + 2.0**-32 and found <= 1
    assert math.ldexp(found, 32).is_integer()


def test_sums_and_means_by_hand():
    # The first task keeps elements 0 and 1, the second one 0 and 2, the third one 1 and 2.
    kept = torch.tensor([[0b011], [0b101], [0b110]], dtype=torch.uint8)
    rows = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0], [1.0, -7.0, -2.0]])
    weights = torch.tensor([0.5, 0.25, 0.25])

    total = ops.dropped_sum(rows, kept, 2 * weights)
    mean = ops.dropped_ties(rows, kept, weights / 2, weights)

    # 1 - 4/2; 2 - 7/2; 6/2 - 2/2. The mean is that of what has the same sign, twice as large.
    assert total.tolist() == [-1.0, -1.5, 2.0]
    assert mean.tolist() == [-8.0, -14.0, 12.0]


@SETTINGS
@given(
    st.sampled_from(["dare", "dare_ties", "breadcrumbs"]),
    st.integers(1, 10),
    st.integers(0, 60),
    st.integers(0, 10**6),
    DENSITIES,
)
def test_chunks_of_any_size_give_the_same_bits(method, num_tasks, num_elements, seed, density):
    vectors = torch.randn(num_tasks, num_elements, generator=torch.Generator().manual_seed(seed))
    found = methods.get_method(method)
    options = methods.check_options(found, {"density": density})

    def merged(chunk_elements: int) -> Tensor:
        chunks = ArrayChunks(vectors, chunk_elements)
        weights = (1 / num_tasks,) * num_tasks
        rule = found.rule(
            chunks, shape=(num_elements,), preference=weights, generator=GENERATOR, options=options
        )
        parts = [rule.op(chunk, rule.inputs(start, chunk.shape[1])) for start, chunk in chunks]
        return torch.cat([torch.empty(0), *parts])

    assert merged(1).equal(merged(4096)) and merged(7).equal(merged(4096))


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_the_mean_over_seeds_is_the_plain_sum(density):
    vectors, weights, num_seeds = normal(3, 200), (0.5, 0.3, 0.2), 400
    found = torch.stack([
        merge_tensors(vectors, preference=weights, method="dare", seed=seed, density=density)
        for seed in range(num_seeds)
    ])  # fmt: skip
    multipliers = 3 * torch.tensor(weights)[:, None]

    expected = merge_tensors(vectors, preference=weights, method="task_arithmetic")
    # The variance of an element: (1 / density - 1) times the sum of the squares of what is added.
    deviation = ((1 / density - 1) * (multipliers * vectors).square().sum(dim=0) / num_seeds).sqrt()

    scores = (found.mean(dim=0) - expected) / deviation
    assert scores.abs().max() < 4.5
    assert stats.kstest(scores.numpy(), "norm").pvalue > 1e-3


def test_a_dropped_element_is_zero_and_a_kept_one_is_divided_by_the_density():
    vector = normal(1, 500)
    for method in ("dare", "dare_ties"):
        found = merge_tensors(vector, method=method, density=0.25, seed=3, name="weight")
        assert found.equal(torch.where(torch.from_numpy(masks(0, 500, 1, 0.25)[0]), 4 * vector[0], 0.0))
