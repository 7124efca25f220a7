"""Where a market's elements are: in memory, or in the chunks of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from hub_magmax import loops
from hub_magmax.randomness import CounterGenerator
from hub_magmax.scratch import IN_MEMORY, Scratch
from hub_magmax.selection.chunks import BLOCK_ELEMENTS, Bits, Chunks, T, blocks
from hub_magmax.selection.draws import SAMPLE

# Markets of up to this many elements are solved at once; larger ones start from a sample of themselves.
DIRECT_ELEMENTS = 1 << 12
# Magnitudes are rounded to whole numbers of this many bits, relative to the tensor's largest. Sums and
# differences of them and of prices are then exact in float64, so equal means equal.
_GRID_BITS = 44
_MIN_SAMPLE = 1 << 11


@dataclass(frozen=True)
class Stock:
    """Elements in memory: their magnitudes, one row per task, and their places in the tensor.

    A magnitude times `scale`, rounded, is a whole number: its place on the grid on which all are compared.
    """

    values: Float32[Tensor, "tasks elements"]
    places: Int64[Tensor, " elements"]
    scale: float
    generator: CounterGenerator
    is_compiled: bool
    scratch = IN_MEMORY

    @property
    def num_elements(self) -> int:
        return self.values.shape[1]

    @property
    def active(self) -> tuple[int, ...]:
        return tuple(range(self.values.shape[0]))

    def blocks(self) -> Iterator[tuple[int, Float32[Tensor, "tasks block"]]]:
        for start in range(0, self.num_elements, BLOCK_ELEMENTS):
            yield start, self.values[:, start : start + BLOCK_ELEMENTS]

    def map(self, work: Callable[[Iterator[tuple[int, Bits]]], T]) -> Iterator[T]:
        yield work((start, Bits.of_vectors(block)) for start, block in self.blocks())

    def take(self, chosen: Int64[Tensor, " chosen"]) -> Stock:
        values = self.values.index_select(1, chosen)
        return Stock(values, self.places[chosen], self.scale, self.generator, self.is_compiled)

    def sample(self) -> Stock:
        return self.take(_strata(self.num_elements, self.generator))

    def places_of(self, positions: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
        return self.places[positions]


@dataclass(frozen=True)
class Stream:
    """All elements of a tensor, read from its chunks, and the sample that was taken of them."""

    chunks: Chunks
    active: tuple[int, ...]
    surveyed: Stock

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

    def blocks(self) -> Iterator[tuple[int, Float32[Tensor, "tasks block"]]]:
        return blocks(self.chunks)

    def map(self, work: Callable[[Iterator[tuple[int, Bits]]], T]) -> Iterator[T]:
        return self.chunks.map(work)

    def sample(self) -> Stock:
        return self.surveyed

    def places_of(self, positions: Int64[Tensor, " count"]) -> Int64[Tensor, " count"]:
        return positions


#: Read in blocks by `blocks`, whose rows `active` count; positions count from zero in both.
Source = Stock | Stream


def survey(chunks: Chunks, active: tuple[int, ...], generator: CounterGenerator) -> Source:
    """Read a tensor once: all of it if it is small, else its largest magnitude and a sample."""
    num_elements = chunks.num_elements
    small = num_elements <= DIRECT_ELEMENTS
    places = torch.arange(num_elements) if small else _strata(num_elements, generator)
    sample = torch.empty((len(active), len(places)))
    largest = 0.0
    look = _look_compiled if chunks.is_compiled else _look
    for stop, above, values in look(chunks, active, places):
        largest = max(largest, above)
        sample[:, stop - values.shape[1] : stop] = values
    scale = math.ldexp(1.0, _GRID_BITS - math.frexp(largest)[1])
    stock = Stock(sample, places, scale, generator, chunks.is_compiled)
    return stock if small else Stream(chunks, active, stock)


#: For every part of a tensor: how many places of the sample lie before its end, its largest magnitude, and
#: the magnitudes at those places that lie in it.
Look = Iterator[tuple[int, float, Float32[Tensor, "active places"]]]


def _look(chunks: Chunks, active: tuple[int, ...], places: Int64[Tensor, " sample"]) -> Look:
    for start, block in blocks(chunks):
        begin, end = torch.searchsorted(places, torch.tensor([start, start + block.shape[1]])).tolist()
        values = active_magnitudes(block.index_select(1, places[begin:end] - start), active)
        yield end, float(active_magnitudes(block, active).max()), values


def _look_compiled(chunks: Chunks, active: tuple[int, ...], places: Int64[Tensor, " sample"]) -> Look:
    def look(part: Iterator[tuple[int, Bits]]) -> list[tuple[int, float, Tensor]]:
        scratch, found = np.empty((2, loops.BLOCK), np.int32), []
        for start, bits in part:
            stored = bits.rows, bits.stride, bits.base, np.array(active)
            largest = loops.largest(*stored, bits.num_elements, scratch)
            bits.check(largest)
            begin, end = np.searchsorted(places.numpy(), (start, start + bits.num_elements)).tolist()
            values = np.empty((end - begin, len(active)), np.float32)
            loops.gather(*stored, places[begin:end].numpy() - start, values)
            found.append((end, float(np.int32(largest).view(np.float32)), torch.from_numpy(values.T)))
        return found

    for found in chunks.map(look):
        yield from found


def _strata(num_elements: int, generator: CounterGenerator) -> Int64[Tensor, " sample"]:
    """Draw one position from each of equal parts, so many that sample and rest cost about the same."""
    size = max(_MIN_SAMPLE, int(2 * num_elements ** (2 / 3)))
    edges = torch.arange(size + 1) * num_elements // size
    offsets = generator.uniform(0, size, SAMPLE) * (edges[1:] - edges[:-1])
    return edges[:-1] + offsets.to(torch.int64)


def active_magnitudes(
    block: Float32[Tensor, "tasks block"], active: tuple[int, ...]
) -> Float32[Tensor, "active block"]:
    """Return the magnitudes of the tasks that have a quota."""
    return (block if len(active) == block.shape[0] else block[list(active)]).abs()


def on_grid(values: Float32[Tensor, "tasks count"], scale: float) -> Float64[Tensor, "tasks count"]:
    """Return magnitudes as whole multiples of the resolution, the grid on which prices are too."""
    return values.to(torch.float64).mul_(scale).round_()
