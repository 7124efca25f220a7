"""Who holds each element of a tensor while a rule decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import BLOCK_ELEMENTS
from hub_magmax.methods.selection.streams import Keys, keys_of

# A byte below this is a task; and the codes of algorithm 1 have a bit for every task.
MAX_TASKS = 64
# What `Owners` holds besides the tasks 0 to 63: marks from 64, and two with one meaning for all.
FIRST_MARK, NOBODY, PICKED = cache.FIRST_MARK, cache.NOBODY, 255


_BIT_LENGTHS = np.array([byte.bit_length() for byte in range(256)], dtype=np.uint8)
# Codes of more bits have no compiled cache.
_COMPILED_BITS = 32


class Owners:
    """Who holds each element of one tensor: one byte each, changed in place, a block at a time.

    A byte is a task, or a mark of 64 and above that its user gives a meaning.
    """

    def __init__(self, num_elements: int, scratch: Scratch = IN_MEMORY) -> None:
        self.owner: UInt8[np.ndarray, " elements"] = scratch.zeros(num_elements, np.uint8)

    def blocks(self) -> Iterator[tuple[int, UInt8[np.ndarray, " block"]]]:
        for start in range(0, len(self.owner), BLOCK_ELEMENTS):
            yield start, self.owner[start : start + BLOCK_ELEMENTS]

    def replace(self, old: int, new: int) -> None:
        for _, block in self.blocks():
            np.copyto(block, np.uint8(new), where=block == old)

    def rename(self, names: UInt8[np.ndarray, " values"]) -> None:
        """Turn every byte into its entry of `names`; those beyond the last one do not occur."""
        if np.array_equal(names, np.arange(len(names))):
            return
        for _, block in self.blocks():
            np.take(names, block, out=block, mode="clip")

    def pick(self, value: int, count: int, total: int, keys: Keys) -> None:
        """Turn `value` into `PICKED` for the `count` elements of smallest key among its `total`.

        Keys are uniform, so the largest key to pick is known within a few standard deviations: one
        pass picks everything below that window and collects the window, which is then sorted.
        """
        if count == total:
            self.replace(value, PICKED)
            return
        margin = _margin(count, total)
        low, high = (_key_at((count + sign * margin) / total) for sign in (-1, 1))
        if not self._pick_within(value, count, keys, low, high):
            self.replace(PICKED, value)
            self._pick_within(value, count, keys, _key_at(0.0), _key_at(1.0))

    def _pick_within(self, value: int, count: int, keys: Keys, low: int, high: int) -> bool:
        """Pick if the largest key to pick lies from `low` to `high`; say whether it did."""
        window_positions, window_keys = [], []
        for start, block in self.blocks():
            local = np.flatnonzero(block == value)
            key = keys(local + start)
            below = key < low
            block[local[np.flatnonzero(below)]] = PICKED
            count -= int(np.count_nonzero(below))
            inside = np.flatnonzero((key >= low) & (key <= high))
            window_positions.append(local[inside] + start)
            window_keys.append(key[inside])
        order = np.concatenate(window_keys).argsort()
        if not 0 <= count <= len(order):
            return False
        self.owner[np.concatenate(window_positions)[order[:count]]] = PICKED
        return True


class Draws:
    """Moves elements of one tensor between owners at random.

    Args:
        owners: Who holds what; changed.
        codes: Unsigned integers, with a bit for every task that an element can go to.
        generator: The tensor's.
        is_compiled: Use compiled loops where there are any.
        num_threads: Among which elements are shared out.
    """

    def __init__(
        self,
        owners: Owners,
        codes: Shaped[np.ndarray, " elements"],
        generator: CounterGenerator,
        *,
        is_compiled: bool,
        num_threads: int,
    ) -> None:
        self._owners, self._codes, self._generator = owners, codes, generator
        self._num_threads = num_threads
        self._is_compiled = is_compiled and 8 * codes.itemsize <= _COMPILED_BITS

    def count(self, value: int) -> int:
        """Return how many elements `value` holds."""
        if self._is_compiled:
            return cache.count(self._owners.owner, np.uint8(value))
        return sum(int(np.count_nonzero(block == value)) for _, block in self._owners.blocks())

    def give(self, value: int, count: int, total: int, *, stream: int, mask: int, mark: int) -> None:
        """Take the `count` elements of smallest key off `value`, which holds exactly `total`.

        An element goes to the highest task in its code among those in `mask`, to task 0 where there is none;
        the mark that it gets is that task plus `mark`.
        """
        given = self._give_compiled(value, count, total, stream, mask, mark) if self._is_compiled else 0
        if given < count:
            self._owners.pick(value, count - given, total - given, keys_of(self._generator, stream))
            for start, block in self._owners.blocks():
                self._hand_over(start + np.flatnonzero(block == PICKED), mask, mark)

    def _hand_over(self, places: Int64[np.ndarray, " count"], mask: int, mark: int) -> None:
        heirs = _highest_bit(self._codes[places] & self._codes.dtype.type(mask))
        self._owners.owner[places] = heirs + np.uint8(mark)

    def _give_compiled(self, value: int, count: int, total: int, stream: int, mask: int, mark: int) -> int:
        """Give in one pass what is surely among the smallest keys, then the window above; return how many.

        What was given stays given, so its bound is nine standard deviations below the largest key to give.
        """
        margin = _margin(count, total)
        low, high = _key_at((count - 1.5 * margin - 16) / total), _key_at((count + margin) / total)
        room, owner = int(4 * margin) + 64, self._owners.owner

        def draw(first: int, last: int) -> tuple[int, np.ndarray]:
            places = np.empty(room, np.int64)
            between = cache.draw(
                owner[first:last],
                self._codes[first:last],
                np.uint8(value),
                np.uint32(mask),
                np.uint8(mark),
                *self._generator.constants(stream, first),
                low,
                high,
                places,
                np.empty(cache.BLOCK + cache.SPARE, np.int64),
                np.empty(cache.BLOCK, np.uint8),
            )
            return between, places[:between] + first

        edges = [len(owner) * part // self._num_threads for part in range(self._num_threads + 1)]
        if self._num_threads == 1:
            shares = [draw(0, len(owner))]
        else:
            with ThreadPoolExecutor(self._num_threads) as pool:
                shares = [*pool.map(draw, edges[:-1], edges[1:])]
        between, places = zip(*shares, strict=True)
        given = total - self.count(value)
        rest = count - given
        assert rest >= 0, "nine standard deviations"
        if max(between) > room or rest > sum(between):
            return given
        window = np.concatenate(places)
        self._hand_over(window[keys_of(self._generator, stream)(window).argsort()[:rest]], mask, mark)
        return count


def _highest_bit(codes: Shaped[np.ndarray, " count"]) -> UInt8[np.ndarray, " count"]:
    """Return the place of each code's highest bit, 0 where no bit is set."""
    highest = np.zeros(codes.shape, dtype=np.uint8)
    for shift in range(0, 8 * codes.itemsize, 8):
        length = np.take(_BIT_LENGTHS, (codes >> shift).astype(np.uint8), mode="clip")
        highest = np.maximum(highest, (length + np.uint8(shift) - np.uint8(1)) * (length > 0))
    return highest


def _margin(count: int, total: int) -> float:
    """Return by how much the number of keys below a bound may miss `count`: six standard deviations."""
    return 6 * math.sqrt(count * (total - count) / total) + 16


def _key_at(fraction: float) -> int:
    """Return the key below which `fraction` of all keys lie, the smallest or largest at the ends."""
    if fraction >= 1:
        return 2**63 - 1
    return int(max(fraction, 0.0) * 2**64) - 2**63
