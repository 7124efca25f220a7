"""The paper's rule: magnitudes first, then chance where a task has won more than its quota."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.structures import FIRST_MARK, NOBODY
from hub_magmax.methods.chunks import Chunks, Selection, check_task_count
from hub_magmax.methods.selection.owners import MAX_TASKS, Draws, rename
from hub_magmax.methods.selection.streams import ALIGN, DROP, FILL


def algorithm_1(chunks: Chunks, quotas: Sequence[int], generator: CounterGenerator) -> Selection:
    """Select by magnitude, dropping surplus wins at random: the paper's rule.

    A task without a quota counts as all zeros. The largest magnitude wins. From the last task to the
    second, surplus wins are dropped at random, each to the earlier task of largest magnitude there.
    The first task drops its surplus at random too; those elements go to the tasks that are still
    short, from the last to the second, where they have the largest magnitude among tasks 2 to T, and
    what is short after that is filled at random (`num_unaligned`).

    Equal magnitudes go to the later task at every step. So an element that is zero in every task is
    won by the last task, and handed down like any other; in the last step a task without a quota can
    own the largest magnitude of such an element, which is then free to be filled at random.

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
    unaligned = [0] * num_tasks
    if surplus:
        freed = _fill_aligned(draws, held, quotas)
        rename(owner, freed, chunks.backend)
        unaligned = _fill_unaligned(draws, held, quotas)
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
    codes = chunks.scratch.zeros(chunks.num_elements, _code_type(num_tasks))
    if num_tasks == 1:
        return owner, codes
    wanted = (np.array(quotas) > 0).astype(np.uint8)

    def rank(part: Iterator[tuple[int, RawChunk]]) -> None:
        for start, chunk in part:
            end = start + chunk.num_elements
            chunks.backend.rank(chunk, wanted, owner[start:end], codes[start:end])

    list(chunks.map(rank))
    return owner, codes


def _code_type(num_tasks: int) -> np.dtype[Any]:
    """Return the smallest unsigned type with a bit per task."""
    return np.dtype(next(f"u{size}" for size in (1, 2, 4, 8) if num_tasks <= 8 * size))


def _fill_aligned(draws: Draws, held: list[int], quotas: Sequence[int]) -> UInt8[np.ndarray, "256"]:
    """Give short tasks, last first, the dropped elements on which they are largest.

    Returns names for owners that free the rest.
    """
    names = np.arange(256, dtype=np.uint8)
    for task in range(len(held) - 1, 0, -1):
        value, total = FIRST_MARK + task, draws.count(FIRST_MARK + task)
        taken = min(quotas[task] - held[task], total)
        if taken:
            draws.give(value, taken, total, stream=ALIGN + task, mask=0, mark=task)
            held[task] += taken
        if total > taken:
            names[value] = NOBODY
    return names


def _fill_unaligned(draws: Draws, held: list[int], quotas: Sequence[int]) -> list[int]:
    """Give short tasks, second first, what nobody took, at random; return how much each was given."""
    short = [quota - have for quota, have in zip(quotas, held, strict=True)]
    for task, count in enumerate(short):
        if count:
            draws.give(NOBODY, count, sum(short[task:]), stream=FILL + task, mask=0, mark=task)
            held[task] += count
    return short
