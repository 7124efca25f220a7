"""The paper's rule: magnitudes first, then chance where a task has won more than its quota."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import Chunks, Selection, blocks, check_task_count
from hub_magmax.methods.selection.owners import FIRST_MARK, MAX_TASKS, NOBODY, Draws, Owners
from hub_magmax.methods.selection.streams import ALIGN, DROP, FILL

#: More tasks have no compiled loops.
_COMPILED_TASKS = 32


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
    owners, codes = _rank_tasks(chunks, quotas)
    draws = Draws(owners, codes, generator, is_compiled=chunks.is_compiled, num_threads=chunks.num_threads)
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
        _fill_aligned(owners, draws, held, quotas)
        unaligned = _fill_unaligned(draws, held, quotas)
    assert held == list(quotas)
    return Selection(owner=owners.owner, counts=tuple(held), num_unaligned=tuple(unaligned))


def _rank_tasks(chunks: Chunks, quotas: Sequence[int]) -> tuple[Owners, Shaped[np.ndarray, " elements"]]:
    """Return each element's winner, and a code of the tasks that own it as later ones drop it.

    Bit t of a code says that task t is the largest in magnitude among tasks 0 to t, later tasks first
    among equals. So the highest bit is the winner and the next lower bit is the owner after that.
    Bit 0 would always be set. It says instead that task 0 wins, and then one other bit stands for the
    largest among tasks 1 and above, which the last step asks for.
    """
    num_tasks = chunks.num_tasks
    owners = Owners(chunks.num_elements, chunks.scratch)
    codes = chunks.scratch.zeros(chunks.num_elements, _code_type(num_tasks))
    if num_tasks == 1:
        return owners, codes
    if chunks.is_compiled and num_tasks <= _COMPILED_TASKS:
        _rank_compiled(chunks, quotas, owners.owner, codes)
        return owners, codes
    for start, block in blocks(chunks):
        end = start + block.shape[1]
        magnitudes = [
            np.abs(row) if quota else np.zeros_like(row) for row, quota in zip(block, quotas, strict=True)
        ]
        owners.owner[start:end], codes[start:end] = _rank_block(magnitudes, codes.dtype)
    return owners, codes


def _rank_compiled(
    chunks: Chunks,
    quotas: Sequence[int],
    owner: UInt8[np.ndarray, " elements"],
    codes: Shaped[np.ndarray, " elements"],
) -> None:
    wanted = (np.array(quotas) > 0).astype(np.uint8)

    def rank(part: Iterator[tuple[int, RawChunk]]) -> None:
        for start, chunk in part:
            end = start + chunk.num_elements
            chunk.check_bits(cache.rank(*chunk.bits(), wanted, owner[start:end], codes[start:end]))

    list(chunks.map(rank))


def _rank_block(
    magnitudes: Sequence[Float32[np.ndarray, " block"]], dtype: np.dtype[Any]
) -> tuple[UInt8[np.ndarray, " block"], Shaped[np.ndarray, " block"]]:
    """Return winners and codes of one block, from at least two tasks.

    In numpy, whose comparisons cost .04 ns per element where torch's cost 1.2: 2 ns in all for five
    tasks, against 22.
    """
    first, best = magnitudes[:2]
    best_task = np.ones(first.shape, dtype=np.uint8)
    code = (best >= first).astype(dtype) << 1
    for task, magnitude in enumerate(magnitudes[2:], start=2):
        rises = magnitude >= best
        # Tasks come in order, so the largest number is the latest rise.
        np.maximum(best_task, rises.view(np.uint8) * np.uint8(task), out=best_task)
        code |= (rises & (magnitude >= first)).astype(dtype) << task
        best = np.maximum(best, magnitude)
    first_wins = first > best
    # Where task 0 wins, no other task reached it and the code is still empty.
    alone = np.array([(1 << task) | 1 for task in range(len(magnitudes))], dtype=dtype)
    code |= np.take(alone, best_task, mode="clip") * first_wins
    return best_task * ~first_wins, code


def _code_type(num_tasks: int) -> np.dtype[Any]:
    """Return the smallest unsigned type with a bit per task."""
    return np.dtype(next(f"u{size}" for size in (1, 2, 4, 8) if num_tasks <= 8 * size))


def _fill_aligned(owners: Owners, draws: Draws, held: list[int], quotas: Sequence[int]) -> None:
    """Give short tasks, last first, the dropped elements on which they are largest; free the rest."""
    for task in range(len(held) - 1, 0, -1):
        value, total = FIRST_MARK + task, draws.count(FIRST_MARK + task)
        taken = min(quotas[task] - held[task], total)
        if taken:
            draws.give(value, taken, total, stream=ALIGN + task, mask=0, mark=task)
            held[task] += taken
        if total > taken:
            owners.replace(value, NOBODY)


def _fill_unaligned(draws: Draws, held: list[int], quotas: Sequence[int]) -> list[int]:
    """Give short tasks, second first, what nobody took, at random; return how much each was given."""
    short = [quota - have for quota, have in zip(quotas, held, strict=True)]
    for task, count in enumerate(short):
        if count:
            draws.give(NOBODY, count, sum(short[task:]), stream=FILL + task, mask=0, mark=task)
            held[task] += count
    return short
