"""Which task each element of a tensor is taken from.

A tensor's task vectors arrive as chunks that can be read several times, so that a tensor of any size
needs a few bytes per element. Tasks are numbered from zero here, in the order they were learned.
Every decision rests on exact comparisons of correctly rounded numbers and on keys drawn by element
index, so chunk sizes and thread counts cannot change it.

Source: MAGMAX (arXiv:2407.06322), Tunable MAGMAX (arXiv:2605.20803).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped, UInt8
from torch import Tensor

from hub_magmax.errors import RecipeError
from hub_magmax.randomness import CounterGenerator

# Elements decided at a time: temporaries of this size stay in the cache.
_BLOCK_ELEMENTS = 1 << 16
# Tensors of up to this many numbers (tasks times elements) are read once and held.
_HELD_NUMBERS = 1 << 20
# A code has a bit for every task.
_MAX_TASKS = 64

# Streams of a generator, one for each use and task.
_DROP, _ALIGN, _FILL, _SHARE, _SAMPLE, _ORDER = range(0, 6 * 256, 256)


#: One task vector per task: a list of rows, or a tensor with the tasks along its first axis.
Rows = Sequence[Float32[Tensor, "*shape"]] | Float32[Tensor, " tasks *shape"]


@runtime_checkable
class Chunks(Protocol):
    """One tensor's stacked task vectors, flattened, in order; iterating starts from the beginning.

    Yields the index of a chunk's first element and the chunk, on the CPU. Values must be finite.
    A chunk must keep its values while later ones are read.
    """

    @property
    def num_tasks(self) -> int: ...

    @property
    def num_elements(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, Float32[Tensor, "tasks chunk"]]]: ...


@dataclass(frozen=True)
class ArrayChunks:
    """Task vectors in memory, cut into chunks of `chunk_elements`."""

    task_vectors: Float32[Tensor, " tasks *shape"]
    chunk_elements: int = 1 << 18

    @property
    def num_tasks(self) -> int:
        return self.task_vectors.shape[0]

    @property
    def num_elements(self) -> int:
        return math.prod(self.task_vectors.shape[1:])

    def __iter__(self) -> Iterator[tuple[int, Float32[Tensor, "tasks chunk"]]]:
        flat = self.task_vectors.reshape(self.num_tasks, self.num_elements)
        for start in range(0, self.num_elements, self.chunk_elements):
            yield start, flat[:, start : start + self.chunk_elements]


@dataclass(frozen=True)
class Selection:
    """What a rule decided for one tensor.

    Attributes:
        winners: The task (from zero) that each element is taken from; CPU.
        counts: Elements per task; equal to the quotas.
        num_unaligned: Elements per task that `algorithm_1` filled without regard to magnitude.
        duality_gap: `top_n` only: how far at most the kept magnitude is below the optimum, as a
            fraction of it.
        prices: `top_n` only: what each task's magnitudes are lowered by before the largest wins, in
            the unit of the task vectors; the lowest is 0, and a task without a quota has infinity.
    """

    winners: UInt8[Tensor, " elements"]
    counts: tuple[int, ...]
    num_unaligned: tuple[int, ...]
    duality_gap: float | None = None
    prices: tuple[float, ...] | None = None


def quotas(preference: Sequence[float], num_elements: int) -> tuple[int, ...]:
    """Split one tensor's elements between tasks in proportion to their preference.

    Shares are floored; the elements left over go one each to the first tasks with a positive weight.
    A weight is read as the number it was written as: 0.29 of 100 elements is 29, and 1/6 of 6 is 1,
    although the nearest floats lie below 29/100 and 1/6. Where the weights sum to one only nearly, so
    that the floored shares exceed the elements or leave more than one for each task, the shares are
    first divided by that sum.

    Args:
        preference: Non-negative, sums to 1 within 1e-6.
        num_elements: Elements in the tensor, at least 0.

    Returns:
        Counts that sum to `num_elements`; a weight of zero gets none, a one-hot preference all.

    Raises:
        RecipeError: If `preference` is negative, non-finite, or does not sum to 1.

    Source: the released code of Tunable MAGMAX (arXiv:2605.20803), except that it may hand a
    left-over element to a task with weight zero.
    """
    weights = _as_written(preference)
    wanted = [task for task, weight in enumerate(weights) if weight > 0]
    shares = [math.floor(weight * num_elements) for weight in weights]
    if not 0 <= num_elements - sum(shares) <= len(wanted):
        total = sum(weights)
        shares = [math.floor(weight * num_elements / total) for weight in weights]
    for task in wanted[: num_elements - sum(shares)]:
        shares[task] += 1
    return tuple(shares)


def _as_written(preference: Sequence[float]) -> list[Fraction]:
    """Check a preference, and turn each weight into the fraction that it stands for."""
    weights = [float(weight) for weight in preference]
    hint = "Give every task a non-negative weight, so that the weights sum to 1."
    for task, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            what = f"the weight of task {task + 1} is {weight}"
            raise RecipeError(what, where="preference", expected="a number from 0 to 1", hint=hint)
    if abs(math.fsum(weights) - 1) > 1e-6:
        what = f"the {len(weights)} weights sum to {math.fsum(weights):.9g}"
        raise RecipeError(what, where="preference", expected="a sum of 1 within 1e-6", hint=hint)
    return [_simplest_fraction(weight) for weight in weights]


@lru_cache(maxsize=256)
def _simplest_fraction(weight: float) -> Fraction:
    """Return p/q with q up to a million if it is within a few roundings, else the decimal as printed.

    Kept, because it takes longer than the rest of a small tensor's quotas, for the same few weights.
    """
    simple = Fraction(weight).limit_denominator(1_000_000)
    # 2**-50 relative: a weight like 1/6 may come from a division or two.
    close = abs(simple - Fraction(weight)) <= Fraction(weight) / 2**50
    return simple if close else Fraction(repr(weight))


def largest_magnitude(rows: Rows) -> UInt8[Tensor, "*shape"]:
    """Return MAGMAX's winners: the task of largest magnitude, the later one where they are equal.

    Args:
        rows: One task vector per task.

    Raises:
        RecipeError: If there are more than 255 tasks.

    Source: MAGMAX (arXiv:2407.06322).
    """
    _check_task_count(len(rows), limit=255)
    best = rows[0].abs()
    # Winners as floats until the end: torch's compiler vectorises a choice of floats, not of bytes.
    winners = torch.zeros_like(best)
    for task, row in enumerate(rows):
        magnitude = row.abs()
        larger = magnitude >= best
        winners = torch.where(larger, float(task), winners)
        best = torch.where(larger, magnitude, best)
    return winners.to(torch.uint8)


def _check_task_count(num_tasks: int, limit: int) -> None:
    if num_tasks > limit:
        what = f"this rule was given {num_tasks} tasks"
        hint = f"Merge the {limit} tasks that matter most, or choose a method that averages."
        raise RecipeError(what, where="tasks", expected=f"at most {limit}", hint=hint)


def _blocks(chunks: Chunks) -> Iterator[tuple[int, Float32[Tensor, "tasks block"]]]:
    """Cut chunks of any size again, at multiples of the block size."""
    pieces: list[Tensor] = []
    start = num_pending = 0
    for _, chunk in chunks:
        taken = 0
        while taken < chunk.shape[1]:
            piece = chunk[:, taken : taken + _BLOCK_ELEMENTS - num_pending]
            pieces.append(piece)
            taken += piece.shape[1]
            num_pending += piece.shape[1]
            if num_pending == _BLOCK_ELEMENTS:
                yield start, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
                start, num_pending, pieces = start + num_pending, 0, []
    if num_pending:
        yield start, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _where(mask: Bool[Tensor, " elements"]) -> Int64[Tensor, " count"]:
    """Return the positions at which a mask is set; numpy does it several times faster than torch."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


# What `_Owners` holds besides the tasks 0 to 63: marks from 64, and two with one meaning for all.
_FIRST_MARK = 64
_NOBODY = 254
_PICKED = 255

_Keys = Callable[[Int64[Tensor, " count"]], Int64[Tensor, " count"]]


class _Owners:
    """Who holds each element of one tensor: one byte each, changed in place, a block at a time.

    A byte is a task, or a mark of 64 and above that its user gives a meaning.
    """

    def __init__(self, num_elements: int) -> None:
        self.owner = torch.zeros(num_elements, dtype=torch.uint8)

    def blocks(self) -> Iterator[tuple[int, UInt8[Tensor, " block"]]]:
        for start in range(0, self.owner.numel(), _BLOCK_ELEMENTS):
            yield start, self.owner[start : start + _BLOCK_ELEMENTS]

    def replace(self, old: int, new: int) -> None:
        for _, block in self.blocks():
            block.index_fill_(0, _where(block == old), new)

    def rename(self, names: UInt8[np.ndarray, " values"]) -> None:
        """Turn every byte into its entry of `names`."""
        for _, block in self.blocks():
            np.take(names, block.numpy(), out=block.numpy(), mode="clip")

    def count(self, num_tasks: int) -> list[int]:
        counts = torch.zeros(num_tasks, dtype=torch.int64)
        for _, block in self.blocks():
            counts += torch.bincount(block, minlength=num_tasks)
        return counts.tolist()

    def pick(self, value: int, count: int, total: int, keys: _Keys) -> None:
        """Turn `value` into `_PICKED` for the `count` elements of smallest key among its `total`.

        Keys are uniform, so the largest key to pick is known within a few standard deviations: one
        pass picks everything below that window and collects the window, which is then sorted.
        """
        if count == total:
            self.replace(value, _PICKED)
            return
        margin = 6 * math.sqrt(count * (total - count) / total) + 16
        low, high = (_key_at((count + sign * margin) / total) for sign in (-1, 1))
        if not self._pick_within(value, count, keys, low, high):
            self.replace(_PICKED, value)
            self._pick_within(value, count, keys, _key_at(0.0), _key_at(1.0))

    def _pick_within(self, value: int, count: int, keys: _Keys, low: int, high: int) -> bool:
        """Pick if the largest key to pick lies from `low` to `high`; say whether it did."""
        window_positions, window_keys = [], []
        for start, block in self.blocks():
            local = _where(block == value)
            key = keys(local + start)
            below = _where(key < low)
            block.index_fill_(0, local[below], _PICKED)
            count -= below.numel()
            inside = _where((key >= low) & (key <= high))
            window_positions.append(local[inside] + start)
            window_keys.append(key[inside])
        order = torch.cat(window_keys).argsort()
        if not 0 <= count <= order.numel():
            return False
        self.owner.index_fill_(0, torch.cat(window_positions)[order[:count]], _PICKED)
        return True


def _key_at(fraction: float) -> int:
    """Return the key below which `fraction` of all keys lie, the smallest or largest at the ends."""
    if fraction >= 1:
        return 2**63 - 1
    return int(max(fraction, 0.0) * 2**64) - 2**63


def _keys(generator: CounterGenerator, stream: int) -> _Keys:
    return lambda positions: generator.bits_at(positions, stream)


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
    _check_task_count(num_tasks, limit=_MAX_TASKS)
    owners, codes = _rank_tasks(chunks, quotas)
    held = owners.count(num_tasks)
    for task in range(num_tasks - 1, 0, -1):
        if held[task] > quotas[task]:
            _drop(owners, task, held, quotas, generator)
            received = _hand_over(owners, codes, below=task, mark=0)
            held = [have + more for have, more in zip(held, received, strict=False)]
    unaligned = [0] * num_tasks
    if held[0] > quotas[0]:
        _drop(owners, 0, held, quotas, generator)
        available = _hand_over(owners, codes, below=num_tasks, mark=_FIRST_MARK)
        _fill_aligned(owners, held, available, quotas, generator)
        unaligned = _fill_unaligned(owners, held, quotas, generator)
    assert held == list(quotas)
    return Selection(winners=owners.owner, counts=tuple(held), num_unaligned=tuple(unaligned))


def _rank_tasks(chunks: Chunks, quotas: Sequence[int]) -> tuple[_Owners, Shaped[Tensor, " elements"]]:
    """Return each element's winner, and a code of the tasks that own it as later ones drop it.

    Bit t of a code says that task t is the largest in magnitude among tasks 0 to t, later tasks first
    among equals. So the highest bit is the winner and the next lower bit is the owner after that.
    Bit 0 would always be set. It says instead that task 0 wins, and then one other bit stands for the
    largest among tasks 1 and above, which the last step asks for.
    """
    num_tasks = chunks.num_tasks
    owners = _Owners(chunks.num_elements)
    dtype = _code_type(num_tasks)
    codes = torch.zeros(chunks.num_elements, dtype=dtype)
    if num_tasks == 1:
        return owners, codes
    for start, block in _blocks(chunks):
        end = start + block.shape[1]
        magnitudes = [
            row.abs() if quota else torch.zeros_like(row) for row, quota in zip(block, quotas, strict=True)
        ]
        owners.owner[start:end], codes[start:end] = _rank_block(magnitudes, dtype)
    return owners, codes


def _rank_block(
    magnitudes: list[Float32[Tensor, " block"]], dtype: torch.dtype
) -> tuple[UInt8[Tensor, " block"], Shaped[Tensor, " block"]]:
    """Return winners and codes of one block, from at least two tasks."""
    first, best = magnitudes[:2]
    powers = _powers(len(magnitudes), dtype)
    best_task = torch.ones_like(first, dtype=torch.uint8)
    code = (best >= first).to(dtype) * powers[1]
    for task, magnitude in enumerate(magnitudes[2:], start=2):
        rises = magnitude >= best
        # Tasks come in order, so the largest number is the latest rise.
        best_task = torch.maximum(best_task, rises.view(torch.uint8) * task)
        code |= (rises & (magnitude >= first)).to(dtype) * powers[task]
        best = torch.maximum(best, magnitude)
    first_wins = first > best
    # Where task 0 wins, no other task reached it and the code is still empty.
    alone = np.array(powers, dtype=str(dtype).removeprefix("torch.")) | 1
    code |= torch.from_numpy(np.take(alone, best_task.numpy(), mode="clip")) * first_wins
    return best_task * ~first_wins, code


def _code_type(num_tasks: int) -> torch.dtype:
    """Return the smallest integer type with a bit per task."""
    wide = torch.int32 if num_tasks <= 32 else torch.int64
    return torch.uint8 if num_tasks <= 8 else torch.int16 if num_tasks <= 16 else wide


def _powers(num_tasks: int, dtype: torch.dtype) -> list[int]:
    """Return the code of each task alone."""
    return [_as_code(1 << task, dtype) for task in range(num_tasks)]


def _as_code(bits: int, dtype: torch.dtype) -> int:
    """Read a bit pattern as a number of this type: the highest bit of a signed one is negative."""
    return bits if bits <= torch.iinfo(dtype).max else bits - (1 << 8 * dtype.itemsize)


def _highest_bit(codes: Shaped[Tensor, " count"]) -> UInt8[Tensor, " count"]:
    """Return the place of each code's highest bit, 0 where no bit is set."""
    lengths = np.array([byte.bit_length() for byte in range(256)], dtype=np.uint8)
    highest = torch.zeros_like(codes, dtype=torch.uint8)
    for shift in range(0, 8 * codes.element_size(), 8):
        byte = ((codes >> shift) & 255).to(torch.uint8)
        length = torch.from_numpy(np.take(lengths, byte.numpy(), mode="clip"))
        highest = torch.maximum(highest, (length + (shift - 1)) * (length > 0))
    return highest


def _drop(
    owners: _Owners, task: int, held: list[int], quotas: Sequence[int], generator: CounterGenerator
) -> None:
    """Pick a task's surplus at random, and take it off its holding."""
    surplus = held[task] - quotas[task]
    owners.pick(task, surplus, held[task], _keys(generator, _DROP + task))
    held[task] -= surplus


def _hand_over(owners: _Owners, codes: Shaped[Tensor, " elements"], below: int, mark: int) -> list[int]:
    """Give the picked elements to the next task below `below` in their codes, plus `mark`; count them."""
    # Without bit 0: it names no owner, and no other bit means task 0.
    mask = _as_code((1 << below) - 2, codes.dtype)
    received = torch.zeros(_MAX_TASKS, dtype=torch.int64)
    for start, block in owners.blocks():
        local = _where(block == _PICKED)
        heirs = _highest_bit(codes[start : start + block.numel()][local] & mask)
        block[local] = heirs + mark
        received += torch.bincount(heirs, minlength=_MAX_TASKS)
    return received.tolist()


def _fill_aligned(
    owners: _Owners,
    held: list[int],
    available: list[int],
    quotas: Sequence[int],
    generator: CounterGenerator,
) -> None:
    """Give short tasks, last first, the dropped elements on which they are largest; free the rest."""
    for task in range(len(held) - 1, 0, -1):
        taken = min(quotas[task] - held[task], available[task])
        if taken:
            owners.pick(_FIRST_MARK + task, taken, available[task], _keys(generator, _ALIGN + task))
            owners.replace(_PICKED, task)
            held[task] += taken
        if available[task] > taken:
            owners.replace(_FIRST_MARK + task, _NOBODY)


def _fill_unaligned(
    owners: _Owners, held: list[int], quotas: Sequence[int], generator: CounterGenerator
) -> list[int]:
    """Give short tasks, second first, what nobody took, at random; return how much each was given."""
    short = [quota - have for quota, have in zip(quotas, held, strict=True)]
    for task, count in enumerate(short):
        if count:
            owners.pick(_NOBODY, count, sum(short[task:]), _keys(generator, _FILL + task))
            owners.replace(_PICKED, task)
            held[task] += count
    return short


# Magnitudes are rounded to whole numbers of this many bits, relative to the tensor's largest. Sums and
# differences of them and of prices are then exact in float64, so equal means equal.
_GRID_BITS = 44
# Markets of up to this many elements are solved at once; larger ones start from a sample of themselves.
_DIRECT_ELEMENTS = 1 << 12
_MIN_SAMPLE = 1 << 11
# Standard deviations of a sample's counts by which its prices may at first be wrong.
_DEVIATIONS = 3.0
_MAX_ATTEMPTS = 4
# Elements of a sample that must be alike to be treated as a group, and how many groups there can be.
_MIN_GROUP = 16
_MAX_GROUPS = _NOBODY - _FIRST_MARK


def top_n(chunks: Chunks, quotas: Sequence[int], generator: CounterGenerator) -> Selection:
    """Select so that the kept magnitude is the largest that the quotas allow.

    Every task has a price, and an element goes to the task whose magnitude exceeds its price the most:
    winner = argmax_t |τ_t| − p_t. Prices under which the counts equal the quotas are optimal: they
    solve the dual of a transportation problem. With equal prices this is MAGMAX. Elements that are
    worth the same to several tasks are shared out between these at random.

    Prices are found on a sample, together with bounds on their error. One pass over all elements
    settles those whose winner no such error can change; the same method solves the market of the
    others. Magnitudes are compared at a resolution of 2**-44 of the tensor's largest, and at that
    resolution the result is optimal unless samples misled every attempt. `duality_gap` is measured
    afterwards on all elements and says what holds. Task vectors that are multiples of each other
    make it slow: then every price depends on every other.

    Args:
        chunks: Read once if small, three times otherwise, and twice more if a sample misleads. Besides
            a byte per element, some per cent of the elements are kept in memory.
        quotas: Elements per task, as `quotas` returns them. A task without a quota never wins.
        generator: Draws the samples and decides between equals.

    Returns:
        The selection; its counts equal `quotas`.

    Raises:
        RecipeError: If more than 64 tasks have a quota.

    Source: ours.
    """
    assert len(quotas) == chunks.num_tasks and sum(quotas) == chunks.num_elements
    active = tuple(task for task, quota in enumerate(quotas) if quota)
    _check_task_count(len(active), limit=_MAX_TASKS)
    if len(active) <= 1:
        return _describe(quotas, active, (0.0,) * len(active), _Owners(chunks.num_elements), 0.0)
    chunks = _hold(chunks)
    source = _survey(chunks, active, generator)
    wanted = np.array([quotas[task] for task in active], dtype=np.int64)
    allocation = _solve(_Market(source, _Groups.none(len(active)), wanted, np.zeros(len(active))))
    assert allocation is not None
    prices = tuple((allocation.prices - allocation.prices.min()).tolist())
    unscaled = tuple(price / source.scale for price in prices)
    gap = _duality_gap(chunks, active, allocation.owners, unscaled)
    return _describe(quotas, active, unscaled, allocation.owners, gap)


def _describe(
    quotas: Sequence[int],
    active: tuple[int, ...],
    prices: tuple[float, ...],
    owners: _Owners,
    gap: float,
) -> Selection:
    """Turn a solution among the active tasks into one among all tasks."""
    price_of = dict(zip(active, prices, strict=True))
    owners.rename(np.array(active or (0,), dtype=np.uint8))
    return Selection(
        winners=owners.owner,
        counts=tuple(quotas),
        num_unaligned=(0,) * len(quotas),
        duality_gap=gap,
        prices=tuple(price_of.get(task, math.inf) for task in range(len(quotas))),
    )


def _hold(chunks: Chunks) -> Chunks:
    """Read a small tensor into memory."""
    if isinstance(chunks, ArrayChunks) or chunks.num_tasks * chunks.num_elements > _HELD_NUMBERS:
        return chunks
    return ArrayChunks(torch.cat([chunk for _, chunk in chunks], dim=1))


def _duality_gap(
    chunks: Chunks, active: tuple[int, ...], owners: _Owners, prices: tuple[float, ...]
) -> float:
    """Return how much the kept magnitude could at most grow, as a fraction of it.

    With counts equal to quotas, dual minus primal value is the sum over elements of what the winner
    falls short of the best task, both net of prices; so nothing cancels.
    """
    price = torch.tensor(prices, dtype=torch.float64)
    regrets, kept = [], []
    for start, block in _blocks(chunks):
        values = _magnitudes(block, active)
        owner = owners.owner[start : start + block.shape[1]].to(torch.int64)
        chosen = values.gather(0, owner[None])[0].to(torch.float64)
        best = values[0].to(torch.float64) - prices[0]
        for row, row_price in zip(values[1:], prices[1:], strict=True):
            best = torch.maximum(best, row.to(torch.float64) - row_price)
        # numpy sums on one thread, in an order that depends on the number of elements only.
        regrets.append(float((best - (chosen - price[owner])).numpy().sum()))
        kept.append(float(chosen.numpy().sum()))
    regret, total = math.fsum(regrets), math.fsum(kept)
    return regret / total if total else (math.inf if regret else 0.0)


@dataclass(frozen=True)
class _Stock:
    """Elements in memory: their magnitudes, one row per task, and their places in the tensor."""

    values: Float32[Tensor, "tasks elements"]
    places: Int64[Tensor, " elements"]
    scale: float
    generator: CounterGenerator

    @property
    def num_elements(self) -> int:
        return self.values.shape[1]

    def magnitudes(self) -> Iterator[tuple[int, Float32[Tensor, "tasks block"]]]:
        for start in range(0, self.num_elements, _BLOCK_ELEMENTS):
            yield start, self.values[:, start : start + _BLOCK_ELEMENTS]

    def take(self, chosen: Int64[Tensor, " chosen"]) -> _Stock:
        return _Stock(self.values.index_select(1, chosen), self.places[chosen], self.scale, self.generator)

    def sample(self) -> _Stock:
        return self.take(_strata(self.num_elements, self.generator))

    def places_of(self, positions: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
        return self.places[positions]


@dataclass(frozen=True)
class _Stream:
    """All elements of a tensor, read from its chunks, and the sample that was taken of them."""

    chunks: Chunks
    active: tuple[int, ...]
    surveyed: _Stock

    @property
    def scale(self) -> float:
        return self.surveyed.scale

    @property
    def generator(self) -> CounterGenerator:
        return self.surveyed.generator

    @property
    def num_elements(self) -> int:
        return self.chunks.num_elements

    def magnitudes(self) -> Iterator[tuple[int, Float32[Tensor, "tasks block"]]]:
        for start, block in _blocks(self.chunks):
            yield start, _magnitudes(block, self.active)

    def sample(self) -> _Stock:
        return self.surveyed

    def places_of(self, positions: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
        return positions


_Source = _Stock | _Stream


def _magnitudes(
    block: Float32[Tensor, "tasks block"], active: tuple[int, ...]
) -> Float32[Tensor, "active block"]:
    return (block if len(active) == block.shape[0] else block[list(active)]).abs()


def _on_grid(values: Float32[Tensor, "tasks count"], scale: float) -> Float64[Tensor, "tasks count"]:
    """Return magnitudes as whole multiples of the resolution."""
    return values.to(torch.float64).mul_(scale).round_()


def _survey(chunks: Chunks, active: tuple[int, ...], generator: CounterGenerator) -> _Source:
    """Read a tensor once: all of it if it is small, else its largest magnitude and a sample."""
    num_elements = chunks.num_elements
    small = num_elements <= _DIRECT_ELEMENTS
    places = torch.arange(num_elements) if small else _strata(num_elements, generator)
    sample = torch.empty((len(active), len(places)))
    largest = 0.0
    for start, block in _blocks(chunks):
        values = _magnitudes(block, active)
        largest = max(largest, values.max().item())
        begin, end = torch.searchsorted(places, torch.tensor([start, start + block.shape[1]])).tolist()
        sample[:, begin:end] = values.index_select(1, places[begin:end] - start)
    scale = math.ldexp(1.0, _GRID_BITS - math.frexp(largest)[1])
    stock = _Stock(sample, places, scale, generator)
    return stock if small else _Stream(chunks, active, stock)


def _strata(num_elements: int, generator: CounterGenerator) -> Int64[Tensor, " sample"]:
    """Draw one position from each of equal parts, many enough that sample and rest cost about the same."""
    size = max(_MIN_SAMPLE, int(2 * num_elements ** (2 / 3)))
    edges = torch.arange(size + 1) * num_elements // size
    offsets = generator.uniform(0, size, _SAMPLE) * (edges[1:] - edges[:-1])
    return edges[:-1] + offsets.to(torch.int64)


@dataclass(frozen=True)
class _Groups:
    """Alike elements, counted: a row of values per task (−inf: never) and a size for each group."""

    rows: Float64[np.ndarray, "tasks groups"]
    sizes: Int64[np.ndarray, " groups"]

    @classmethod
    def none(cls, num_tasks: int) -> _Groups:
        return cls(np.empty((num_tasks, 0)), np.empty(0, dtype=np.int64))

    def and_also(self, other: _Groups) -> _Groups:
        rows = np.concatenate((self.rows, other.rows), axis=1)
        return _Groups(rows, np.concatenate((self.sizes, other.sizes)))


@dataclass(frozen=True)
class _Market:
    """Elements and groups to be shared out, what each task must get, and a first guess of the prices.

    Prices and quotas are of the active tasks; prices are on the grid.
    """

    source: _Source
    groups: _Groups
    quotas: Int64[np.ndarray, " tasks"]
    guess: Float64[np.ndarray, " tasks"]


def _in_memory(market: _Market) -> _Stock:
    assert isinstance(market.source, _Stock)
    return market.source


@dataclass(frozen=True)
class _Allocation:
    """Who gets each element, how many of each group, and prices that make this the best choice."""

    owners: _Owners
    shares: Int64[np.ndarray, "groups tasks"]
    prices: Float64[np.ndarray, " tasks"]


@dataclass(frozen=True)
class _Box:
    """Prices, and how far below and above them the right ones may lie."""

    prices: Float64[np.ndarray, " tasks"]
    down: Float64[np.ndarray, " tasks"]
    up: Float64[np.ndarray, " tasks"]

    def contains(self, prices: Float64[np.ndarray, " tasks"]) -> bool:
        """Say whether prices lie in the box when a number is added to all of them: only differences count."""
        moved = prices - self.prices
        return bool((moved - self.up).max() <= (moved + self.down).min())


@dataclass(frozen=True)
class _Split:
    """A market after one pass: settled elements, and the market of the rest.

    `owners` has the winners of settled elements, and a mark for the members of each group.
    """

    owners: _Owners
    positions: Int64[Tensor, " rest"]
    groups: _Groups
    rest: _Market


def _solve(market: _Market) -> _Allocation | None:
    """Allocate a market to the exact quotas, at the best total; None if groups make that impossible."""
    if market.source.num_elements <= _DIRECT_ELEMENTS:
        return _solve_directly(market)
    sample = _sample_market(market)
    estimate = _solve(sample)
    prices = market.guess if estimate is None else estimate.prices
    allocation = None
    for attempt in range(_MAX_ATTEMPTS):
        box = _box(sample, prices, _DEVIATIONS * 4**attempt)
        split = _split(market, box, _in_memory(sample))
        rest = _solve_rest(split, market.source.num_elements)
        if rest is not None:
            allocation = _merge(market, split, rest)
            if box.contains(rest.prices) or _is_best(market.source, allocation):
                return allocation
            prices = rest.prices
    if allocation is None:
        everywhere = np.full_like(prices, np.inf)
        split = _split(market, _Box(prices, everywhere, everywhere), _in_memory(sample))
        rest = _solve_directly(split.rest)
        allocation = rest and _merge(market, split, rest)
    return allocation


def _sample_market(market: _Market) -> _Market:
    """Return the market of a sample: groups and quotas shrink with it, but never to nothing."""
    source = market.source.sample()
    ratio = source.num_elements / market.source.num_elements
    sizes = np.maximum(1, np.rint(market.groups.sizes * ratio)).astype(np.int64)
    total = source.num_elements + int(sizes.sum())
    shares = market.quotas * (total / market.quotas.sum())
    quotas = np.maximum(1, np.floor(shares)).astype(np.int64)
    while missing := total - int(quotas.sum()):
        largest = int(quotas.argmax())
        quotas[largest] += max(missing, 1 - int(quotas[largest]))
    return _Market(source, _Groups(market.groups.rows, sizes), quotas, market.guess)


def _box(sample: _Market, prices: Float64[np.ndarray, " tasks"], deviations: float) -> _Box:
    """Bound the error of prices that solve a sample.

    A sample's count above the right price is off by a few standard deviations, so the right price lies
    between the elements that many ranks above and below the quota.
    """
    rows, sizes = _in_a_table(_in_memory(sample), sample.groups)
    reduced = rows - prices[:, None]
    total = int(sample.quotas.sum())
    down, up = np.empty_like(prices), np.empty_like(prices)
    for task, quota in enumerate(sample.quotas.tolist()):
        gains = reduced[task] - np.delete(reduced, task, axis=0).max(axis=0)
        spread = math.sqrt(quota * (total - quota) / total)
        ranks = math.ceil(deviations * spread + deviations**2 / 2)
        highest, lowest = _ranked(gains, sizes, (quota - ranks, quota + ranks))
        up[task], down[task] = max(0.0, highest), max(0.0, -lowest)
    return _Box(prices, down, up)


def _in_a_table(
    stock: _Stock, groups: _Groups
) -> tuple[Float64[np.ndarray, "tasks count"], Int64[np.ndarray, " count"] | None]:
    """Return the values of single elements and then of groups, and their sizes if there are groups."""
    values = _on_grid(stock.values, stock.scale).numpy()
    if not len(groups.sizes):
        return values, None
    sizes = np.concatenate((np.ones(stock.num_elements, dtype=np.int64), groups.sizes))
    return np.concatenate((values, groups.rows), axis=1), sizes


def _ranked(
    values: Float64[np.ndarray, " count"],
    sizes: Int64[np.ndarray, " count"] | None,
    ranks: tuple[int, ...],
) -> list[float]:
    """Return the values of some ranks, 1 for the largest, counting each as often as its size says.

    Beyond the ends values are infinite.
    """
    if sizes is None:
        inside = [len(values) - rank for rank in ranks if 1 <= rank <= len(values)]
        ordered = np.partition(values, inside)[::-1] if inside else values
        places = [rank - 1 for rank in ranks]
    else:
        order = (-values).argsort(kind="stable")
        ordered = values[order]
        places = np.searchsorted(sizes[order].cumsum(), ranks).tolist()
    return [
        math.inf if rank < 1 else float(ordered[place]) if place < len(values) else -math.inf
        for rank, place in zip(ranks, places, strict=True)
    ]


def _split(market: _Market, box: _Box, sample: _Stock) -> _Split:
    """Settle the elements whose winner is the same everywhere in the box, and group and collect the rest."""
    source, num_tasks = market.source, len(box.prices)
    bottoms = _rounded_outwards(box.prices - box.down, source.scale, -1)
    tops = _rounded_outwards(box.prices + box.up, source.scale, 1)
    grouping = _Grouping(box, sample)
    owners = _Owners(source.num_elements)
    counts = torch.zeros(256, dtype=torch.int64)
    rest = _Rest(num_tasks)
    for start, values in source.magnitudes():
        owner, open_ = _settle(values, bottoms, tops)
        candidates = values.index_select(1, open_)
        owner[open_] = grouping.marks(_on_grid(candidates, source.scale))
        owners.owner[start : start + owner.numel()] = owner
        counts += torch.bincount(owner, minlength=256)
        single = _where(owner[open_] == _NOBODY)
        rest.add(open_[single] + start, candidates.index_select(1, single))
    positions, collected = rest.take()
    stock = _Stock(collected, source.places_of(positions), source.scale, source.generator)
    groups = grouping.groups(counts[_FIRST_MARK:])
    quotas = market.quotas - counts[:num_tasks].numpy()
    inner = _Market(stock, market.groups.and_also(groups), quotas, box.prices)
    return _Split(owners, positions, groups, inner)


class _Rest:
    """Collects positions and columns of values in two buffers that grow.

    Keeping thousands of small tensors between large ones that come and go would leave the heap full of
    holes, ten times as large as what is collected.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._positions, self._values = bytearray(), bytearray()

    def add(self, positions: Int64[Tensor, " count"], values: Float32[Tensor, "tasks count"]) -> None:
        self._positions += positions.numpy().tobytes()
        self._values += values.T.contiguous().numpy().tobytes()

    def take(self) -> tuple[Int64[Tensor, " rest"], Float32[Tensor, "tasks rest"]]:
        positions = np.frombuffer(self._positions, dtype=np.int64)
        values = np.frombuffer(self._values, dtype=np.float32).reshape(-1, self._num_tasks)
        return torch.from_numpy(positions), torch.from_numpy(np.ascontiguousarray(values.T))


def _rounded_outwards(bounds: Float64[np.ndarray, " tasks"], scale: float, direction: int) -> list[float]:
    """Turn bounds on the grid into float32 numbers in the unit of the tensor, never closer."""
    # One more step, because magnitudes are rounded to the grid.
    exact = (bounds + direction) / scale
    with np.errstate(over="ignore", invalid="ignore"):
        near = exact.astype(np.float32)
        closer = (near - exact) * direction < 0
    outwards = np.nextafter(near, np.float32(direction * math.inf))
    return [float(bound) for bound in np.where(closer, outwards, near)]


def _settle(
    values: Float32[Tensor, "tasks block"], bottoms: list[float], tops: list[float]
) -> tuple[UInt8[Tensor, " block"], Int64[Tensor, " open"]]:
    """Return winners, and the elements of which the winner depends on where in the box prices are.

    Rounding to float32 keeps the order of numbers, so a strict inequality here holds exactly.
    """
    best = values[0] - bottoms[0]
    second = torch.full_like(best, -math.inf)
    surest = values[0] - tops[0]
    owner = torch.zeros_like(best, dtype=torch.uint8)
    for task in range(1, len(bottoms)):
        high = values[task] - bottoms[task]
        owner = torch.maximum(owner, (high >= best).view(torch.uint8) * task)
        second = torch.maximum(second, torch.minimum(best, high))
        best = torch.maximum(best, high)
        surest = torch.maximum(surest, values[task] - tops[task])
    return owner, _where(surest <= second)


class _Grouping:
    """Recognise open elements that are alike: the same tasks in reach, at the same distances.

    Exact ties are the common case in 16-bit checkpoints. What is frequent in the sample is a group, and
    its members need a mark instead of a place in the rest.
    """

    def __init__(self, box: _Box, sample: _Stock) -> None:
        self._prices, self._bottoms, self._tops = (
            torch.from_numpy(prices)[:, None]
            for prices in (box.prices, box.prices - box.down, box.prices + box.up)
        )
        distances, codes = self._describe(_on_grid(sample.values, sample.scale))
        shared = codes[_where((distances >= 0).sum(dim=0) > 1)]
        distinct, counts = np.unique(shared.numpy(), return_counts=True)
        frequent = (-counts).argsort(kind="stable")[:_MAX_GROUPS]
        frequent = frequent[counts[frequent] >= _MIN_GROUP]
        self._codes = torch.from_numpy(np.sort(distinct[frequent]))
        examples = [int(_where(codes == code)[0]) for code in self._codes.tolist()]
        self._distances = distances[:, examples]

    def marks(self, values: Float64[Tensor, "tasks open"]) -> UInt8[Tensor, " open"]:
        """Return each element's group as a mark, or `_NOBODY`."""
        if not self._codes.numel():
            return torch.full((values.shape[1],), _NOBODY, dtype=torch.uint8)
        distances, codes = self._describe(values)
        group = torch.searchsorted(self._codes, codes).clamp_max_(self._codes.numel() - 1)
        alike = (self._distances.index_select(1, group) == distances).all(dim=0)
        return (group + _FIRST_MARK).to(torch.uint8).index_fill_(0, _where(~alike), _NOBODY)

    def groups(self, sizes: Int64[Tensor, " marks"]) -> _Groups:
        """Return the groups with their sizes."""
        rows = (self._prices - self._distances).masked_fill_(self._distances < 0, -math.inf)
        return _Groups(rows.numpy(), sizes[: rows.shape[1]].numpy())

    def _describe(
        self, values: Float64[Tensor, "tasks count"]
    ) -> tuple[Float64[Tensor, "tasks count"], Int64[Tensor, " count"]]:
        """Return each task's distance below the best, −1 if out of reach, and a code of them."""
        in_reach = values - self._bottoms >= (values - self._tops).amax(dim=0)
        reduced = values - self._prices
        distances = (reduced.amax(dim=0) + 1 - reduced) * in_reach - 1
        codes = torch.zeros(values.shape[1], dtype=torch.int64)
        for row in distances.to(torch.int64):
            codes ^= row
            codes *= 0x9E3779B97F4A7C15 - 2**64
            codes ^= codes >> 29
        return distances, codes


def _solve_rest(split: _Split, num_elements: int) -> _Allocation | None:
    """Solve the market of the rest; None if a task got more than its quota when elements were settled."""
    if split.rest.quotas.min() < 0:
        return None
    shrunk = split.rest.source.num_elements <= 3 * num_elements // 4
    return _solve(split.rest) if shrunk else _solve_directly(split.rest)


def _merge(market: _Market, split: _Split, rest: _Allocation) -> _Allocation:
    """Fill in the winners of the rest, and share each group's members out at random."""
    source, owners = market.source, split.owners
    num_outer = len(market.groups.sizes)
    owners.owner[split.positions] = rest.owners.owner
    names = np.arange(256, dtype=np.uint8)
    for mark, shares in enumerate(rest.shares[num_outer:].tolist(), start=_FIRST_MARK):
        remaining = sum(shares)
        takers = [task for task, share in enumerate(shares) if share]
        for task in takers[1:]:
            owners.pick(mark, shares[task], remaining, _source_keys(source, _SHARE + task))
            owners.replace(_PICKED, task)
            remaining -= shares[task]
        names[mark] = takers[0] if takers else mark
    owners.rename(names)
    return _Allocation(owners, rest.shares[:num_outer], rest.prices)


def _source_keys(source: _Source, stream: int) -> _Keys:
    return lambda positions: source.generator.bits_at(source.places_of(positions), stream)


def _is_best(source: _Source, allocation: _Allocation) -> bool:
    """Say whether every element is with a task that is best for it at the allocation's prices."""
    prices = torch.from_numpy(allocation.prices)[:, None]
    for start, values in source.magnitudes():
        owner = allocation.owners.owner[start : start + values.shape[1]].to(torch.int64)
        reduced = _on_grid(values, source.scale) - prices
        if (reduced.amax(dim=0) > reduced.gather(0, owner[None])[0]).any():
            return False
    return True


def _solve_directly(market: _Market) -> _Allocation | None:
    """Solve a market in memory: prices by coordinate ascent, then the last elements one by one."""
    stock = _in_memory(market)
    # In the order of their keys, so that "the first of several equals" is a random one.
    order = stock.generator.bits_at(stock.places, _ORDER).argsort()
    rows, sizes = _in_a_table(stock.take(order), market.groups)
    prices = _balance(rows, sizes, market.quotas, market.guess)
    ledger = _Ledger(rows, sizes, prices)
    losses = ledger.settle(market.quotas)
    if losses is None:
        return None
    owner, shares = ledger.outcome(stock.num_elements)
    owners = _Owners(stock.num_elements)
    owners.owner[order] = torch.from_numpy(owner)
    return _Allocation(owners, shares, _lowered(prices, losses))


def _balance(
    rows: Float64[np.ndarray, "tasks count"],
    sizes: Int64[np.ndarray, " count"] | None,
    quotas: Int64[np.ndarray, " tasks"],
    guess: Float64[np.ndarray, " tasks"],
) -> Float64[np.ndarray, " tasks"]:
    """Set one price after the other so that its task meets its quota, while that pays.

    Each step minimises the dual over one price, which is a quantile of the task's gains.
    """
    prices = guess.copy()
    errors: list[int] = []
    # Two sweeps must improve by more than the handful of single moves that cost as much.
    few = len(prices)
    while True:
        errors.append(_sweep(rows, sizes, quotas, prices))
        prices -= prices.min()
        stalled = len(errors) > 2 and errors[-3] - errors[-1] < 2 * few
        if errors[-1] <= few or stalled:
            return prices


def _sweep(
    rows: Float64[np.ndarray, "tasks count"],
    sizes: Int64[np.ndarray, " count"] | None,
    quotas: Int64[np.ndarray, " tasks"],
    prices: Float64[np.ndarray, " tasks"],
) -> int:
    """Correct every price once, in place; return by how many elements counts were off before."""
    later = [np.full(rows.shape[1], -math.inf)]
    for row, price in zip(rows[:0:-1], prices[:0:-1], strict=True):
        later.append(np.maximum(later[-1], row - price))
    earlier = np.full(rows.shape[1], -math.inf)
    error = 0
    for task, quota in enumerate(quotas.tolist()):
        gains = rows[task] - np.maximum(earlier, later.pop())
        above, level = gains > prices[task], gains >= prices[task]
        fewest, most = (int(np.count_nonzero(m) if sizes is None else sizes[m].sum()) for m in (above, level))
        if not fewest <= quota <= most:
            error += max(fewest - quota, quota - most)
            prices[task] = _price_for(gains, sizes, quota, prices[task])
        earlier = np.maximum(earlier, rows[task] - prices[task])
    return error


def _price_for(
    gains: Float64[np.ndarray, " count"], sizes: Int64[np.ndarray, " count"] | None, quota: int, old: float
) -> float:
    """Return a price that the `quota` largest gains reach and no others: midway, or on a tie."""
    low, high = _ranked(gains, sizes, (quota + 1, quota))
    if math.isfinite(low) and math.isfinite(high):
        return float(math.floor((low + high) / 2))
    return float(low if math.isfinite(low) else high if math.isfinite(high) else old)


class _Ledger:
    """Who owns what of a market in memory: lots of one or more alike elements, each with one owner.

    Starts from everyone's best choice. That is optimal for the counts that it has, and stays so when
    elements move along a path of smallest total loss; so at the quotas it is optimal for them.
    """

    def __init__(
        self,
        rows: Float64[np.ndarray, "tasks count"],
        sizes: Int64[np.ndarray, " count"] | None,
        prices: Float64[np.ndarray, " tasks"],
    ) -> None:
        self._num_tasks, num_items = rows.shape
        self._values = np.ascontiguousarray(rows.T)
        self._sizes = np.ones(num_items, dtype=np.int64) if sizes is None else sizes.copy()
        self._items = np.arange(num_items)
        # The last of several best tasks, as MAGMAX has it.
        self._owners = self._num_tasks - 1 - (rows - prices[:, None])[::-1].argmax(axis=0)

    def settle(self, quotas: Int64[np.ndarray, " tasks"]) -> Float64[np.ndarray, "tasks tasks"] | None:
        """Move elements until all quotas are met; return the least loss of moving one more.

        None if groups that some tasks can never own make that impossible.
        """
        counts = np.bincount(self._owners, weights=self._sizes, minlength=self._num_tasks)
        surplus = counts.astype(np.int64) - quotas
        losses = np.stack([self._losses(task) for task in range(self._num_tasks)])
        while surplus.any():
            path = _cheapest_path(losses, surplus)
            if path is None:
                return None
            moved = self._move(path, losses, int(min(surplus[path[0]], -surplus[path[-1]])))
            surplus[path[0]] -= moved
            surplus[path[-1]] += moved
            for task in path:
                losses[task] = self._losses(task)
        return losses

    def outcome(
        self, num_elements: int
    ) -> tuple[UInt8[np.ndarray, " elements"], Int64[np.ndarray, "groups tasks"]]:
        """Return the owners of the single elements, which come first, and the shares of the groups."""
        single = self._items < num_elements
        owners = np.empty(num_elements, dtype=np.uint8)
        owners[self._items[single]] = self._owners[single]
        shares = np.zeros((len(self._values) - num_elements, self._num_tasks), dtype=np.int64)
        at = (self._items[~single] - num_elements, self._owners[~single])
        np.add.at(shares, at, self._sizes[~single])
        return owners, shares

    def _losses(self, task: int) -> Float64[np.ndarray, " tasks"]:
        """Return the least that is lost by moving one of a task's elements to each other task."""
        values = self._values[self._items[np.flatnonzero(self._owners == task)]]
        losses: Float64[np.ndarray, " tasks"] = (values[:, [task]] - values).min(axis=0, initial=math.inf)
        losses[task] = math.inf
        return losses

    def _move(self, path: list[int], losses: Float64[np.ndarray, "tasks tasks"], limit: int) -> int:
        """Move as many elements along the path as its losses hold for, at most `limit`; return how many."""
        moves = []
        for source, target in itertools.pairwise(path):
            lots = np.flatnonzero(self._owners == source)
            values = self._values[self._items[lots]]
            lots = lots[values[:, source] - values[:, target] == losses[source, target]]
            moves.append((lots, target))
            limit = min(limit, int(self._sizes[lots].sum()))
        for lots, target in moves:
            self._give(lots, target, limit)
        return limit

    def _give(self, lots: Int64[np.ndarray, " lots"], target: int, count: int) -> None:
        """Give `count` elements of these lots to a task, the first ones first; split the last lot."""
        totals = np.cumsum(self._sizes[lots])
        last = int(np.searchsorted(totals, count))
        excess = int(totals[last]) - count
        owner = self._owners[lots[last]]
        self._owners[lots[: last + 1]] = target
        if excess:
            self._sizes[lots[last]] -= excess
            self._sizes = np.append(self._sizes, excess)
            self._items = np.append(self._items, self._items[lots[last]])
            self._owners = np.append(self._owners, owner)


def _cheapest_path(
    losses: Float64[np.ndarray, "tasks tasks"], surplus: Int64[np.ndarray, " tasks"]
) -> list[int] | None:
    """Return the path of smallest total loss from a task with surplus to one that is short (Bellman-Ford)."""
    distance = np.where(surplus > 0, 0.0, math.inf)
    parent = np.full(len(surplus), -1)
    for _ in surplus:
        through = distance[:, None] + losses
        best = through.argmin(axis=0)
        reached = through.min(axis=0)
        better = reached < distance
        if not better.any():
            break
        parent[better] = best[better]
        distance[better] = reached[better]
    end = int(np.where(surplus < 0, distance, math.inf).argmin())
    if not math.isfinite(distance[end]):
        return None
    path = [end]
    while parent[path[0]] >= 0:
        path.insert(0, int(parent[path[0]]))
    return path


def _lowered(
    prices: Float64[np.ndarray, " tasks"], losses: Float64[np.ndarray, "tasks tasks"]
) -> Float64[np.ndarray, " tasks"]:
    """Lower prices until nobody's element is better with another task: p_s − p_t ≤ loss of s to t."""
    for _ in prices:
        prices = np.minimum(prices, (prices[None, :] + losses).min(axis=1))
    return prices
