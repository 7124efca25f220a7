"""Diagnosis of checkpoints before a merge: one pass over the files, tensor by tensor.

Small tensors are read whole. Of large ones blocks are read, 16,000 elements and at least one in 256, and the
rest only where that shows no difference: so a tensor is called unchanged only if every value of it is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hub_magmax.analysis.tensor_sums import TensorSums
from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import RecipeError
from hub_magmax.files import write_text
from hub_magmax.kernels import ops
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.merging.ahead import ahead
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.planning.budget import CHUNK_ELEMENTS, READ_AHEAD_BYTES
from hub_magmax.planning.findings.swapped import SwapSearch
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.merge_values import positive_shares
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME, HEAT_MAP_NAME, Diagnosis
from hub_magmax.reporting.diagnosis_groups import Group, Overlap, make_group

#: Files that a diagnosis writes.
FILES = (DIAGNOSIS_NAME, HEAT_MAP_NAME)

#: Blocks of a large tensor that are worked on together, and values of small tensors, over all checkpoints.
_AT_ONCE, _TOGETHER = 16, 1 << 20
#: Matrices whose directions are compared, rows of each that are looked at, numbers held, directions.
_NUM_MATRICES, _NUM_ROWS, _HELD_NUMBERS, _NUM_DIRECTIONS = 4, 128, 1 << 25, 8
#: Layers that are told apart.
_MOST_LAYERS = 256


@dataclass(frozen=True)
class Sample:
    """Elements of a tensor that are read: all of a small one, evenly spread blocks of a larger one.

    Attributes:
        whole_elements: Size up to which a tensor is read whole.
        block_elements: Size of a block.
        block_every: Elements for each of which there is one block.
        fewest_blocks: Blocks of a tensor at least.
    """

    whole_elements: int = 1 << 16
    block_elements: int = 1 << 12
    block_every: int = 1 << 20
    fewest_blocks: int = 4

    def blocks(self, num_elements: int) -> list[tuple[int, int]]:
        """Return the first element of every block and the one after its last."""
        if num_elements <= self.whole_elements:
            return [(0, num_elements)]
        count = max(self.fewest_blocks, num_elements // self.block_every)
        starts = [place * num_elements // count for place in range(count)]
        return [(start, min(start + self.block_elements, num_elements)) for start in starts]


SAMPLE = Sample()


def diagnose(
    plan: Plan,
    *,
    progress: Callable[[int], None] = lambda num_bytes: None,
    sample: Sample = SAMPLE,
) -> Diagnosis:
    """Compare the checkpoints with the base model and with each other, in one pass.

    Holds a few blocks of every checkpoint, a kilobyte per tensor, and some rows of one matrix at a time.

    Args:
        plan: Which tensors are merged, and for which preference quotas are told.
        progress: Called with the number of bytes that each finished tensor has.
        sample: Elements of each tensor that are read.

    Raises:
        NonFiniteError: At a NaN or infinity among the elements that are looked at.
        RecipeError: If rules, or a stack of layers, leave nothing to merge.
    """
    started = time.perf_counter()
    with opened_plan(plan) as (opened, ordered, reader):
        layers, changed = _Layers(opened), set[str]()
        for sums in _looks(opened, ordered, reader, sample):
            layers.add(sums)
            changed |= {job.name for job, same in zip(sums.jobs, sums.same, strict=True) if not same.all()}
            progress(sum(job.num_bytes for job in sums.jobs))
        matrices = _largest_matrices(opened, changed)
        return layers.conclude(
            [_overlap(job, stored_chunks(job, ordered, reader)) for job in matrices], started
        )


@contextmanager
def opened_plan(plan: Plan) -> Iterator[tuple[Plan, list[TensorSource], ThreadPoolExecutor]]:
    """Open the checkpoints of a plan: yield it, the base model and the tasks in order, and what reads ahead.

    Raises:
        RecipeError: If rules, or a stack of layers, leave nothing to merge.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoints(plan.recipe, plan.lock))
        if plan.ranks:  # an adapter's factors are no tensors of the checkpoints
            plan = make_plan(plan.recipe, plan.lock, opened)
        if not any(job.num_elements for job in plan.merged):
            raise RecipeError("nothing is merged, so there is nothing to diagnose")
        reader = stack.enter_context(ThreadPoolExecutor(1))
        stack.enter_context(one_thread())
        stack.enter_context(torch.inference_mode())
        base = opened["base_model"]
        yield plan, [opened[name].merged_with(base) for name in plan.lock.sources], reader


def _looks(
    plan: Plan, ordered: Sequence[TensorSource], reader: ThreadPoolExecutor, sample: Sample
) -> Iterator[TensorSums]:
    """Read the merged tensors one after the other; `ordered` holds the base model, then the tasks."""
    jobs = [job for job in plan.merged if job.num_elements]
    for source in ordered:
        source.expect([job.name for job in jobs], READ_AHEAD_BYTES // len(ordered), in_part=True)
    most = _TOGETHER // len(ordered)
    small = min(sample.whole_elements, most)
    for window in _windows(jobs, most, lambda job: job.num_elements <= small):
        if len(window) > 1:
            yield from _look_together(window, ordered, reader)
        else:
            yield _look_alone(window[0], stored_chunks(window[0], ordered, reader), sample)


def stored_chunks(
    job: TensorJob, ordered: Sequence[TensorSource], reader: ThreadPoolExecutor
) -> StoredChunks:
    """Return the chunks of a tensor of the base model, which comes first, and of some tasks."""
    base, *tasks = ordered
    return StoredChunks(job.name, job.num_elements, base, tuple(tasks), CHUNK_ELEMENTS, reader)


def _largest_matrices(plan: Plan, changed: Container[str]) -> list[TensorJob]:
    """Return the largest matrices, of those that some task changes."""
    matrices = [job for job in plan.merged if len(job.shape) == 2 and job.name in changed]
    return sorted(matrices, key=lambda job: -job.num_elements)[:_NUM_MATRICES]


def _windows(
    jobs: Iterable[TensorJob], most: int, is_small: Callable[[TensorJob], bool]
) -> Iterator[list[TensorJob]]:
    """Yield small neighbours together, up to `most` elements, and others alone."""
    window: list[TensorJob] = []
    size = 0
    for job in jobs:
        size += job.num_elements if is_small(job) else most
        if window and size > most:
            yield window
            window, size = [], job.num_elements if is_small(job) else most
        window.append(job)
    if window:
        yield window


def _look_together(
    window: Sequence[TensorJob], ordered: Sequence[TensorSource], reader: ThreadPoolExecutor
) -> Iterator[TensorSums]:
    """Read small tensors whole, and count those of one shape and dtype at once."""
    alike: dict[tuple[Any, ...], list[TensorJob]] = {}
    for job in window:
        dtypes = (source.index.tensors[job.name].dtype for source in ordered)
        alike.setdefault((job.shape, *dtypes), []).append(job)
    for jobs in alike.values():
        base, *checkpoints = (_read_whole(source, jobs) for source in ordered)
        sums = TensorSums(jobs, len(checkpoints))
        if not sums.count(base, checkpoints):
            for number, job in enumerate(jobs):
                values = [Stored.of(rows[number]) for rows in (base, *checkpoints)]
                chunks = stored_chunks(job, ordered, reader)
                chunks.check(math.nan, RawChunk([(0, job.num_elements)], partial(list, values)))
        yield sums


def _read_whole(source: TensorSource, jobs: Sequence[TensorJob]) -> Tensor:
    """Return tensors of one shape and dtype, a row for each, and release them."""
    dtype, size = source.index.tensors[jobs[0].name].dtype, jobs[0].num_elements
    rows = np.empty((len(jobs), size), bits_dtype(dtype))
    for job, row in zip(jobs, rows, strict=True):
        found = source.read_stored(job.name, 0, size, row)
        if found.bits is not row:  # computed
            row[:] = found.bits
        source.release(job.name, size)
    return Stored(rows, dtype).tensor


def _look_alone(job: TensorJob, chunks: StoredChunks, sample: Sample) -> TensorSums:
    """Read blocks of a tensor, and the rest of it as far as it takes to find a difference."""
    sums = TensorSums([job], chunks.num_tasks)
    for blocks in _read_together(chunks, sample.blocks(job.num_elements)):
        base, *checkpoints = _joined(blocks)
        if not sums.count(base, checkpoints):
            for block in blocks:
                chunks.check(math.nan, block)
    if sums.looked_at < job.num_elements and sums.same.any():
        _read_on(sums, chunks)
    chunks.release(job.num_elements)
    return sums


def _read_on(sums: TensorSums, chunks: StoredChunks) -> None:
    """Read the whole tensor until every task is known to differ."""
    step, size = chunks.chunk_elements, chunks.num_elements
    for block in _read(chunks, [(start, min(start + step, size)) for start in range(0, size, step)]):
        sums.compare(block.base[None], [checkpoint[None] for checkpoint in block.checkpoints])
        if not sums.same.any():
            return


def _overlap(job: TensorJob, chunks: StoredChunks) -> Overlap:
    """Compare the strongest directions of each task's change to a matrix, by some of its rows."""
    num_rows, columns = job.shape
    most = min(_NUM_ROWS, max(_HELD_NUMBERS // (columns * chunks.num_tasks), 2))
    held = range(0, num_rows, max(num_rows // most, 1))[:most]
    blocks = _read(chunks, [(row * columns, (row + 1) * columns) for row in held])
    rows = torch.stack([ops.task_vectors(block.base, block.checkpoints) for block in blocks], dim=1)
    count = min(_NUM_DIRECTIONS, rows.shape[1], -(-columns // 2))
    directions = torch.stack([_directions(task, count) for task in rows])
    chunks.release(job.num_elements)
    cosines = torch.einsum("aic,bjc->abij", directions, directions)
    shares = (cosines**2).sum((2, 3)) / count
    return Overlap(job.name, tuple(map(tuple, shares.tolist())), count / columns)


def _read(chunks: StoredChunks, blocks: Sequence[tuple[int, int]]) -> Iterator[RawChunk]:
    """Yield blocks of a tensor as stored."""
    assert chunks.reader is not None
    return ahead(chunks.reader, (partial(_read_block, chunks, *block) for block in blocks))


def _read_together(chunks: StoredChunks, blocks: Sequence[tuple[int, int]]) -> Iterator[list[RawChunk]]:
    """Yield what `_read` does, some blocks at a time: starting on one costs more than its few elements."""

    def read(group: Sequence[tuple[int, int]]) -> list[RawChunk]:
        return [_read_block(chunks, *block) for block in group]

    assert chunks.reader is not None
    groups = (blocks[first : first + _AT_ONCE] for first in range(0, len(blocks), _AT_ONCE))
    return ahead(chunks.reader, (partial(read, group) for group in groups))


def _read_block(chunks: StoredChunks, start: int, stop: int) -> RawChunk:
    values = [source.read_stored(chunks.name, start, stop) for source in (chunks.base, *chunks.tasks)]
    return RawChunk([(start, stop)], lambda: values)


def _joined(blocks: Sequence[RawChunk]) -> list[Tensor]:
    """Return the values of several blocks as one row, of the base model and of every checkpoint."""
    return [torch.cat(parts)[None] for parts in zip(*(block.values for block in blocks), strict=True)]


def _directions(rows: Tensor, count: int) -> Tensor:
    """Return the strongest right singular vectors of some rows of a matrix; zeros where it is zero."""
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    strengths = values[-count:].clamp(min=0).sqrt()
    found = vectors[:, -count:].T @ rows
    return torch.where(strengths[:, None] > 1e-12 * strengths.max(), found / strengths[:, None], 0.0)


class _Layers:
    """Sums by layer, over all matrices, and by task, of the tensors that are added.

    Neighbouring layers share one place where there are more than `_MOST_LAYERS`.
    """

    _KEYS = ("products", "agreeing", "shared", "changed", "wins", "lacking")

    def __init__(self, plan: Plan) -> None:
        self._tasks, self._weights = tuple(plan.lock.tasks), tuple(plan.lock.preference.shares.values())
        self._method, self._norms = plan.lock.method["name"], plan.recipe.norms
        self._own_values = plan.own_values
        layers = in_order(dict.fromkeys(layer_of(job.name) for job in plan.merged if job.num_elements))
        size = -(-len(layers) // _MOST_LAYERS) or 1
        self._places = {layer: number // size for number, layer in enumerate(layers)}
        rows = [layers[start : start + size] for start in range(0, len(layers), size)]
        self._names = [row[0] if len(row) == 1 else f"{row[0]} … {row[-1]}" for row in rows]
        count, tasks = len(rows) + 1, len(self._tasks)  # the last place is that of all matrices
        self._sizes = np.zeros((count, 2), np.int64)
        square, row_by_task = (count, tasks, tasks), (count, tasks)
        shapes = ((count, tasks + 1, tasks + 1), square, square, row_by_task, row_by_task, row_by_task)
        self._sums = {key: np.zeros(shape) for key, shape in zip(self._KEYS, shapes, strict=True)}
        self._swaps = SwapSearch(self._tasks)
        self._unchanged, self._num_tensors = np.zeros(tasks, int), 0

    def add(self, sums: TensorSums) -> None:
        """Add tensors of one shape."""
        job = sums.jobs[0]
        self._num_tensors += len(sums.jobs)
        self._unchanged += sums.same.sum(axis=0)
        self._swaps.add([job.name for job in sums.jobs], job.shape, sums.prints)
        places = np.array([self._places[layer_of(job.name)] for job in sums.jobs])
        sizes = np.array([job.num_elements, sums.looked_at])
        np.add.at(self._sizes, places, sizes)
        found = {key: getattr(sums, key) for key in self._KEYS[:-1]} | {
            "lacking": sums.lacking([self._shares(job.tensor) for job in sums.jobs])
        }
        for key, looked_at in found.items():
            # Of large tensors a smaller part is looked at, which stands for all of it.
            values = looked_at * (job.num_elements / sums.looked_at)
            np.add.at(self._sums[key], places, values)
            if len(job.shape) >= 2:
                self._sums[key][-1] += values.sum(axis=0)
        if len(job.shape) >= 2:
            self._sizes[-1] += len(places) * sizes

    def _shares(self, tensor: str) -> tuple[float, ...]:
        """Return how much each task matters for a tensor, summing to 1."""
        own = self._own_values.get(tensor)
        return self._weights if own is None or own.weights is None else positive_shares(own.weights)

    def conclude(self, overlaps: Iterable[Overlap], started: float) -> Diagnosis:
        """Return what was found."""
        return Diagnosis(
            self._tasks,
            tuple(self._group(name, place) for place, name in enumerate(self._names)),
            self._group("matrices", -1) if self._sizes[-1, 0] else None,
            tuple(self._unchanged.tolist()),
            self._num_tensors,
            tuple(overlaps),
            self._swaps.found(),
            round(time.perf_counter() - started, 3),
            self._method,
            self._norms,
        )

    def _group(self, name: str, place: int) -> Group:
        size, looked_at = self._sizes[place].tolist()
        return make_group(name, size, looked_at, *(self._sums[key][place] for key in self._KEYS))


def layer_of(tensor: str) -> str:
    """Return the layer a tensor belongs to: its name up to the first number, or without its last part."""
    match = re.match(r"(.*?\.\d+)(\.|$)", tensor)
    return match[1] if match else tensor.rpartition(".")[0] or tensor


def in_order(layers: Iterable[str]) -> list[str]:
    """Return layers, those of one stack by their number; stacks keep their order, each where it begins."""
    stacks: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        stack, _, number = layer.rpartition(".")
        is_one_of_many = number.isdecimal()
        stacks.setdefault(stack if is_one_of_many else layer, []).append(
            (int(number) if is_one_of_many else 0, layer)
        )
    return [layer for stack in stacks.values() for _, layer in sorted(stack)]


def write_diagnosis(found: Diagnosis, place: ResultFiles) -> tuple[Path, ...]:
    """Write the numbers and the heat maps, and return where."""
    from hub_magmax.reporting.figures import draw_cosines

    numbers, picture = map(place.path, FILES)
    write_text(numbers, found.to_json())
    return numbers, *draw_cosines(found, picture)
