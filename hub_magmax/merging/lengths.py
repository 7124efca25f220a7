"""Lengths of task vectors, found in one pass over all merged tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.scaled import read_by_merges
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.lazy_imports import inference, num_threads, one_thread
from hub_magmax.merging.chunk_memory import ChunkMemory
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.methods.competing import square_sums
from hub_magmax.planning.budget import CHUNK_ELEMENTS, MAX_THREADS, READ_AHEAD_BYTES
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.norms import BY_TENSOR, Lengths
from hub_magmax.recipe.schema import Recipe


def locked_lengths(recipe: Recipe, lock: Lock, cache: SourceCache | None = None) -> Lengths:
    """Return the lengths of the task vectors of a lock, which need not have its preference yet.

    Every checkpoint is read once, whole.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        NonFiniteError: At a NaN or infinity.
    """
    output = recipe.output.model_copy(update={"format": None, "memory": None})
    recipe = recipe.model_copy(update={"output": output})
    # Methods of two models refuse more; lengths depend on no preference.
    one = {task: float(number == 0) for number, task in enumerate(lock.tasks)}
    lock = replace(lock, preference=replace(lock.preference, weights=one))
    with open_inputs(recipe, lock, cache) as sources:
        return find_lengths(make_plan(recipe, lock, sources), sources)


def find_lengths(plan: Plan, sources: Mapping[str, TensorSource]) -> Lengths:
    """Return the lengths of the task vectors: of each tensor, and of all that are merged together.

    Squares are added in float64 in a fixed order (`kernels.spreads`), and the sums of blocks exactly, so that
    chunks, threads and backends change no bit.

    Args:
        plan: Says which tensors are merged.
        sources: The base model and the tasks, in order.
    """
    assert plan.recipe.norms is not None
    base, *tasks = read_by_merges(sources, None, plan.values_of).values()
    is_remote, memory = plan.num_remote > 0, ChunkMemory()
    backend = choose_backend(sum(job.num_elements for job in plan.merged), plan.recipe.output.device)
    names = [job.tensor for job in plan.merged]
    for source in sources.values():
        source.expect(names, READ_AHEAD_BYTES // len(sources))

    def squares(job: TensorJob) -> list[float]:
        chunks = StoredChunks(
            job.tensor, job.num_elements, base, tuple(tasks), CHUNK_ELEMENTS, None, backend, memory
        )
        with inference():
            found: list[float] = square_sums(chunks).tolist()
            if not all(map(math.isfinite, found)):
                for _, chunk in chunks.stored():
                    chunk.check(math.nan)
        chunks.release(job.num_elements)
        return found

    with one_thread(), ThreadPoolExecutor(1 if is_remote else min(num_threads(), MAX_THREADS)) as pool:
        found = np.array([*pool.map(squares, plan.merged)]).reshape(-1, len(tasks))
    whole = [math.sqrt(math.fsum(column)) for column in found.T.tolist()]
    by_tensor = {name: tuple(np.sqrt(row).tolist()) for name, row in zip(names, found, strict=True)}
    return Lengths(
        plan.recipe.norms,
        dict(zip(plan.lock.tasks, whole, strict=True)),
        by_tensor if plan.recipe.norms == BY_TENSOR else {},
    )
