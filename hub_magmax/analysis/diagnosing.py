"""Diagnosis of checkpoints before a merge: one pass over the files, tensor by tensor.

Small tensors are read whole. Of large ones blocks are read, 16,000 elements and at least one in 256, and the
rest only where that shows no difference: so a tensor is called unchanged only if every value of it is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.files import write_text
from hub_magmax.kernels import ops
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.merging.chunks import StoredChunks, ahead
from hub_magmax.methods.selection import quotas
from hub_magmax.planning.budget import CHUNK_ELEMENTS, READ_AHEAD_BYTES
from hub_magmax.planning.findings.faults import MIN_PRINT, PRINT_ELEMENTS, Swap, swaps
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.reporting.diagnosis import (
    DIAGNOSIS_NAME,
    HEAT_MAP_NAME,
    Diagnosis,
    Group,
    Overlap,
    make_group,
    total,
)

#: Blocks that are worked on together.
_AT_ONCE = 16
#: Matrices whose directions are compared, rows of each that are looked at, numbers held, directions.
_NUM_MATRICES, _NUM_ROWS, _HELD_NUMBERS, _NUM_DIRECTIONS = 4, 128, 1 << 25, 8


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
    sources: Mapping[str, TensorSource] | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
    sample: Sample = SAMPLE,
) -> Diagnosis:
    """Compare the checkpoints with the base model and with each other, in one pass.

    Holds a few blocks of every checkpoint, a few kilobytes per tensor, and some rows of the largest matrices.

    Args:
        plan: Which tensors are merged, and for which preference quotas are told.
        sources: Open checkpoints by name, instead of those the lock names.
        progress: Called with the number of bytes that each finished tensor has.
        sample: Elements of each tensor that are read.

    Raises:
        NonFiniteError: At a NaN or infinity among the elements that are looked at.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        opened = sources or stack.enter_context(open_checkpoints(plan.recipe, plan.lock))
        if plan.ranks:  # an adapter's factors are no tensors of the checkpoints
            plan = make_plan(plan.recipe, plan.lock, {name: opened[name].index for name in opened})
        reader = stack.enter_context(ThreadPoolExecutor(1))
        stack.enter_context(one_thread())
        stack.enter_context(torch.inference_mode())
        ordered = [opened[name] for name in plan.lock.sources]
        looks = []
        for look in _looks(plan, ordered, reader, sample):
            looks.append(look)
            progress(look.job.num_bytes)
        return _conclude(tuple(plan.lock.tasks), looks, started)


def _looks(
    plan: Plan, ordered: Sequence[TensorSource], reader: ThreadPoolExecutor, sample: Sample
) -> Iterator[_Look]:
    """Read the merged tensors one after the other; `ordered` holds the base model, then the tasks."""
    jobs = [job for job in plan.merged if job.num_elements]
    held = _largest_matrices(jobs)
    for source in ordered:
        source.expect([job.name for job in jobs], READ_AHEAD_BYTES // len(ordered), in_part=True)
    base, *tasks = ordered
    weights = tuple(plan.lock.preference.shares.values())
    for job in jobs:
        chunks = StoredChunks(job.name, job.num_elements, base, tuple(tasks), CHUNK_ELEMENTS, reader)
        yield _Look(job, chunks, weights, sample, holds_rows=job.name in held)
        for source in ordered:
            source.release(job.name, job.num_elements)


def _largest_matrices(jobs: Sequence[TensorJob]) -> set[str]:
    matrices = sorted((job for job in jobs if len(job.shape) == 2), key=lambda job: -job.num_elements)
    return {job.name for job in matrices[:_NUM_MATRICES]}


class _Look:
    """Sums over one tensor, gathered chunk by chunk."""

    def __init__(
        self,
        job: TensorJob,
        chunks: StoredChunks,
        weights: tuple[float, ...],
        sample: Sample,
        *,
        holds_rows: bool,
    ) -> None:
        num_tasks = len(weights)
        self.job = job
        self.looked_at = 0
        self.same = [True] * num_tasks
        self.prints: Tensor | None = None
        self._products = np.zeros((num_tasks + 1, num_tasks + 1))
        self._agreeing, self._shared = np.zeros((2, num_tasks, num_tasks))
        self._wins = np.zeros(num_tasks)
        self.holds_rows = holds_rows
        self._rows: list[Tensor] = []
        self._max_rows = 0
        if holds_rows:
            self._max_rows = min(_NUM_ROWS, max(_HELD_NUMBERS // (job.shape[1] * num_tasks), 2))
        self._gather(chunks, sample)
        # Where nothing changed, nothing is to be won and nothing to be lacked.
        wanted = np.array(quotas(weights, round(self._wins.sum())), dtype=np.float64)
        sums = (self._products, self._agreeing, self._shared, np.diag(self._shared), self._wins)
        lacking = np.maximum(wanted - self._wins, 0)
        self.group = make_group(job.name, job.num_elements, self.looked_at, *sums, lacking)

    def _gather(self, chunks: StoredChunks, sample: Sample) -> None:
        for blocks in _read_together(chunks, sample.blocks(self.job.num_elements)):
            base, *checkpoints = _joined(blocks)
            self._compare(base, checkpoints)
            vectors = ops.task_vectors(base, checkpoints)
            probe = float(vectors.sum())
            if not math.isfinite(probe):
                for block in blocks:
                    chunks.check(probe, block)
            self._count(base.float(), vectors)
        if self.looked_at < self.job.num_elements and any(self.same):
            self._read_on(chunks)
        for block in _read(chunks, self._rows_to_hold()):
            self._rows.append(ops.task_vectors(block.base, block.checkpoints))

    def _compare(self, base: Tensor, checkpoints: list[Tensor]) -> None:
        for task, checkpoint in enumerate(checkpoints):
            self.same[task] = self.same[task] and _equal(base, checkpoint)

    def _read_on(self, chunks: StoredChunks) -> None:
        """Read the whole tensor until every task is known to differ."""
        step, size = chunks.chunk_elements, self.job.num_elements
        everything = [(start, min(start + step, size)) for start in range(0, size, step)]
        for block in _read(chunks, everything):
            self._compare(block.base, block.checkpoints)
            if not any(self.same):
                return

    def _rows_to_hold(self) -> list[tuple[int, int]]:
        if not self._max_rows:
            return []
        rows, columns = self.job.shape
        held = range(0, rows, max(rows // self._max_rows, 1))[: self._max_rows]
        return [(row * columns, (row + 1) * columns) for row in held]

    def _count(self, base: Tensor, vectors: Tensor) -> None:
        self.looked_at += len(base)
        if self.prints is None:
            checkpoints = base[None, :PRINT_ELEMENTS] + vectors[:, :PRINT_ELEMENTS]
            self.prints = torch.cat([base[None, :PRINT_ELEMENTS], checkpoints])
        whole = torch.cat([base[None], vectors])
        self._products += (whole @ whole.T).double().numpy()
        signs = vectors.sign()
        changed = signs.abs()
        together, shared = (signs @ signs.T).numpy(), (changed @ changed.T).numpy()
        self._agreeing += (together + shared) / 2
        self._shared += shared
        largest, winner = vectors.abs().flip(0).max(0)
        winners = len(vectors) - 1 - winner[largest > 0]
        self._wins += torch.bincount(winners, minlength=len(vectors)).numpy()

    def overlap(self) -> Overlap:
        """Compare the strongest directions of each task's change to this matrix."""
        rows = torch.stack(self._rows, dim=1)
        count = min(_NUM_DIRECTIONS, rows.shape[1], -(-rows.shape[2] // 2))
        directions = torch.stack([_directions(task, count) for task in rows])
        cosines = torch.einsum("aic,bjc->abij", directions, directions)
        shares = (cosines**2).sum((2, 3)) / count
        return Overlap(self.job.name, tuple(map(tuple, shares.tolist())), count / rows.shape[2])


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
    """Return the values of several blocks as one, of the base model and of every checkpoint."""
    return [torch.cat(parts) for parts in zip(*(block.values for block in blocks), strict=True)]


def _equal(base: Tensor, checkpoint: Tensor) -> bool:
    return base.dtype == checkpoint.dtype and torch.equal(base, checkpoint)


def _directions(rows: Tensor, count: int) -> Tensor:
    """Return the strongest right singular vectors of some rows of a matrix; zeros where it is zero."""
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    strengths = values[-count:].clamp(min=0).sqrt()
    found = vectors[:, -count:].T @ rows
    return torch.where(strengths[:, None] > 1e-12 * strengths.max(), found / strengths[:, None], 0.0)


def _conclude(tasks: tuple[str, ...], looks: list[_Look], started: float) -> Diagnosis:
    matrices = [look.group for look in looks if len(look.job.shape) >= 2]
    held = sorted((look for look in looks if look.holds_rows), key=lambda look: -look.job.num_elements)
    overlaps = tuple(look.overlap() for look in held)
    return Diagnosis(
        tasks,
        _layers(looks),
        total("matrices", matrices) if matrices else None,
        tuple(sum(look.same[task] for look in looks) for task in range(len(tasks))),
        len(looks),
        overlaps,
        _swaps(tasks, looks),
        round(time.perf_counter() - started, 3),
    )


def _layers(looks: list[_Look]) -> tuple[Group, ...]:
    layers: dict[str, list[Group]] = {}
    for look in looks:
        layers.setdefault(layer_of(look.job.name), []).append(look.group)
    return tuple(total(name, groups) for name, groups in layers.items())


def layer_of(tensor: str) -> str:
    """Return the layer a tensor belongs to: its name up to the first number, or without its last part."""
    match = re.match(r"(.*?\.\d+)(\.|$)", tensor)
    return match[1] if match else tensor.rpartition(".")[0] or tensor


def _swaps(tasks: tuple[str, ...], looks: list[_Look]) -> tuple[Swap, ...]:
    prints = {
        look.job.name: (look.job.shape, look.prints.numpy())
        for look in looks
        if look.prints is not None and look.prints.shape[1] >= MIN_PRINT
    }
    return swaps(tasks, prints)


def write_diagnosis(found: Diagnosis, place: ResultFiles) -> tuple[Path, Path]:
    """Write the numbers and the heat map, and return where."""
    from hub_magmax.reporting.figures import draw_cosines

    numbers, picture = place.path(DIAGNOSIS_NAME), place.path(HEAT_MAP_NAME)
    write_text(numbers, found.to_json())
    draw_cosines(found, picture)
    return numbers, picture
