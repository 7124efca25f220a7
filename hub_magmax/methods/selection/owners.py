"""Who holds each element of a tensor while a rule decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import hand_over
from hub_magmax.kernels.structures import Draw
from hub_magmax.methods.chunks import BLOCK_ELEMENTS

# A byte below this is a task; and the codes of algorithm 1 have a bit for every task.
MAX_TASKS = 64
# What `Owners` holds besides the tasks 0 to 63: marks from 64, and one for nobody.
FIRST_MARK, NOBODY = cache.FIRST_MARK, cache.NOBODY


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


class Draws:
    """Moves elements of one tensor between owners at random.

    Args:
        owners: Who holds what; changed.
        codes: Unsigned integers, with a bit for every task that an element can go to.
        generator: The tensor's.
        backend: Draws; every one draws the same.
        num_threads: Among which elements are shared out.
    """

    def __init__(
        self,
        owners: Owners,
        codes: Shaped[np.ndarray, " elements"],
        generator: CounterGenerator,
        backend: Backend,
        num_threads: int = 1,
    ) -> None:
        self._owner, self._codes, self._generator = owners.owner, codes, generator
        self._backend, self._num_threads = backend, num_threads

    def count(self, value: int) -> int:
        """Return how many elements `value` holds."""
        return self._backend.count(self._owner, value)

    def give(self, value: int, count: int, total: int, *, stream: int, mask: int, mark: int) -> None:
        """Take the `count` elements of smallest key off `value`, which holds exactly `total`.

        An element goes to the highest task in its code among those in `mask`, to task 0 where there is none;
        the mark that it gets is that task plus `mark`.

        Keys are uniform, so the largest key to give is known within a few standard deviations. One pass gives
        elements whose keys lie surely below it and collects those of a window, which are then sorted. What
        was given stays given, so the window begins nine standard deviations below the largest key.
        """
        margin = _margin(count, total)
        low, high = _key_at((count - 1.5 * margin - 16) / total), _key_at((count + margin) / total)
        constants = partial(self._generator.constants, stream)
        draw = Draw(np.uint8(value), mask, np.uint8(mark), *constants(), low, high)
        window = self._draw(draw, constants, int(4 * margin) + 64)
        rest = count - total + self.count(value)
        assert rest >= 0, "nine standard deviations"
        if rest > len(window):
            window = self._draw(draw._replace(low=_key_at(0.0), high=_key_at(1.0)), constants, total)
        order = self._generator.keys(window, stream).argsort()
        hand_over(self._owner, self._codes, window[order[:rest]], draw)

    def _draw(
        self, draw: Draw, constants: Callable[[int], tuple[np.uint64, np.uint64]], room: int
    ) -> Int64[np.ndarray, " window"]:
        """Draw, and return the places of the window."""
        size = len(self._owner)

        def share(first: int, last: int) -> np.ndarray:
            before, middle = constants(first)
            own = draw._replace(before=before, middle=middle)
            return first + self._backend.draw(self._owner[first:last], self._codes[first:last], own, room)

        edges = [size * part // self._num_threads for part in range(self._num_threads + 1)]
        if self._num_threads == 1:
            return share(0, size)
        with ThreadPoolExecutor(self._num_threads) as pool:
            return np.concatenate([*pool.map(share, edges[:-1], edges[1:])])


def _margin(count: int, total: int) -> float:
    """Return by how much the number of keys below a bound may miss `count`: six standard deviations."""
    return 6 * math.sqrt(count * (total - count) / total) + 16


def _key_at(fraction: float) -> int:
    """Return the key below which `fraction` of all keys lie, the smallest or largest at the ends."""
    if fraction >= 1:
        return 2**63 - 1
    return int(max(fraction, 0.0) * 2**64) - 2**63
