"""Choices of a chunk: the first task that gives each merged value, and the elements that need a choice.

What a task gives is its value as the output stores it, so two tasks that round to the same bits are one
choice. Elements on which all tasks agree need none: whoever has the checkpoints sees which they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.ops import CHOSEN, Inputs
from hub_magmax.merging.selections.coding import MAX_TASKS
from hub_magmax.planning.plan import Plan, TensorJob

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
