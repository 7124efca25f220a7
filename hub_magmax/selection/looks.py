"""One look at all elements of a tensor or in memory, for `top_n`: who wins, and what is near a tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from hub_magmax import loops
from hub_magmax.selection.chunks import Bits, Chunks, blocks
from hub_magmax.selection.owners import FIRST_MARK, NOBODY
from hub_magmax.selection.prices import FAR, Box

#: Turns the winners of some elements (uint8) into the rule that takes each from its winner.
RuleOf = Callable[[np.ndarray], Any]

MAX_CLASSES = NOBODY - FIRST_MARK


@dataclass(frozen=True)
class Contest:
    """Who takes part, at which prices.

    Attributes:
        active: The tasks with a quota; below, they are numbered as they are here.
        scale: A power of two: magnitudes times this, rounded, are on the grid.
        box: On the grid.
        classes: Sets of tasks, as bits, in order; an element that ties among them gets a mark.
    """

    active: Int64[np.ndarray, " tasks"]
    scale: float
    box: Box
    classes: Int64[np.ndarray, " classes"]

    @property
    def bounds(self) -> Float64[np.ndarray, "3 tasks"]:
        """Prices, and the least and the most that they may be, infinity replaced by a number."""
        box = self.box
        lowest, highest = np.maximum(box.prices - box.down, -FAR), np.minimum(box.prices + box.up, FAR)
        return np.stack((box.prices, lowest, highest))


@dataclass(frozen=True)
class Seen:
    """What a look at some elements found.

    Attributes:
        owner: Of each element: its winner, the mark of its class, or `NOBODY`.
        counts: Elements with each of these.
        places: Of the elements of nobody, in order.
        values: Their magnitudes.
        largest: Magnitude of all.
    """

    owner: UInt8[np.ndarray, " elements"]
    counts: Int64[np.ndarray, " owners"]
    places: Int64[np.ndarray, " kept"]
    values: Float32[np.ndarray, "tasks kept"]
    largest: float


def on_grid(values: Float32[np.ndarray, "tasks count"], scale: float) -> Float64[np.ndarray, "tasks count"]:
    """Return magnitudes as whole numbers."""
    scaled: np.ndarray = np.multiply(values, scale, dtype=np.float64)
    rounded: np.ndarray = np.rint(scaled, out=scaled)
    return rounded


def compare(
    values: Float32[np.ndarray, "tasks count"], contest: Contest
) -> tuple[UInt8[np.ndarray, " count"], Int64[np.ndarray, " open"], Int64[np.ndarray, " open"]]:
    """Return who wins, the places where another task may win elsewhere in the box, and sets of tasks there.

    An element's set are the tasks that tie at the prices, if no other can win it in the box and all of its
    magnitudes are on the grid, else 0.
    """
    (prices, lowest, highest), grid = contest.bounds[:, :, None], on_grid(values, contest.scale)
    net, reached = grid - prices, grid - lowest >= (grid - highest).max(axis=0)
    places = np.flatnonzero(np.count_nonzero(reached, axis=0) > 1)
    some, is_reached = net.take(places, axis=1), reached.take(places, axis=1)
    ties = some == some.max(axis=0, initial=-np.inf)
    exact = values.take(places, axis=1) * np.float64(contest.scale) == grid.take(places, axis=1)
    is_class = (ties == is_reached).all(axis=0) & exact.all(axis=0)
    bits = np.int64(1) << np.arange(len(values))
    return net.argmax(axis=0).astype(np.uint8), places, (bits @ ties) * is_class


def look(chunks: Chunks, contest: Contest, rule_of: RuleOf | None = None) -> Seen:
    """Settle the elements whose winner is the same everywhere in the box, and collect the others."""
    owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    counts = np.zeros(256, np.int64)
    kept = _Kept(len(contest.active))
    largest = 0.0
    for start, block in blocks(chunks):
        values = np.abs(block if len(contest.active) == len(block) else block[contest.active])
        largest = max(largest, float(values.max()))
        part = owner[start : start + block.shape[1]]
        part[:], places, masks = compare(values, contest)
        part[places] = _marks(masks, contest.classes)
        counts += np.bincount(part, minlength=256)
        single = places[part[places] == NOBODY]
        kept.add(single + start, values.take(single, axis=1).T)
    return Seen(owner, counts, *kept.take(), largest)


def _marks(masks: Int64[np.ndarray, " open"], classes: Int64[np.ndarray, " classes"]) -> UInt8[np.ndarray, " open"]:
    place = classes.searchsorted(masks)
    known = np.append(classes, 0)[place] == masks
    return np.where(known & (masks != 0), place + FIRST_MARK, NOBODY).astype(np.uint8)


class _Kept:
    """Collects places and values in two buffers that grow.

    Keeping thousands of small arrays between large ones that come and go would leave the heap full of holes,
    ten times as large as what is collected.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._places, self._values = bytearray(), bytearray()

    def add(self, places: Int64[np.ndarray, " count"], values: Float32[np.ndarray, "count tasks"]) -> None:
        if len(places):
            self._places += places.tobytes()
            self._values += values.tobytes()

    def extend(self, other: _Kept) -> None:
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
        for start in range(0, len(places), loops.BLOCK):  # in the cache: four times as fast as all at once
            found[:, start : start + loops.BLOCK] = values[start : start + loops.BLOCK].T
        return places, found
