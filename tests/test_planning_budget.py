"""Memory that plans state: by hand, under a limit, and measured."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.execution import merge
from hub_magmax.methods import merge_method
from hub_magmax.pipeline import plan
from hub_magmax.planning.budget import (
    CHUNK_ELEMENTS,
    RUNTIME_BYTES,
    Budget,
    budget_of,
    memory_bytes,
    peak_memory_bytes,
)
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.registry import METHODS
from tests.families import accepted, write_checkpoint, write_recipe
from tests.test_planning_layout import BASE, planned


def large(**output):
    """A plan of two tensors of 2^20 elements, whose memory can be computed by hand."""
    made = planned({"a": BASE, "b": BASE})
    job = next(job for job in made.jobs if job.merged)
    jobs = tuple(replace(job, name=name, shape=(2**20,), num_elements=2**20) for name in ("one", "two"))
    recipe = updated(made.recipe, {"output": made.recipe.to_dict()["output"] | output})
    return replace(made, recipe=recipe, shards=(replace(made.shards[0], jobs=jobs),))


def test_memory_is_that_of_chunks_and_of_what_is_kept_of_the_largest_tensors():
    made = large()
    # Stored, task vectors, merged and temporaries, undecided and their places; two tasks.
    per_chunk_element = 4 * 3 + 4 * 2 + 24 + (4 * 3 + 8)
    one = RUNTIME_BYTES + per_chunk_element * CHUNK_ELEMENTS + 6 * 2**20
    assert memory_bytes(made, budget_of(made, 1)) == peak_memory_bytes(made) == one
    assert memory_bytes(made, budget_of(made, 2)) == 2 * one - RUNTIME_BYTES
    assert memory_bytes(made, budget_of(made, 3)) == memory_bytes(
        made, budget_of(made, 2)
    )  # there are two tensors


def test_memory_of_a_whole_tensor_counts_what_its_method_keeps(monkeypatch):
    def planned_with(held_bytes):
        @merge_method("spectral", source="test", held_bytes=held_bytes)
        def spectral(task_vectors: Tensor) -> Tensor:
            """Take the sum."""
            return task_vectors.sum(0)

        point = SimpleNamespace(load=lambda: spectral)
        monkeypatch.setitem(vars(METHODS), "plugins", {"spectral": point})
        made = large()
        return replace(made, lock=replace(made.lock, method={"name": "spectral", "scaling": 1.0}))

    assert peak_memory_bytes(planned_with(20)) == peak_memory_bytes(planned_with(0)) + 20 * 2**20


def test_memory_does_not_grow_with_what_is_kept_in_files():
    made = large()
    of_a_billion = replace(made.jobs[0], num_elements=10**9)
    made = replace(made, shards=(replace(made.shards[0], jobs=(of_a_billion,)),))
    assert peak_memory_bytes(made) < 1.5e9
    average = replace(made, lock=replace(made.lock, method={"name": "average", "scaling": 1.0}))
    assert peak_memory_bytes(average) < 0.4e9


def test_scope_model_keeps_what_one_tensor_of_all_elements_would():
    made = large()
    method = {**made.lock.method, "scope": "model"}
    found = replace(made, lock=replace(made.lock, method=method))
    undecided = (4 * 3 + 8) * CHUNK_ELEMENTS  # no chunk is merged while the model is surveyed
    assert peak_memory_bytes(found) - peak_memory_bytes(made) == 6 * 2**20 - undecided


def test_a_limit_makes_chunks_smaller_first_and_then_threads_fewer():
    whole = memory_bytes(large(), budget_of(large(), 2))
    assert budget_of(large(memory=whole), 2) == budget_of(large(), 2)
    assert budget_of(large(memory=whole - 1), 2) == Budget(2, CHUNK_ELEMENTS // 2)
    less = RUNTIME_BYTES + 2 * 6 * 2**20  # what two threads keep of their tensors, and no room for chunks
    assert budget_of(large(memory=less), 2).num_threads == 1
    for limit in range(whole, RUNTIME_BYTES + 6 * 2**20 + 10**6, -(10**6)):
        made = large(memory=limit)
        assert memory_bytes(made, budget_of(made, 2)) <= limit


def test_a_limit_that_cannot_be_kept_is_refused_when_planning(family):
    with pytest.raises(RecipeError, match=r"output\.memory: .* needs about 350\.0 MB .*found 100\.0 MB"):
        plan(load_recipe(write_recipe(family, output={"path": "merged", "memory": "100MB"})))


#: That of large merges, whose memory matters.
FAST = choose_backend(10**9)
AVERAGE, MAGMAX, TIES, BREADCRUMBS = ({"name": name} for name in ("average", "magmax", "ties", "breadcrumbs"))
DARE, MIX, TUNABLE = ({"name": name} for name in ("dare", "random_mix", "tunable_magmax"))
TOP_N, MODEL = {**TUNABLE, "selection": "top-n"}, {"scope": "model"}


@pytest.mark.parametrize(
    ("method", "backend", "chunk_elements", "least"),
    [
        (AVERAGE, FAST, CHUNK_ELEMENTS, 0.6),
        (MAGMAX, FAST, CHUNK_ELEMENTS, 0.6),
        (DARE, FAST, CHUNK_ELEMENTS, 0.4),
        (DARE, Reference(), CHUNK_ELEMENTS, 0.6),
        (DARE, Reference(), 2**16, 0.6),
        (MIX, Reference(), CHUNK_ELEMENTS, 0.6),
        (TUNABLE, FAST, CHUNK_ELEMENTS, 0.2),
        (TOP_N, FAST, CHUNK_ELEMENTS, 0.6),
        (TOP_N, FAST, 2**16, 0.3),
        # Few elements are undecided where few tie, and few are counted; plans state the most there can be.
        (TIES, FAST, CHUNK_ELEMENTS, 0.1),
        (TIES | MODEL, FAST, 2**16, 0.2),
        (BREADCRUMBS, FAST, CHUNK_ELEMENTS, 0.1),
        (BREADCRUMBS | MODEL, FAST, 2**16, 0.2),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value)[:9],
)
def test_a_merge_allocates_what_its_plan_states(
    checkpoints, tmp_path, method, backend, chunk_elements, least
):
    recipe = write_recipe(checkpoints, names=("a", "b", "c"), method=method)
    made = accepted(plan(load_recipe(recipe)))
    budget = replace(budget_of(made, 1), chunk_elements=chunk_elements)
    options = {"backend": backend, "chunk_elements": chunk_elements}
    merge(made, tmp_path / "first", **options)  # what is imported and compiled once is not the merge's
    tracemalloc.start()
    try:
        merge(made, tmp_path / "second", **options)
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stated = memory_bytes(made, budget) - RUNTIME_BYTES
    assert least * stated <= allocated <= stated


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    for number, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(number)
        write_checkpoint(folder / name, {"weight": torch.randn(2**22, generator=generator)})
    return folder
