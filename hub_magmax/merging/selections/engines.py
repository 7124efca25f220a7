"""Engines of selections: one writes choices in place of weights, the other makes weights of choices again."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.files import os_errors
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.ops import CHOSEN, Inputs
from hub_magmax.merging.combine import merged_chunks
from hub_magmax.merging.engine import Engine
from hub_magmax.merging.making import FileInMaking, Steps, starting_order
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.merging.output.shard import ShardFile, metadata_of
from hub_magmax.merging.output.tensor import Tally, TensorWriter, record_of
from hub_magmax.merging.selections.coding import MAX_TASKS
from hub_magmax.merging.selections.files import (
    BLOCK_ELEMENTS,
    Blocks,
    CodedTensor,
    StoredSelection,
    write_selection,
)
from hub_magmax.methods import Rule
from hub_magmax.planning.plan import Plan, Shard, TensorJob
from hub_magmax.text import publishable

#: Marks an element whose value no task has given yet.
_NOBODY = np.uint8(MAX_TASKS)


def values_by_task(
    chunk: RawChunk, plan: Plan, job: TensorJob, backend: Backend
) -> Iterator[Shaped[np.ndarray, " chunk"]]:
    """Yield the bits that each task alone would give the elements of a chunk, in the order of the tasks.

    Args:
        chunk: Values of the base model and the tasks; read once.
        plan: Its lock has the tasks, and the scaling coefficient.
        job: The tensor that these are elements of.
        backend: Merges.
    """
    chunk.stored  # noqa: B018, read now: compiled loops would read the files again for every task
    scaling = plan.values_of(job.tensor).scaling
    for task in range(len(plan.lock.tasks)):
        inputs = Inputs((np.full(chunk.num_elements, task, np.uint8),))
        yield backend.merge(CHOSEN, chunk, inputs, job.dtype, scaling).values.bits


def are_open(by_task: Iterator[Shaped[np.ndarray, " chunk"]]) -> Bool[np.ndarray, " chunk"]:
    """Say of each element whether some tasks give it different values, from `values_by_task`."""
    first = next(by_task)
    found = np.zeros(len(first), bool)
    for values in by_task:
        found |= values != first
    return found


def choices(
    by_task: Iterator[Shaped[np.ndarray, " chunk"]], merged: Shaped[np.ndarray, " chunk"]
) -> tuple[UInt8[np.ndarray, " chunk"], Bool[np.ndarray, " chunk"]]:
    """Return the first task that gives each merged value, and what `are_open` does.

    Args:
        by_task: From `values_by_task`.
        merged: Bits of values, each of which some task gives.
    """
    first = next(by_task)
    found = np.where(merged == first, np.uint8(0), _NOBODY)
    is_open = np.zeros(len(first), bool)
    for task, values in enumerate(by_task, 1):
        is_open |= values != first
        np.putmask(found, (found == _NOBODY) & (values == merged), np.uint8(task))
    assert not (found == _NOBODY).any(), "every value is a task's"
    return found, is_open


def engine_of(plan: Plan) -> type[Engine]:
    """Return what carries out a plan."""
    if plan.recipe.output.is_selection:
        return SelectingEngine
    return Engine if plan.selection is None else ApplyingEngine


class SelectingEngine(Engine):
    """Makes files of choices: tensors are merged as `Engine` does; where each value is from is written."""

    def begin(self, shard: Shard, unfinished: ExitStack) -> FileInMaking:
        """Open a file; its header and its codes are written when all tensors are merged."""
        path = self.place.folder / shard.file
        with os_errors(path):
            file = ShardFile(path)
            unfinished.callback(file.abandon)
            blocks = Blocks(self.place.folder)
            unfinished.callback(blocks.close)
        coded = {job.name: CodedTensor(blocks) for job in shard.jobs}

        def steps(job: Any) -> Steps:
            return self._select(job, coded[job.name], path)

        def finish(tallies: Iterable[Tally]) -> ShardRecord:
            counted = [*tallies]
            with os_errors(path), self.clock.spend("store"):
                write_selection(file, coded, {"hub_magmax": metadata_of(self.plan)["hub_magmax"]})
                blocks.close()
                return record_of(shard.file, file, counted)

        order = starting_order(shard.jobs, in_order=self.workers.in_order)
        return FileInMaking(shard.jobs, order, steps, self.clock, finish)

    def _select(self, job: TensorJob, coded: CodedTensor, path: Path) -> Steps:
        """Merge one tensor, and code where its values are from; pause where `Engine.merge` does."""
        tally = Tally(len(self.plan.lock.tasks))
        values, chunks = self.plan.values_of(job.tensor), self.chunks(job, self.reader)
        rule = self.known_rule(job, values) or self.rule(chunks, job.shape, values)
        tally.add(rule)
        for chunk in chunks.last_pass(BLOCK_ELEMENTS):
            chunk.stored  # noqa: B018, read now: compiled loops would read the files for each task
            inputs = rule.of_chunk(chunk.start, chunk)
            merged = self.backend.merge(rule.op, chunk, inputs, job.dtype, values.scaling)
            chunks.check(merged.probe, chunk, merged.values)
            tally.count(merged.counts)
            found = choices(values_by_task(chunk, self.plan, job, self.backend), merged.values.bits)
            with self.clock.spend("write"), os_errors(path):
                coded.add(*found, merged.values)
            self.advance(len(merged.values.content))
            del merged, found, inputs  # which would be held while other sites merge the chunk
            if chunks.is_turn_over(chunk.start + chunk.num_elements):
                yield
        if self.is_unchanged(job):
            tally.set_apart()
        return tally


class ApplyingEngine(Engine):
    """Makes weights again: every element is taken from the task that a stored selection names.

    The values of each tensor are compared with those of the merge by their sha256.
    """

    surveys = False

    def __init__(self, plan: Plan, *others: Any) -> None:
        super().__init__(plan, *others)
        assert plan.selection is not None
        self._selection = StoredSelection.of(LocalSource(*plan.selection))
        # A commit, or a sha256 of whole files, says that values are as they were.
        self._suspects = [
            publishable(locked.reference)
            for locked in plan.lock.every_source.values()
            if not locked.commit and not all(file.sha256 for file in locked.files)
        ]

    def units(self, shard: Shard) -> Sequence[TensorJob]:
        """Return what is made at a time: a tensor, since each has choices of its own."""
        return shard.jobs

    def merge(self, job: TensorJob, tally: Tally, slot: TensorWriter) -> Generator[None]:
        """Write one tensor of chosen elements; which task each is from is not counted.

        Raises:
            LockError: If the selection does not fit the checkpoints.
            CheckpointError: If it lacks the tensor.
        """
        values, chunks = self.plan.values_of(job.tensor), self.chunks(job, self.reader)
        stored, digest = self._selection.choices(job.tensor, self._suspects), sha256()

        def chosen(start: int, chunk: RawChunk) -> tuple[np.ndarray]:
            is_open = are_open(values_by_task(chunk, self.plan, job, self.backend))
            return (stored.next(is_open, len(self.plan.lock.tasks)),)

        rule = Rule(CHOSEN, per_chunk=chosen, multiple_of=BLOCK_ELEMENTS)
        for start, merged in merged_chunks(chunks, rule, job.dtype, values.scaling):
            digest.update(merged.values.content)
            slot.write(start, merged.values)
            if chunks.is_turn_over(start + len(merged.values.bits)):
                yield
        stored.finish(digest.hexdigest())
