"""Owners of a tensor's elements while a rule decides: one byte each, changed in place.

A byte is a task, or a mark of 64 and above that its user gives a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import hand_over
from hub_magmax.kernels.structures import Draw

#: A byte below this is a task; and the codes of algorithm 1 have a bit for every task.
MAX_TASKS = 64


def rename(owner: UInt8[np.ndarray, " elements"], names: UInt8[np.ndarray, "256"], backend: Backend) -> None:
    """Turn every owner into its entry of `names`."""
    if len(owner) and not np.array_equal(names, np.arange(256)):
        backend.rename(owner, names)


class Draws:
    """Moves elements of one tensor between owners at random.

    Args:
        owner: Of each element; changed.
        codes: Unsigned integers, with a bit for every task that an element can go to.
        generator: The tensor's.
        backend: Draws; every one draws the same.
        num_threads: Among which elements are shared out.
    """

    def __init__(
        self,
        owner: UInt8[np.ndarray, " elements"],
        codes: Shaped[np.ndarray, " elements"],
        generator: CounterGenerator,
        backend: Backend,
        num_threads: int = 1,
    ) -> None:
        self._owner, self._codes, self._generator = owner, codes, generator
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
