"""One look at all elements of a tensor or in memory, for `top_n`: who wins, and what is near a tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from hub_magmax.kernels import structures
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.methods.chunks import Chunks, blocks
from hub_magmax.methods.selection.owners import FIRST_MARK, NOBODY
from hub_magmax.methods.selection.prices import FAR, Box

#: Turns the winners of some elements (uint8) into the rule that takes each from its winner.
RuleOf = Callable[[np.ndarray], Any]

MAX_CLASSES = NOBODY - FIRST_MARK
# Of the table in which compiled loops find classes: many times as many.
_SLOTS = 1 << 10


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


@dataclass(frozen=True)
class Contest:
    """Who takes part, at which prices.

    Attributes:
        active: The tasks with a quota; below, they are numbered as they are here.
        scale: A power of two: magnitudes times this, rounded, are on the grid.
        box: On the grid.
        classes: Whose members get a mark.
    """

    active: Int64[np.ndarray, " tasks"]
    scale: float
    box: Box
    classes: Classes

    @property
    def bounds(self) -> Float64[np.ndarray, "3 tasks"]:
        """Prices, and the least and the most that they may be, infinity replaced by a number."""
        box = self.box
        lowest, highest = np.maximum(box.prices - box.down, -FAR), np.minimum(box.prices + box.up, FAR)
        return np.stack((box.prices, lowest, highest))

    @property
    def bonuses(self) -> Float32[np.ndarray, "2 tasks"]:
        """The most and the least by which prices are below a number above all, in the unit of the tensor.

        They are rounded outwards, and rounding keeps the order of sums; so a strict inequality holds exactly.
        """
        _, lowest, highest = self.bounds
        exact = np.stack((highest.max() - lowest + 2, highest.max() - highest)) / self.scale
        with np.errstate(over="ignore"):
            near = exact.astype(np.float32)
            most, least = np.nextafter(near, np.array([[np.inf], [0]], np.float32))
        return np.stack((most, least))

    def for_loops(self) -> structures.Contest:
        """Return the same, as compiled loops take it."""
        slots = np.full(_SLOTS, -1)
        for number, code in enumerate(self.classes.codes.tolist()):
            slot = code % _SLOTS
            while slots[slot] >= 0:
                slot = (slot + 1) % _SLOTS
            slots[slot] = number
        examples = np.ascontiguousarray(self.classes.distances.T)
        return structures.Contest(
            self.active, self.scale, self.bounds, self.bonuses, slots, self.classes.codes, examples
        )


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
) -> tuple[UInt8[np.ndarray, " count"], Int64[np.ndarray, " open"], Classes]:
    """Return who wins, the places where another task may win elsewhere in the box, and what is alike there.

    A code is 0 where a magnitude is not on the grid.
    """
    (prices, lowest, highest), grid = contest.bounds[:, :, None], on_grid(values, contest.scale)
    net, reached = grid - prices, grid - lowest >= (grid - highest).max(axis=0)
    places = np.flatnonzero(np.count_nonzero(reached, axis=0) > 1)
    some, exact = net.take(places, axis=1), values.take(places, axis=1) * np.float64(contest.scale)
    distances = np.where(reached.take(places, axis=1), some.max(axis=0, initial=-np.inf) - some, -1.0)
    codes = np.ones(len(places), np.int64)
    for row in distances.astype(np.int64):
        codes = (codes ^ row) * np.int64(0x9E3779B97F4A7C15 - 2**64)
        codes ^= (codes.view(np.uint64) >> np.uint64(29)).view(np.int64)
    codes[(exact != grid.take(places, axis=1)).any(axis=0)] = 0
    return net.argmax(axis=0).astype(np.uint8), places, Classes(codes, distances)


def look(chunks: Chunks, contest: Contest, rule_of: RuleOf | None = None) -> Seen:
    """Settle the elements whose winner is the same everywhere in the box, and collect the others."""
    if chunks.is_compiled:
        return _look_compiled(chunks, contest, rule_of)
    owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    counts = np.zeros(256, np.int64)
    kept = _Kept(len(contest.active))
    largest = 0.0
    for start, block in blocks(chunks):
        values = np.abs(block if len(contest.active) == len(block) else block[contest.active])
        largest = max(largest, float(values.max()))
        part = owner[start : start + block.shape[1]]
        part[:], places, alike = compare(values, contest)
        part[places] = contest.classes.marks(alike)
        counts += np.bincount(part, minlength=256)
        single = places[part[places] == NOBODY]
        kept.add(single + start, values.take(single, axis=1).T)
    return Seen(owner, counts, *kept.take(), largest)


def _look_compiled(chunks: Chunks, contest: Contest, rule_of: RuleOf | None) -> Seen:
    owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    arguments = contest.for_loops()

    def share(part: Iterator[tuple[int, RawChunk]]) -> tuple[np.ndarray, np.ndarray, _Kept]:
        num_tasks, size = len(contest.active), 0
        counts, largest, kept = np.zeros(256, np.int64), np.zeros(2, np.int64), _Kept(num_tasks)
        scratch = (
            np.zeros((num_tasks, cache.LANES), np.float32),
            np.zeros((num_tasks, cache.LANES)),
            np.empty((3, cache.LANES), np.int64),
            np.empty(cache.BLOCK + cache.SPARE, np.int64),
        )
        for start, chunk in part:
            if size < chunk.num_elements:  # memory that is not written to costs nothing
                size = chunk.num_elements
                places, values = np.empty(size, np.int64), np.empty((size, num_tasks), np.float32)
            winners = owner[start : start + chunk.num_elements]
            tasks = np.empty(chunk.num_elements if chunk.one_pass else 0, np.uint8)  # which the loop fills
            found = structures.Found(winners, tasks, counts, largest, places, values, *scratch)
            if chunk.one_pass is not None and rule_of is not None:
                number = chunk.one_pass.merge(cache.look_and_merge, (arguments, found), rule_of(tasks))
            else:
                stored = chunk.bits()
                number = cache.look(stored, arguments, found, np.float32(0), stored.rows[:0])
            chunk.check_bits(int(largest[0]))
            kept.add(places[:number] + start, values[:number])
        return counts, largest, kept

    shares = list(chunks.map(share, is_early=rule_of is not None))
    counts, largest, (kept, *others) = zip(*shares, strict=True)
    for other in others:
        kept.extend(other)
    most = float(np.max(largest, axis=0)[:1].astype(np.int32).view(np.float32)[0])
    places, values = kept.take()
    return Seen(owner, np.sum(counts, axis=0), places, values, most)


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
            self._places += places.data.cast("B")
            self._values += np.ascontiguousarray(values).data.cast("B")

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
        for start in range(0, len(places), cache.BLOCK):  # in the cache: four times as fast as all at once
            found[:, start : start + cache.BLOCK] = values[start : start + cache.BLOCK].T
        return places, found
