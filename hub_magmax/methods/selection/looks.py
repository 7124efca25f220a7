"""One look at all elements of a tensor or in memory, for `top_n`: winners, and elements near a tie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from hub_magmax.kernels import structures
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.structures import FIRST_MARK, NOBODY
from hub_magmax.kernels.winners import Classes, RuleOf, Sight
from hub_magmax.methods.chunks import Chunks
from hub_magmax.methods.selection.prices import FAR, Box

MAX_CLASSES = NOBODY - FIRST_MARK
# Of the table in which compiled loops find classes: many times as many.
_SLOTS = 1 << 10


@dataclass(frozen=True)
class Contest:
    """Tasks that take part, their prices, and classes of elements.

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

    def as_arrays(self) -> structures.Contest:
        """Return the same, as backends take it."""
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
    """Findings of a look at all elements.

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


def look(chunks: Chunks, contest: Contest, rule_of: RuleOf | None = None) -> Seen:
    """Settle the elements whose winner is the same everywhere in the box, and collect the others."""
    owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    arguments = contest.as_arrays()

    def share(part: Iterator[tuple[int, RawChunk]]) -> Sight:
        return chunks.backend.look(part, arguments, owner, rule_of)

    counts, largest, (kept, *others) = zip(*chunks.map(share, is_early=rule_of is not None), strict=True)
    for other in others:
        kept.extend(other)
    places, values = kept.take()
    return Seen(owner, np.sum(counts, axis=0), places, values, max(largest))
