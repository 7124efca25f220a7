"""Winners at given prices: the reference of `Backend.look`, and what it collects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped, UInt8

from hub_magmax.kernels.structures import FIRST_MARK, NOBODY, Contest

#: Turns the winners of some elements (uint8) into the rule that takes each from its winner.
RuleOf = Callable[[np.ndarray], Any]

#: Elements that are moved at a time, so that they stay in the cache.
_BLOCK = 2048


@dataclass(frozen=True)
class Classes:
    """Elements that are alike: the same tasks in reach, at the same distances below the best, -1 out of
    reach.

    `codes` are of the distances, in order.
    """

    codes: Int64[np.ndarray, " classes"]
    distances: Float64[np.ndarray, "tasks classes"]

    @classmethod
    def none(cls, num_tasks: int) -> Classes:
        return cls(np.empty(0, np.int64), np.empty((num_tasks, 0)))

    def marks(self, others: Classes) -> UInt8[np.ndarray, " others"]:
        """Return the mark of each, `NOBODY` if it is none of these."""
        if not len(self.codes):
            return np.full(len(others.codes), NOBODY, np.uint8)
        place = np.minimum(self.codes.searchsorted(others.codes), len(self.codes) - 1)
        is_alike = (self.distances[:, place] == others.distances).all(axis=0) & (others.codes != 0)
        return np.where(is_alike, place + FIRST_MARK, NOBODY).astype(np.uint8)


def on_grid(values: Float32[np.ndarray, "tasks count"], scale: float) -> Float64[np.ndarray, "tasks count"]:
    """Return magnitudes as whole numbers."""
    scaled: np.ndarray = np.multiply(values, scale, dtype=np.float64)
    rounded: np.ndarray = np.rint(scaled, out=scaled)
    return rounded


def mixed(rows: Shaped[np.ndarray, "tasks count"]) -> Int64[np.ndarray, " count"]:
    """Return a code of each column of integers; different columns rarely have the same."""
    codes = np.ones(rows.shape[1], np.int64)
    for row in rows:
        codes = (codes ^ row) * np.int64(0x9E3779B97F4A7C15 - 2**64)
        codes ^= (codes.view(np.uint64) >> np.uint64(29)).view(np.int64)
    return codes


def compare(
    values: Float32[np.ndarray, "tasks count"], contest: Contest
) -> tuple[UInt8[np.ndarray, " count"], Int64[np.ndarray, " open"], Classes]:
    """Return who wins, the places where another task may win elsewhere in the box, and what is alike there.

    A code is 0 where a magnitude is not on the grid.
    """
    (prices, lowest, highest), grid = contest.bounds[:, :, None], on_grid(values, contest.scale)
    net, reached = grid - prices, grid - lowest >= (grid - highest).max(axis=0)
    places = np.flatnonzero(np.count_nonzero(reached, axis=0) > 1)
    some, exact = net.take(places, axis=1), values.take(places, axis=1) * np.float64(contest.scale)
    distances = np.where(reached.take(places, axis=1), some.max(axis=0, initial=-np.inf) - some, -1.0)
    codes = mixed(distances.astype(np.int64))
    codes[(exact != grid.take(places, axis=1)).any(axis=0)] = 0
    return net.argmax(axis=0).astype(np.uint8), places, Classes(codes, distances)


class Kept:
    """Collects places and values in two buffers that grow.

    Keeping thousands of small arrays between large ones that come and go would leave the heap full of holes,
    ten times as large as what is collected.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._places, self._values = bytearray(), bytearray()

    def add(self, places: Int64[np.ndarray, " count"], values: Float32[np.ndarray, "count tasks"]) -> None:
        if len(places):
            self._places += places.data.cast("B")
            self._values += np.ascontiguousarray(values).data.cast("B")

    def extend(self, other: Kept) -> None:
        self._places += other._places
        self._values += other._values

    def take(self) -> tuple[Int64[np.ndarray, " kept"], Float32[np.ndarray, "tasks kept"]]:
        """Return places in order, and their values."""
        places = np.frombuffer(self._places, np.int64)
        values = np.frombuffer(self._values, np.float32).reshape(-1, self._num_tasks)
        if (places[1:] < places[:-1]).any():  # the shares of several threads
            order = places.argsort(kind="stable")
            places, values = places[order], values[order]
        found = np.empty((self._num_tasks, len(places)), np.float32)
        for start in range(0, len(places), _BLOCK):  # in the cache: four times as fast as all at once
            found[:, start : start + _BLOCK] = values[start : start + _BLOCK].T
        return places, found


class Sight(NamedTuple):
    """Findings of a look at some chunks.

    Attributes:
        counts: Elements of each owner.
        largest: Magnitude of all.
        kept: Elements of nobody.
    """

    counts: Int64[np.ndarray, " owners"]
    largest: float
    kept: Kept
