"""Where a market's elements are: in memory, or in the chunks of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.randomness import CounterGenerator, fractions
from hub_magmax.methods.chunks import BLOCK_ELEMENTS, Chunks, T, blocks, places_in_runs
from hub_magmax.methods.selection.streams import SAMPLE

# Markets of up to this many elements are solved at once; larger ones start from a sample of themselves.
DIRECT_ELEMENTS = 1 << 12
# Magnitudes are rounded to whole numbers of this many bits, relative to the largest of a sample; none may
# have more than the second number. Sums and differences of 64 of them are then exact in float64, so equal
# means equal.
_GRID_BITS, _MOST_BITS = 42, 47
_MIN_SAMPLE = 1 << 11
# A sample of a tensor is read in runs of elements that lie side by side in a file. To read 256 takes as long
# as to read 64; but neighbours can be alike, so there are as many runs as this, if they have 64 or more.
_RUNS, _SHORTEST, _LONGEST = 256, 64, 256


#: Turns the winners of some elements (uint8) into the rule that takes each from its winner.
RuleOf = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Stock:
    """Elements in memory: their magnitudes, one row per task, and their places in the tensor.

    A magnitude times `scale`, rounded, is a whole number: its place on the grid on which all are compared.
    `run`: so many in a row are neighbours in the tensor, and perhaps more alike than others.
    """

    values: Float32[np.ndarray, "tasks elements"]
    places: Int64[np.ndarray, " elements"]
    scale: float
    generator: CounterGenerator
    is_compiled: bool
    run: int = 1
    scratch = IN_MEMORY
    rule_of = None

    @property
    def num_elements(self) -> int:
        return len(self.places)

    @property
    def active(self) -> tuple[int, ...]:
        return tuple(range(self.values.shape[0]))

    def blocks(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks block"]]]:
        for start in range(0, self.num_elements, BLOCK_ELEMENTS):
            yield start, self.values[:, start : start + BLOCK_ELEMENTS]

    def map(
        self, work: Callable[[Iterator[tuple[int, RawChunk]]], T], *, is_early: bool = False
    ) -> Iterator[T]:
        yield work((start, RawChunk.of_vectors(block)) for start, block in self.blocks())

    def take(self, chosen: Int64[np.ndarray, " chosen"]) -> Stock:
        values = self.values.take(chosen, axis=1)
        return Stock(values, self.places[chosen], self.scale, self.generator, self.is_compiled)

    def sample(self) -> Stock:
        return self.take(_strata(self.num_elements, len(self.values), self.generator))

    def places_of(self, positions: Int64[np.ndarray, " count"]) -> Int64[np.ndarray, " count"]:
        return self.places.take(positions)


@dataclass(frozen=True)
class Stream:
    """All elements of a tensor, read from its chunks, and the sample that was taken of them.

    `rule_of`: as `top_n` takes it.
    """

    chunks: Chunks
    active: tuple[int, ...]
    surveyed: Stock
    rule_of: RuleOf | None = None

    @property
    def scale(self) -> float:
        return self.surveyed.scale

    @property
    def generator(self) -> CounterGenerator:
        return self.surveyed.generator

    @property
    def num_elements(self) -> int:
        return self.chunks.num_elements

    @property
    def is_compiled(self) -> bool:
        return self.chunks.is_compiled

    @property
    def scratch(self) -> Scratch:
        return self.chunks.scratch

    def blocks(self) -> Iterator[tuple[int, Float32[np.ndarray, "tasks block"]]]:
        return blocks(self.chunks)

    def map(
        self, work: Callable[[Iterator[tuple[int, RawChunk]]], T], *, is_early: bool = False
    ) -> Iterator[T]:
        return self.chunks.map(work, is_early=is_early)

    def sample(self) -> Stock:
        return self.surveyed

    def places_of(self, positions: Int64[np.ndarray, " count"]) -> Int64[np.ndarray, " count"]:
        return positions

    def rescaled(self) -> Stream:
        """Return the same elements, on a grid that is made for the largest of all."""
        largest = max(float(active_magnitudes(block, self.active).max()) for _, block in self.blocks())
        return replace(self, surveyed=replace(self.surveyed, scale=_scale(largest)))


#: Read in blocks by `blocks`, whose rows `active` count; positions count from zero in both.
Source = Stock | Stream


class OffScaleError(Exception):
    """A tensor has a magnitude that is far beyond those of its sample."""


def survey(
    chunks: Chunks, active: tuple[int, ...], generator: CounterGenerator, rule_of: RuleOf | None = None
) -> Source:
    """Read a tensor if it is small, else a sample of it."""
    num_elements = chunks.num_elements
    is_small = num_elements <= DIRECT_ELEMENTS
    size = sample_size(num_elements, len(active))
    length = min(max(_SHORTEST, size // _RUNS), _LONGEST)
    # Odd, so that the runs begin in ever other columns of a matrix.
    every = num_elements * length // size | 1
    if is_small:
        length = every = num_elements
    values = active_magnitudes(chunks.runs(length, every), active)
    places, largest = places_in_runs(num_elements, length, every), float(values.max())
    stock = Stock(values, places, _scale(largest), generator, chunks.is_compiled, length)
    if is_small:
        return stock
    stream = Stream(chunks, active, stock, rule_of)
    return stream if largest else stream.rescaled()


def check_scale(largest: float, scale: float) -> None:
    """Raise OffScaleError if a magnitude is so large that sums on the grid are not exact."""
    if largest * scale >= 2.0**_MOST_BITS:
        raise OffScaleError


def _scale(largest: float) -> float:
    """Return what turns magnitudes into numbers on the grid: a power of two."""
    return math.ldexp(1.0, _GRID_BITS - math.frexp(largest)[1])


def _strata(num_elements: int, num_tasks: int, generator: CounterGenerator) -> Int64[np.ndarray, " sample"]:
    """Draw one position from each of equal parts."""
    size = sample_size(num_elements, num_tasks)
    edges = np.arange(size + 1) * num_elements // size
    offsets = fractions(generator.keys(np.arange(size), SAMPLE)) * (edges[1:] - edges[:-1])
    strata: np.ndarray = edges[:-1] + offsets.astype(np.int64)
    return strata


def sample_size(num_elements: int, num_tasks: int) -> int:
    """Return of how many elements a sample costs about the same as the rest that it leaves.

    The more tasks there are, the nearer to each other are those that compete for an element.
    """
    return max(_MIN_SAMPLE, int(2 * num_elements ** (2 / 3) * max(1, (num_tasks / 5) ** 0.5)))


def active_magnitudes(
    block: Float32[np.ndarray, "tasks block"], active: tuple[int, ...]
) -> Float32[np.ndarray, "active block"]:
    """Return the magnitudes of the tasks that have a quota."""
    magnitudes: np.ndarray = np.abs(block if len(active) == block.shape[0] else block[list(active)])
    return magnitudes


def on_grid(values: Float32[np.ndarray, "tasks count"], scale: float) -> Float64[np.ndarray, "tasks count"]:
    """Return magnitudes as whole multiples of the resolution, the grid on which prices are too."""
    scaled: np.ndarray = np.multiply(values, scale, dtype=np.float64)
    rounded: np.ndarray = np.rint(scaled, out=scaled)
    return rounded
