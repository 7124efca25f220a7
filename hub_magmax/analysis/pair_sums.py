"""Metrics of pairs of task vectors, from one pass over every element and from directions of matrices.

The pass holds a chunk of every checkpoint. Directions are found one task after the other, in a matrix at a
time, so that memory is that of the largest matrix, whatever the number of tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, compress
from typing import Any

import numpy as np
import torch

from hub_magmax.analysis.diagnosing import opened_plan, stored_chunks
from hub_magmax.analysis.pair_examples import NOTHING, Examined, examine_pairs, why_not
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.lazy_imports import inference
from hub_magmax.merging.chunk_memory import ChunkMemory
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.methods.geometry.gram import Gram as GramOfTensor
from hub_magmax.methods.spectra import directions
from hub_magmax.planning.budget import CHUNK_ELEMENTS, READ_AHEAD_BYTES, threads_of
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.arguments import opened
from hub_magmax.reporting.pair_metrics import (
    NUM_STRENGTHS,
    SUBSPACES,
    Gram,
    PairMetrics,
    Part,
    Side,
    effective_rank,
    evaluate,
)
from hub_magmax.text import ProgressBar, Report, format_bytes, format_seconds, unseen

#: Directions of each matrix that the paper compares.
RANK = 10

#: Rows and columns of the matrix whose directions tell how fast this machine finds some.
_TRIED = 192


def measure_pairs(
    plan: Plan,
    *,
    rank: int = RANK,
    progress: Callable[[int], None] = lambda num_bytes: None,
    examined: Examined = NOTHING,
) -> PairMetrics:
    """Return the metrics of every pair of task vectors.

    Args:
        plan: Which tensors are merged.
        rank: Directions of each matrix that are compared; 0 for none.
        progress: Called with the number of bytes that each finished tensor has.
        examined: Of activations and gradients.

    Raises:
        NonFiniteError: At a NaN or infinity.
        RecipeError: If there is one task, or rules, or a stack of layers, leave nothing to merge.
    """
    if len(plan.lock.tasks) < 2:
        raise RecipeError("there is one task, and metrics are of pairs", expected="two tasks or more")
    started, num_threads = time.perf_counter(), threads_of(plan)
    with opened_plan(plan) as (found, ordered, reader):
        jobs = [job for job in found.merged if job.num_elements]
        tasks = range(len(ordered) - 1)
        sums = _sums(jobs, ordered, num_threads, progress)
        changed = (np.diagonal(sums, axis1=1, axis2=2) > 0).sum(1) > 1  # by two tasks, or no pair has both
        chosen = _matrices(compress(jobs, changed)) if rank else []
        spaces = _Subspaces(len(tasks))
        for job in chosen:
            spaces.add([_side(job, ordered[0], ordered[task + 1], reader, rank) for task in tasks])
    known: dict[Part, Any] = {"task vectors": Gram.of(sums.sum(0)), "tensors": _layerwise(sums)}
    if chosen:
        known["subspaces"] = spaces.means()
    known |= examined.parts
    return PairMetrics(
        evaluate(known, len(tasks)),
        rank,
        sum(job.num_elements for job in jobs),
        len(chosen),
        examined.num_examples,
        round(time.perf_counter() - started, 3),
    )


def measured_pairs(
    plan: Plan, rank: int, num_examples: int, *, report: Report, progress: ProgressBar = unseen
) -> PairMetrics:
    """Return all metrics of every pair of tasks that can be measured.

    Args:
        plan: Which tensors are merged.
        rank: Directions of each matrix that are compared; 0 for none.
        num_examples: Of each task, on which models run; 0 for none.
        report: Called with what it costs, and with why there are no activations and gradients.
        progress: Called with what is going to be counted, and its unit; opens what is called with each step.

    Raises:
        HubMagmaxError: As `measure_pairs` and `examine_pairs`.
    """
    if cost := cost_of_directions(plan, rank):
        report(cost)
    recipe, lock, examined = plan.recipe, plan.lock, NOTHING
    if num_examples and (reason := why_not(recipe, lock)):
        report(f"without activations and gradients: {reason}")
    elif num_examples:
        with opened(progress, math.comb(len(lock.tasks), 2), "running pairs of models", "pairs") as advance:
            examined = examine_pairs(
                recipe, lock, num_examples=num_examples, progress=advance or (lambda number: None)
            )
    with opened(progress, plan.bytes_out, "reading pairs of tasks", "bytes") as advance:
        return measure_pairs(plan, rank=rank, progress=advance or (lambda number: None), examined=examined)


def cost_of_directions(plan: Plan, rank: int) -> str:
    """Say what finding the directions of all matrices takes, before any is looked for; nothing for none.

    The time is measured on a small matrix; larger ones are faster per operation, so that it is an upper bound
    where nothing else runs.
    """
    shapes = [job.shape for job in _matrices(plan.merged)] if rank else []
    if not shapes:
        return ""
    directions(torch.eye(8, dtype=torch.float64))  # the library is loaded by the first call
    matrix = torch.randn(_TRIED, _TRIED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    directions(matrix)
    rate = (time.perf_counter() - started) / _operations((_TRIED, _TRIED))
    seconds = rate * sum(map(_operations, shapes)) * len(plan.lock.tasks)
    held = max(3 * rows * columns + 3 * min(rows, columns) ** 2 for rows, columns in shapes)
    return (
        f"singular directions of {len(shapes):,} matrices of {len(plan.lock.tasks)} tasks: about "
        f"{format_seconds(seconds)} and {format_bytes(8 * held)} of memory; --rank 0 leaves them out"
    )


def _operations(shape: Sequence[int]) -> float:
    """Return about how many floating-point operations the directions of a matrix take."""
    short, long = sorted(shape)
    return 4.0 * short * short * long + 9.0 * short**3


def _matrices(jobs: Iterable[TensorJob]) -> list[TensorJob]:
    return [job for job in jobs if len(job.shape) == 2 and job.num_elements]


def _sums(
    jobs: Sequence[TensorJob],
    ordered: Sequence[TensorSource],
    num_threads: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Return by tensor the inner products of the task vectors, over every element.

    They are added in float64 in a fixed order (`kernels.products`), so that chunks, threads and backends
    change no bit.
    """
    base, *tasks = ordered
    backend, memory = choose_backend(sum(job.num_elements for job in jobs)), ChunkMemory()
    for source in ordered:
        source.expect([job.name for job in jobs], READ_AHEAD_BYTES // len(ordered))

    def products(job: TensorJob) -> np.ndarray:
        chunks = StoredChunks(
            job.name, job.num_elements, base, tuple(tasks), CHUNK_ELEMENTS, None, backend, memory
        )
        with inference():
            found = GramOfTensor(chunks, job.shape).task_products()
        chunks.release(job.num_elements)
        return found

    sums = np.zeros((len(jobs), len(tasks), len(tasks)))
    with ThreadPoolExecutor(num_threads) as pool:
        for number, found in enumerate(pool.map(products, jobs)):
            sums[number] = found
            progress(jobs[number].num_bytes)
    return sums


def _layerwise(sums: np.ndarray) -> np.ndarray:
    """Return the mean of the tensors' effective ranks, weighted by the lengths of both task vectors in each.

    Of a pair, tensors that one of them leaves unchanged do not count; without others it is 2, as published.
    """
    pairs = Gram.of(sums)
    both = (pairs.one > 0) & (pairs.other > 0)
    weights = np.where(both, np.sqrt(pairs.one) + np.sqrt(pairs.other), 0)
    total = weights.sum(0)
    mean = (weights * effective_rank(pairs)).sum(0) / np.where(total > 0, total, 1)
    return np.where(total > 0, mean, 2.0)


def _side(
    job: TensorJob, base: TensorSource, task: TensorSource, reader: ThreadPoolExecutor, rank: int
) -> Side:
    """Return the directions of a task's change to a matrix, with signs of no meaning."""
    chunks = stored_chunks(job, (base, task), reader)
    matrix = torch.empty(job.num_elements, dtype=torch.float64)
    for start, vectors in chunks:
        matrix[start : start + vectors.shape[1]] = vectors[0]
    chunks.release(job.num_elements)
    found = directions(matrix.view(job.shape))
    weakest = found.right[:, max(0, found.right.shape[1] - rank) :]
    parts = (found.strengths[:NUM_STRENGTHS], found.left[:, :rank], found.right[:, :rank], weakest)
    return Side(*(part.clone().numpy() for part in parts))


class _Subspaces:
    """Sums over matrices of every metric of subspaces; a matrix counts for pairs that both change it."""

    def __init__(self, num_tasks: int) -> None:
        self._sums = {name: np.zeros((num_tasks, num_tasks)) for name in SUBSPACES}
        self._counts = np.zeros((num_tasks, num_tasks))

    def add(self, sides: Sequence[Side]) -> None:
        for one, other in combinations(range(len(sides)), 2):
            count = min(sides[one].num_directions, sides[other].num_directions)
            if count:
                self._counts[one, other] += 1
                for name, function in SUBSPACES.items():
                    self._sums[name][one, other] += function(sides[one], sides[other], count)

    def means(self) -> dict[str, np.ndarray]:
        return {name: total / np.maximum(self._counts, 1) for name, total in self._sums.items()}
