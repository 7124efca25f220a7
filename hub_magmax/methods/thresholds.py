"""Magnitudes of given ranks in each task's part of a tensor, found exactly by counting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64

from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.structures import Histograms
from hub_magmax.methods.chunks import Counted, Remembering

#: Tensors of up to this many numbers (tasks times elements) are held and sorted instead of counted.
HELD_NUMBERS = 1 << 20

#: To bracket a threshold, runs of `SAMPLE_RUN` elements are looked at, one every `SAMPLE_STRIDE`, and at
#: most `MOST_RUNS` of a tensor. Each run is a read of its own. Measured with five tasks of 11 million
#: elements: 48 runs leave 8 elements in 100 in brackets of six deviations, 86 leave 5 in brackets of four.
SAMPLE_RUN, SAMPLE_STRIDE, MOST_RUNS = 1 << 12, 1 << 17, 512

#: Bins of a histogram for each element that is thought to be in the bracket, and the fewest and most. Where
#: the bin of a threshold has more than two different magnitudes, another pass narrows the bracket.
_BINS_PER_ELEMENT, _FEWEST_BINS, MOST_BINS = 4, 1 << 12, 1 << 20
#: Twice as many passes, of one element each, take as long as keeping an element until its rule is known.
_KEEPING_COST = 5


#: Ranks of magnitudes by task, from 1, the largest one, to the number of elements; 0 stands for infinity.
Ranks = Int64[np.ndarray, "ranks tasks"]


def magnitude_thresholds(
    chunks: Counted, ranks: Ranks, rule_of: Callable[[np.ndarray], Any] | None = None
) -> Float32[np.ndarray, "ranks tasks"]:
    """Return the magnitudes of some ranks in each task's part of a tensor, exactly.

    Memory does not grow with the tensor's size.

    Args:
        chunks: The tensor's task vectors; read once, and a sample of them before if they are not small; more
            often only where the sample misleads.
        ranks: Of each task.
        rule_of: Turns thresholds into the rule by which elements may be merged that these decide already.
    """
    assert ((ranks >= 0) & (ranks <= chunks.num_elements)).all()
    if chunks.num_elements == 0:
        return np.full(ranks.shape, np.float32(math.inf))

    def find() -> Float32[np.ndarray, "ranks tasks"]:
        if chunks.num_tasks * chunks.num_elements > HELD_NUMBERS:
            return _count_thresholds(chunks, ranks, rule_of)
        size = chunks.num_elements
        return thresholds_side_by_side(np.abs(chunks.runs(size, size))[:, None], ranks)[..., 0]

    question = "thresholds", ranks.shape, ranks.tobytes()
    return chunks.recall(question, find) if isinstance(chunks, Remembering) else find()


def thresholds_side_by_side(
    magnitudes: Float32[np.ndarray, "tasks tensors elements"], ranks: Ranks
) -> Float32[np.ndarray, "ranks tasks tensors"]:
    """Return the magnitudes of some ranks in each task's part of tensors of one size."""
    above_all = np.full((*magnitudes.shape[:-1], 1), np.float32(math.inf))
    rising, places = np.concatenate([magnitudes, above_all], axis=-1), magnitudes.shape[-1] - ranks
    if places.size:
        rising.partition(np.unique(places), axis=-1)
    wanted = np.broadcast_to(places.T[:, None], (*magnitudes.shape[:-1], len(ranks)))
    return np.moveaxis(np.take_along_axis(rising, wanted, -1), -1, 0)


def _count_thresholds(
    chunks: Counted, ranks: Ranks, rule_of: Callable[[np.ndarray], Any] | None
) -> Float32[np.ndarray, "ranks tasks"]:
    """Find the thresholds of a tensor of any size by counting.

    The bits of a non-negative float32 sort like the number. A sample brackets each threshold; one pass
    counts what lies above its bracket and makes a histogram of what lies inside. Where the bracket is
    wrong, or too wide to count every magnitude in it, another pass takes a better one.
    """
    brackets = _sampled_brackets(chunks, ranks)
    while not all(bracket.is_found for bracket in brackets):
        is_merged = _count(chunks, brackets, rule_of)
        brackets = [bracket.narrowed(is_merged=is_merged) for bracket in brackets]
    return _guesses(brackets, chunks.num_tasks)


def _guesses(brackets: Sequence[_Bracket], num_tasks: int) -> Float32[np.ndarray, "ranks tasks"]:
    """Return the likely thresholds: those of all magnitudes that brackets do not leave open."""
    bits = np.array([bracket.guess for bracket in brackets], np.int32)
    return bits.view(np.float32).reshape(num_tasks, len(brackets) // num_tasks).T


def _count(
    chunks: Counted, brackets: Sequence[_Bracket], rule_of: Callable[[np.ndarray], Any] | None
) -> bool:
    """Count all magnitudes; say whether all chunks were merged meanwhile, by the guesses of the brackets."""
    edges = np.cumsum([0, *(one.num_bins for one in brackets)])
    of_each = [(one.low, one.high, one.shift, one.first_open, one.last_open) for one in brackets]
    num_ranks, bounds = len(brackets) // chunks.num_tasks, np.array(of_each, np.int32)
    rule = rule_of(_guesses(brackets, chunks.num_tasks)) if rule_of is not None else None

    def count(part: Iterator[tuple[int, RawChunk]]) -> tuple[Histograms, bool]:
        bins, outside = np.zeros(edges[-1], np.int64), np.zeros((len(brackets), 3), np.int64)
        most, least = np.zeros((2, edges[-1]), np.int32)
        found, is_merged = Histograms(num_ranks, bounds, edges, bins, most, least, outside), True
        for _, chunk in part:
            is_merged = chunks.backend.histogram(chunk, found, rule)
        return found, is_merged

    (found, is_merged), *others = chunks.map(count, is_early=rule is not None)
    for other, _ in others:
        np.add(found.bins, other.bins, out=found.bins)
        np.maximum(found.most, other.most, out=found.most)
        np.maximum(found.least, other.least, out=found.least)
        np.add(found.outside, other.outside, out=found.outside)
    for number, bracket in enumerate(brackets):
        own = slice(*edges[number : number + 2])
        bracket.bins, bracket.most, bracket.least = found.bins[own], found.most[own], found.least[own]
        bracket.num_above, bracket.at_high, bracket.at_low = found.outside[number].tolist()
    return is_merged


def _sampled_brackets(chunks: Counted, ranks: Ranks) -> list[_Bracket]:
    """Return a bracket for every rank of the first task, of the second one, and so on."""
    stride = max(SAMPLE_STRIDE, math.ceil(chunks.num_elements / MOST_RUNS))
    vectors = chunks.runs(SAMPLE_RUN, stride)
    rows = np.abs(vectors, out=vectors).view(np.int32)
    brackets = []
    for task, row in enumerate(rows):
        rising = np.sort(row)
        whole = row[: len(row) // SAMPLE_RUN * SAMPLE_RUN].reshape(-1, SAMPLE_RUN)
        for rank in ranks[:, task].tolist():
            share = rank / chunks.num_elements
            # Four standard deviations of a count, and a few for samples in which it is small.
            margin = 4 * math.sqrt(len(rising) * share * (1 - share)) + 16
            # Rows of a matrix differ, and so do runs, more than chance has it: a wider bracket takes less
            # time than another pass.
            counts = np.count_nonzero(whole >= rising[-1 - math.floor(share * (len(rising) - 1))], axis=1)
            if len(counts):
                margin = max(margin, 3 * math.sqrt(len(counts) * counts.var()))
            brackets.append(_sampled_bracket(task, rank, chunks.num_elements, rising, margin))
    return brackets


def _sampled_bracket(
    task: int, rank: int, num_elements: int, rising: Int32[np.ndarray, " sample"], margin: float
) -> _Bracket:
    """Return the bracket that leaves a margin on both sides of a rank in a sorted sample.

    A bound may equal few elements, which are left open, or very many, as zero does and the smallest steps of
    bfloat16 do. These are merged by the sample's guess, unless it is likely to be wrong: keeping an element
    until its rule is known takes longer than another pass, in which what was guessed wrong is merged again.
    """
    size = len(rising)
    place = rank / num_elements * size
    above, below = math.floor(place - margin), math.ceil(place + margin)
    high = int(rising[-1 - above]) if above >= 0 else _MOST_BITS
    low = int(rising[-1 - below]) if below < size else 0
    guess = int(rising[-1 - min(int(place), size - 1)])
    inside = (min(below, size) - max(above, 0)) * num_elements // size
    most_bins = min(MOST_BINS, max(_BINS_PER_ELEMENT * inside, _FEWEST_BINS))

    def is_guessed(bound: int, inner: Literal["left", "right"]) -> bool:
        first, end = (int(np.searchsorted(rising, bound, side)) for side in ("left", "right"))
        edge = size - (first if inner == "left" else end)
        # This is twice the chance that the threshold lies on the other side of the inner edge of the class.
        chance = math.erfc(abs(place - edge) / (margin / 4 * math.sqrt(2)))
        return chance < _KEEPING_COST * (end - first) / size

    bracket = _Bracket(task, rank, most_bins, low, high, guess=guess)
    bracket.first_open += is_guessed(low, "right")
    bracket.last_open -= is_guessed(high, "left")
    return bracket


#: The bits of infinity, above every magnitude.
_MOST_BITS = 0x7F800000


class _Bracket:
    """Two magnitudes, as bits, between which that of a rank is thought to be, and counts of a pass.

    Elements of magnitudes from `first_open` to `last_open` are left open; others are merged by the guess.
    """

    def __init__(
        self, task: int, rank: int, most_bins: int, low: int, high: int, *, guess: int | None = None
    ) -> None:
        self.task, self.rank, self.most_bins = task, rank, most_bins
        self.low, self.high, self.is_found = low, high, False
        self.guess = low if guess is None else guess
        self.first_open, self.last_open = low + (low == high), high
        self.shift = max(0, (high - low).bit_length() - most_bins.bit_length() + 1)
        self.num_above = self.at_high = self.at_low = 0
        self.num_bins = ((high - low) >> self.shift) + 1
        # Of what is between the bounds: magnitudes in each bin, and the largest and the smallest one, as
        # distances from `low` and `high`, plus 1.
        self.bins = self.most = self.least = np.empty(0, np.int64)

    def narrowed(self, *, is_merged: bool) -> _Bracket:
        """Return the bracket of the next pass; the threshold alone, where it is found.

        It is not found yet where elements were merged by a guess that is wrong for them.
        """
        if self.is_found:
            return self
        low, high = self._place()
        found = _Bracket(self.task, self.rank, self.most_bins, low, high)
        guessed = [end for end in (self.low, self.high) if not self.first_open <= end <= self.last_open]
        is_right = all((low == end) == (self.guess == end) for end in guessed) or not is_merged
        found.is_found = low == high and is_right
        return found

    def _place(self) -> tuple[int, int]:
        """Return between which magnitudes the threshold lies: equal ones, where the counts tell."""
        rank = self.rank - self.num_above
        if rank <= 0:
            return self.high, _MOST_BITS
        rank -= self.at_high
        if rank <= 0:
            return self.high, self.high
        from_the_top = self.bins[::-1].cumsum()
        if rank > from_the_top[-1]:
            rank -= int(from_the_top[-1])
            return (self.low, self.low) if rank <= self.at_low and self.low < self.high else (0, self.low)
        place = len(self.bins) - 1 - int(np.searchsorted(from_the_top, rank))
        # From the top of this bin; its largest and its smallest magnitude are known.
        rank -= int(from_the_top[len(self.bins) - 1 - place] - self.bins[place])
        # Values of 16 bits are far apart as float32, so most bins hold one of them, many times.
        low, high = self.high + 1 - int(self.least[place]), self.low - 1 + int(self.most[place])
        if rank == 1:
            return high, high
        return (low, low) if rank == self.bins[place] else (low, high)
