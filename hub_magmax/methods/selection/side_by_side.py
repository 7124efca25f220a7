"""Algorithm 1 for many tensors of one size at a time: the same steps and draws, on rows of a matrix.

A call of numpy takes as long as working on a thousand elements, and algorithm 1 makes a hundred calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.randomness import CounterGenerator, keys_of
from hub_magmax.kernels.reference import highest_bit
from hub_magmax.kernels.structures import FIRST_MARK, NOBODY, TIED, ZERO
from hub_magmax.methods.chunks import check_task_count
from hub_magmax.methods.draws import ALIGN, DROP, FILL, PASSED, TIE
from hub_magmax.methods.selection.algorithm_one import code_type
from hub_magmax.methods.selection.owners import MAX_TASKS

#: A number for each tensor.
PerTensor = Int64[np.ndarray, " tensors"]

#: Takes some tensors, and says which of their elements are meant.
Members = Callable[[Any], Bool[np.ndarray, "some elements"]]

_LAST_KEY = np.iinfo(np.int64).max


def algorithm_1_side_by_side(
    task_vectors: Float32[np.ndarray, "tasks tensors elements"],
    quotas: Sequence[int],
    generators: Sequence[CounterGenerator],
    backend: Backend,
) -> tuple[UInt8[np.ndarray, "tensors elements"], Int64[np.ndarray, "tensors tasks"]]:
    """Return what `algorithm_1` selects of each tensor: winners, and elements per task given at random.

    Args:
        task_vectors: Finite.
        quotas: Elements per task, the same for all tensors, since they are of one size.
        generators: One for each tensor.
        backend: Ranks the tasks.
    """
    rows = _Rows(task_vectors, quotas, generators, backend)
    rows.drop_surplus()
    rows.settle_ties()
    rows.fill_aligned()
    unaligned = rows.fill_unaligned()
    rows.deal()
    assert (rows.lacking == 0).all()
    return rows.owner, unaligned


class _Rows:
    """Owners of the elements of each tensor, changed step by step; `algorithm_one` says why."""

    def __init__(
        self,
        task_vectors: Float32[np.ndarray, "tasks tensors elements"],
        quotas: Sequence[int],
        generators: Sequence[CounterGenerator],
        backend: Backend,
    ) -> None:
        num_tasks, num_tensors, size = task_vectors.shape
        check_task_count(num_tasks, limit=MAX_TASKS)
        self._num_tasks, self._generators = num_tasks, generators
        self.owner = np.zeros((num_tensors, size), np.uint8)
        self._codes = np.zeros((num_tensors, size), code_type(num_tasks))
        if num_tasks > 1:
            wanted = (np.array(quotas) > 0).astype(np.uint8)
            flat = RawChunk.of_vectors(task_vectors.reshape(num_tasks, -1))
            backend.rank(flat, wanted, self.owner.reshape(-1), self._codes.reshape(-1))
        #: Elements per task that each tensor still lacks; below zero where a task holds too many.
        self.lacking = np.tile(np.array(quotas), (num_tensors, 1))

    def drop_surplus(self) -> None:
        for task in range(self._num_tasks - 1, -1, -1):
            self.lacking[:, task] -= self._count(self.owner == task)
            surplus = np.maximum(0, -self.lacking[:, task])
            mask, mark = (1 << (task or self._num_tasks)) - 2, 0 if task else FIRST_MARK
            self._give(self._all_of(task), surplus, DROP + task, mask=mask, mark=mark)
            self.lacking[:, task] += surplus

    def settle_ties(self) -> None:
        if not ((self.owner >= TIED) & (self.owner < ZERO)).any():
            return
        for task in range(self._num_tasks - 1, -1, -1):
            total, room = self._count(self.owner == TIED + task), self.lacking[:, task].copy()
            self.lacking[:, task] -= np.minimum(room, total)
            alone = self._alone(task)
            num_alone = np.where(total > room, self._count(alone(slice(None))), 0)
            self._give(alone, np.maximum(num_alone - room, 0), TIE + task, mask=0, mark=NOBODY)
            passed = np.where(total > room, total - num_alone - np.maximum(room - num_alone, 0), 0)
            shared = self._shared(task)
            self._give(shared, passed, PASSED + task, mask=(1 << task) - 1, mark=TIED)
            self.owner[self.owner == TIED + task] = task

    def fill_aligned(self) -> None:
        for task in range(self._num_tasks - 1, 0, -1):
            value = FIRST_MARK + task
            taken = np.minimum(self.lacking[:, task], self._count(self.owner == value))
            self._give(self._all_of(value), taken, ALIGN + task, mask=0, mark=task)
            self.lacking[:, task] -= taken
            self.owner[self.owner == value] = NOBODY

    def fill_unaligned(self) -> Int64[np.ndarray, "tensors tasks"]:
        given = np.zeros_like(self.lacking)
        left = self._count(self.owner == NOBODY)
        for task in range(self._num_tasks):
            given[:, task] = count = np.minimum(self.lacking[:, task], left)
            self._give(self._all_of(NOBODY), count, FILL + task, mask=0, mark=task)
            self.lacking[:, task] -= count
            left -= count
        return given

    def deal(self) -> None:
        is_zero = self.owner == ZERO
        if not is_zero.any():
            return
        place, edge = is_zero.cumsum(axis=1), np.zeros((len(self.owner), 1), np.int64)
        for task in range(self._num_tasks):
            before, edge = edge, edge + self.lacking[:, task, None]
            self.owner[is_zero & (place > before) & (place <= edge)] = task
            self.lacking[:, task] = 0

    def _count(self, members: Bool[np.ndarray, "tensors elements"]) -> PerTensor:
        found: PerTensor = np.count_nonzero(members, axis=1)
        return found

    def _all_of(self, value: int) -> Members:
        return lambda rows: self.owner[rows] == value

    def _alone(self, task: int) -> Members:
        """Return what finds the tied elements of a task that no earlier task shares."""
        earlier = self._codes.dtype.type((1 << task) - 1)
        return lambda rows: (self.owner[rows] == TIED + task) & (self._codes[rows] & earlier == 0)

    def _shared(self, task: int) -> Members:
        earlier = self._codes.dtype.type((1 << task) - 1)
        return lambda rows: (self.owner[rows] == TIED + task) & (self._codes[rows] & earlier != 0)

    def _give(
        self,
        members: Members,
        count: PerTensor,
        stream: int,
        *,
        mask: int,
        mark: int,
    ) -> None:
        """Give the `count` elements of smallest key among `members` of each tensor to heirs, as `Draws`."""
        rows = np.flatnonzero(count > 0)
        if not len(rows):
            return
        found = members(rows)
        keys = np.where(found, self._keys(rows, stream), _LAST_KEY)
        last = np.sort(keys, axis=1)[np.arange(len(rows)), count[rows] - 1]
        place, element = np.nonzero(found & (keys <= last[:, None]))
        codes: Shaped[np.ndarray, " given"] = self._codes[rows[place], element]
        self.owner[rows[place], element] = highest_bit(codes & codes.dtype.type(mask)) + np.uint8(mark)

    def _keys(self, rows: Int64[np.ndarray, " some"], stream: int) -> Int64[np.ndarray, "some elements"]:
        constants = [self._generators[row].constants(stream) for row in rows]
        before, middle = (np.array(one, np.uint64)[:, None] for one in zip(*constants, strict=True))
        return keys_of(np.tile(np.arange(self.owner.shape[1]), (len(rows), 1)), before, middle)
