"""The paper's rule: magnitudes first, then chance where a task has won more than its quota."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.structures import FIRST_MARK, NOBODY, TIED, ZERO
from hub_magmax.methods.chunks import BLOCK_ELEMENTS, Chunks, Selection, check_task_count
from hub_magmax.methods.draws import ALIGN, DROP, FILL, PASSED, TIE
from hub_magmax.methods.selection.owners import MAX_TASKS, Draws, rename

#: Owner of tied elements that no earlier task shares, while a task is asked.
_ALONE = 252


def algorithm_1(chunks: Chunks, quotas: Sequence[int], generator: CounterGenerator) -> Selection:
    """Select by magnitude, dropping surplus wins at random: the paper's rule.

    A task without a quota counts as all zeros. The largest magnitude wins. From the last task to the
    second, surplus wins are dropped at random, each to the earlier task of largest magnitude there.
    The first task drops its surplus at random too; those elements go to the tasks that are still
    short, from the last to the second, where they have the largest magnitude among tasks 2 to T, and
    what is short after that is filled at random (`num_unaligned`).

    Elements on which several tasks are largest are settled after the drops, among these tasks, by what each
    still lacks, the last task first: `_settle_ties`. An element that is zero in every task changes nothing;
    such elements fill what is lacking in the end, and push nothing out. Equal magnitudes further down, where
    dropped elements are handed on, go to the later task.

    Args:
        chunks: Read once. Two to nine bytes per element are kept, depending on the number of tasks.
        quotas: Elements per task, as `quotas` returns them.
        generator: Decides which elements are dropped or filled.

    Returns:
        The selection; its counts equal `quotas`.

    Raises:
        RecipeError: If there are more than 64 tasks.

    Source: Tunable MAGMAX (arXiv:2605.20803), algorithm 1.
    """
    num_tasks = chunks.num_tasks
    assert len(quotas) == num_tasks and sum(quotas) == chunks.num_elements
    check_task_count(num_tasks, limit=MAX_TASKS)
    owner, codes = _rank_tasks(chunks, quotas)
    draws = Draws(owner, codes, generator, chunks.backend, chunks.num_threads)
    held, surplus = [0] * num_tasks, 0
    for task in range(num_tasks - 1, -1, -1):
        held[task] = draws.count(task)
        surplus = max(0, held[task] - quotas[task])
        if surplus:
            # Without bit 0: it names no owner, and no other bit means task 0. Below that are all others,
            # with a mark.
            mask, mark = (1 << (task or num_tasks)) - 2, 0 if task else FIRST_MARK
            draws.give(task, surplus, held[task], stream=DROP + task, mask=mask, mark=mark)
            held[task] -= surplus
    names = _settle_ties(draws, held, quotas, owner, codes, chunks.backend)
    if surplus:
        _fill_aligned(draws, held, quotas, names)
    rename(owner, names, chunks.backend)
    unaligned = _fill_unaligned(draws, held, quotas)
    _deal(owner, held, quotas)
    assert held == list(quotas)
    return Selection(owner=owner, counts=tuple(held), num_unaligned=tuple(unaligned))


def _rank_tasks(
    chunks: Chunks, quotas: Sequence[int]
) -> tuple[UInt8[np.ndarray, " elements"], Shaped[np.ndarray, " elements"]]:
    """Return each element's winner, and a code of the tasks that own it as later ones drop it.

    `Backend.rank` says what a code is; its last step asks for the largest among tasks 1 and above.
    """
    num_tasks = chunks.num_tasks
    owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    codes = chunks.scratch.zeros(chunks.num_elements, code_type(num_tasks))
    if num_tasks == 1:
        return owner, codes
    wanted = (np.array(quotas) > 0).astype(np.uint8)

    def rank(part: Iterator[tuple[int, RawChunk]]) -> None:
        for start, chunk in part:
            end = start + chunk.num_elements
            chunks.backend.rank(chunk, wanted, owner[start:end], codes[start:end])

    list(chunks.map(rank))
    return owner, codes


def code_type(num_tasks: int) -> np.dtype[Any]:
    """Return the smallest unsigned type with a bit per task."""
    return np.dtype(next(f"u{size}" for size in (1, 2, 4, 8) if num_tasks <= 8 * size))


def _settle_ties(
    draws: Draws,
    held: list[int],
    quotas: Sequence[int],
    owner: UInt8[np.ndarray, " elements"],
    codes: Shaped[np.ndarray, " elements"],
    backend: Backend,
) -> UInt8[np.ndarray, "256"]:
    """Give elements on which several tasks are largest to those of them that lack elements, the last first.

    A task that cannot take all that are left takes those first that no earlier task shares; which of the
    others it takes is drawn, and the rest go on to the next earlier task that shares them.

    Returns names for owners that settle what is decided.
    """
    names = np.arange(256, dtype=np.uint8)
    for task in range(len(held) - 1, -1, -1):
        pool, total = TIED + task, draws.count(TIED + task)
        room = quotas[task] - held[task]
        if total:
            names[pool] = task
        held[task] += min(room, total)
        if total <= room:
            continue
        alone = backend.part(owner, codes, pool, (1 << task) - 1, _ALONE)
        if alone > room:
            draws.give(_ALONE, alone - room, alone, stream=TIE + task, mask=0, mark=NOBODY)
        rename(owner, _renamed(_ALONE, task), backend)
        if passed := total - alone - max(room - alone, 0):
            mask = (1 << task) - 1
            draws.give(pool, passed, total - alone, stream=PASSED + task, mask=mask, mark=TIED)
    return names


def _renamed(value: int, name: int) -> UInt8[np.ndarray, "256"]:
    names = np.arange(256, dtype=np.uint8)
    names[value] = name
    return names


def _fill_aligned(
    draws: Draws, held: list[int], quotas: Sequence[int], names: UInt8[np.ndarray, "256"]
) -> None:
    """Give short tasks, last first, the dropped elements on which they are largest, and free the rest."""
    for task in range(len(held) - 1, 0, -1):
        value, total = FIRST_MARK + task, draws.count(FIRST_MARK + task)
        taken = min(quotas[task] - held[task], total)
        if taken:
            draws.give(value, taken, total, stream=ALIGN + task, mask=0, mark=task)
            held[task] += taken
        if total > taken:
            names[value] = NOBODY


def _fill_unaligned(draws: Draws, held: list[int], quotas: Sequence[int]) -> list[int]:
    """Give short tasks, first ones first, what nobody took, at random; return how much each was given."""
    left, given = draws.count(NOBODY), [0] * len(held)
    for task, quota in enumerate(quotas):
        given[task] = count = min(quota - held[task], left)
        if count:
            draws.give(NOBODY, count, left, stream=FILL + task, mask=0, mark=task)
            held[task] += count
            left -= count
    return given


def _deal(owner: UInt8[np.ndarray, " elements"], held: list[int], quotas: Sequence[int]) -> None:
    """Give elements that are zero in every task to short tasks, first ones first, in order."""
    start = 0
    for task, quota in enumerate(quotas):
        while held[task] < quota:
            block = owner[start : start + BLOCK_ELEMENTS]
            assert len(block), "as many as are lacking"
            is_zero = block == ZERO
            count = int(np.count_nonzero(is_zero))
            if count > quota - held[task]:
                is_zero[np.flatnonzero(is_zero)[quota - held[task]] :] = False
                count = quota - held[task]
            block -= is_zero.view(np.uint8) * np.uint8(ZERO - task)  # five times as fast as by a mask
            held[task] += count
            if held[task] < quota:
                start += BLOCK_ELEMENTS
