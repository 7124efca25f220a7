"""One-pass merging: a tensor's chunks are merged while they are surveyed.

Prices and thresholds come from a survey of a whole tensor, and merging it takes a second pass. But a sample
tells them nearly, so most elements are decided as soon as they are read. These are merged while they are in
the cache. The stored values of the others, some per cent, are kept until the rule is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest

from hub_magmax.kernels.chunk import INFINITY_BITS, LOOP_DTYPES, RawChunk
from hub_magmax.kernels.compiled.backend import Compiled, merging_of
from hub_magmax.kernels.lazy_imports import Array
from hub_magmax.kernels.ops import Inputs
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.kernels.structures import Undecided
from hub_magmax.methods import Rule


@dataclass(frozen=True)
class MergedChunk:
    """A chunk that was merged but for its open elements.

    Attributes:
        num_elements: Of the chunk.
        places: Of the open elements in it, int64.
        rows: What is stored of them: bits, a row for each checkpoint, the base model's first.
        counts: Of the decided elements, by task; none where tasks are not selected.
        given: `digest_of` what the rule gave for the decided ones.
    """

    num_elements: int
    places: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    given: bytes


class OnePassMerge:
    """One tensor merged while it is surveyed, and its undecided elements.

    Args:
        num_elements: Of the tensor.
        dtype: Of the output, as safetensors calls it.
        scaling: Scaling coefficient.
        most_open: As many elements as may be kept.
        held: Memory for all merged elements, as bits; None where each chunk is written when it is merged, and
            written again with what was open.
        write: Takes the index of a chunk's first element, and its merged values.
        read_again: Returns what was written there.
    """

    def __init__(
        self,
        num_elements: int,
        dtype: str,
        scaling: float,
        most_open: int,
        held: np.ndarray | None,
        write: Callable[[int, Stored], None],
        read_again: Callable[[int], bytearray],
    ) -> None:
        self.dtype, self.scaling = dtype, scaling
        self._num_elements, self._most_open, self._held = num_elements, most_open, held
        self._write, self._read_again = write, read_again
        self._merged: dict[int, MergedChunk] = {}
        self._has_failed = False

    def chunk(self, chunk: RawChunk) -> OnePassChunk | None:
        """Return what merges a chunk early, or None where that cannot be; a chunk given again counts anew."""
        self._merged.pop(chunk.start, None)
        files = chunk.files
        if self._has_failed or files is None or files.dtype != self.dtype or self.dtype not in LOOP_DTYPES:
            return None
        return OnePassChunk(self, chunk)

    def room(self, start: int, size: int) -> np.ndarray:
        """Return memory for the merged elements of a chunk."""
        if self._held is not None:
            return self._held[start : start + size]
        return np.empty(size, bits_dtype(self.dtype))

    def note(self, start: int, merged: MergedChunk, values: np.ndarray) -> None:
        """Keep a chunk, unless more is open than may be; then the tensor is left to a second look."""
        self._merged[start] = merged
        num_open = sum(len(merged.places) for merged in self._merged.values())
        share = len(merged.places) / merged.num_elements
        if max(num_open, share * self._num_elements) > self._most_open:
            self.give_up()
        elif self._held is None:
            self._write(start, self._stored(values))

    def give_up(self) -> None:
        """Leave the tensor to a second look."""
        self._has_failed = True
        self._merged.clear()

    def finish(self, rule: Rule) -> np.ndarray | None:
        """Merge the open elements by the rule of the tensor, and return how many come from each task.

        None where the tensor has to be looked at again: not all of it was merged, or what the rule gives for
        decided elements is not what it gave then.
        """
        if sum(merged.num_elements for merged in self._merged.values()) < self._num_elements:
            return None
        backend = Compiled()
        total: np.ndarray = np.zeros(1, np.int64)
        for start, merged in self._merged.items():
            given = rule.per_element(start, merged.num_elements)
            if digest_of(given, merged.places) != merged.given:
                return None
            total = total + merged.counts
            if self._held is None and not len(merged.places):
                continue  # it is written as it is
            bounds, rows = [(0, len(merged.places))], self._stored(merged.rows)
            open_ones = RawChunk(bounds, partial(lambda stored: stored, rows))
            inputs = Inputs(tuple(np.asarray(v)[merged.places] for v in given), rule.per_task)
            found = backend.merge(rule.op, open_ones, inputs, self.dtype, self.scaling)
            if found.probe != 0:  # what is not finite is told of by the second look
                return None
            total = total + found.counts
            whole = self._again(start, merged)
            whole[merged.places] = found.values.bits
            self._write(start, self._stored(whole))
        return total

    def _again(self, start: int, merged: MergedChunk) -> np.ndarray:
        """Return the merged elements of a chunk, as they are before those that were open are put in."""
        if self._held is not None:
            return self._held[start : start + merged.num_elements]
        return np.frombuffer(self._read_again(start), bits_dtype(self.dtype))

    def _stored(self, bits: np.ndarray) -> Stored:
        return Stored(bits, self.dtype)


@dataclass(frozen=True)
class OnePassChunk:
    """A chunk of files that are open; an `OnePass`."""

    whole: OnePassMerge
    chunk: RawChunk

    def merge(self, loop: Callable[..., int], looking: tuple[Any, ...], rule: Rule) -> int:
        """Call a loop of `compiled_early`, as `OnePass` says."""
        files, size = self.chunk.files, self.chunk.num_elements
        assert files is not None
        values = self.whole.room(self.chunk.start, size)
        with files.reading(self.chunk.start) as reading:
            num_rows = len(reading.memory)
            inputs = Inputs((), rule.per_task)
            merging = merging_of(rule.op, inputs, self.whole.scaling, num_rows - 1, values)
            places, rows = np.empty(size, np.int64), np.empty((num_rows, size), values.dtype)
            kept = Undecided(np.zeros(1, np.int64), np.zeros(1, np.int64), places, rows)
            result = loop(reading, merging, kept, *looking)
        if result < 0:
            files.raise_for(self.chunk.parts)
        if kept.largest[0] >= INFINITY_BITS:
            self.whole.give_up()
            return result
        number = int(kept.number[0])
        counts = merging.counts if rule.op.selects else merging.counts[:0]
        merged = MergedChunk(
            size,
            places[:number].copy(),
            rows[:, :number].copy(),
            counts,
            digest_of(rule.per_element(0, size)),
        )
        self.whole.note(self.chunk.start, merged, values)
        return result


def digest_of(given: tuple[Array, ...], open_places: np.ndarray | None = None) -> bytes:
    """Identify what a rule gives for the elements of a chunk, where open ones have 0, or are to have it."""
    if not given:
        return b""
    decided = np.asarray(given[0])
    if open_places is not None:
        decided = decided.copy()
        decided[open_places] = 0
    return xxh3_128_digest(decided.data)
