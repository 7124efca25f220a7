"""The reference backend: arithmetic in torch and numpy, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8

from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.competition import scores
from hub_magmax.kernels.dtypes import rounded_once, torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.ops import Inputs, Op, select_rows, task_rows
from hub_magmax.kernels.products import BLOCK, block_sums, in_blocks, num_pairs
from hub_magmax.kernels.randomness import CounterGenerator, keys_of
from hub_magmax.kernels.row_ranks import RankTable, factors_by_rank, magnitude_sums
from hub_magmax.kernels.spreads import BLOCK as SUMMED
from hub_magmax.kernels.spreads import spreads, square_sums
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import (
    NOBODY,
    TIED,
    ZERO,
    BlockSums,
    Codes,
    Contest,
    Draw,
    Edges,
    Histograms,
    MostKeys,
    Names,
    Owners,
    PerTask,
    PerTaskRows,
    Places,
    RowSums,
    Spreads,
    SquareSums,
    Tasks,
    Vectors,
)
from hub_magmax.kernels.winners import Classes, Kept, RuleOf, Sight, compare

#: Elements of all rows that stay in the caches, operation by operation.
PIECE_ELEMENTS = 2**16


def apply_update(
    base: Float[torch.Tensor, " chunk"],
    merged: Float32[torch.Tensor, " chunk"],
    scaling: float,
    dtype: torch.dtype,
) -> Float[torch.Tensor, " chunk"]:
    """Return base + scaling · merged, cast once to `dtype` (round to nearest even).

    Computed in float32, or in float64 where the base model or the output is. Elements whose
    update is zero keep the base model's bits, the sign of a zero included.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, dtype) else torch.float32
    update = merged.to(wide) * scaling
    start = base.to(wide)
    updated = torch.where(update == 0, start, start + update)
    return rounded_once(updated, dtype)


@dataclass(frozen=True)
class Reference:
    """Arithmetic in torch and numpy: the oracle of all backends, which fall back to it.

    Attributes:
        piece_elements: Elements that are worked on at a time.
    """

    piece_elements: int = PIECE_ELEMENTS
    reads_files = False

    def merge(self, op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float) -> Merged:
        """Merge one chunk, as `Backend.merge` says."""
        per_element, per_task = (
            tuple(map(torch.as_tensor, arrays)) for arrays in (inputs.per_element, inputs.per_task)
        )
        values, parts = chunk.values, []
        for start in range(0, max(1, chunk.num_elements), self.piece_elements):
            piece = slice(start, start + self.piece_elements)
            numbers = Inputs(tuple(found[piece] for found in per_element), per_task)
            parts.append(
                merge_piece(op, [row[piece] for row in values], numbers, torch_dtype(dtype), scaling)
            )
        merged, counts, probes = zip(*parts, strict=True)
        total = torch.stack(counts).sum(dim=0).numpy()
        return Merged(Stored.of(torch.cat(merged)), total, float(torch.stack(probes).sum()))

    def task_vectors(self, chunk: RawChunk, room: Callable[[], np.ndarray]) -> Vectors:
        """Return the task vectors of a chunk, as `Backend.task_vectors` says."""
        return chunk.task_vectors()

    def products(self, chunk: RawChunk, *, with_base: bool = True) -> BlockSums:
        """Return inner products block by block, as `Backend.products` says."""
        vectors = chunk.vectors() if with_base else chunk.task_vectors()
        step = max(1, self.piece_elements // BLOCK) * BLOCK
        sums = [np.empty((num_pairs(len(vectors)), 0))]
        for start in range(0, vectors.shape[1], step):
            blocks = in_blocks(vectors[:, start : start + step], np.zeros)
            sums.append(np.concatenate(block_sums(np.ascontiguousarray(blocks))))
        return np.concatenate(sums, axis=1)

    def of_matrices(
        self,
        function: Callable[[Float32[torch.Tensor, "tasks rows columns"]], Any],
        task_vectors: Float32[torch.Tensor, "tasks rows columns"],
    ) -> Any:
        """Return what a function makes of a matrix, as `Backend.of_matrices` says."""
        return function(task_vectors)

    def mix(
        self, start: int, count: int, generator: CounterGenerator, edges: Edges, tasks: PerTask
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element, as `Backend.mix` says."""
        places = np.zeros(count, dtype=np.uint8)
        for piece, part in self._pieces(places):
            first = start + piece.start
            keys = generator.keys(np.arange(first, first + len(part)), stream=0).view(np.uint64)
            for edge in edges:
                places[piece] += keys >= edge
        return np.take(tasks, places, mode="clip")

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: MostKeys
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept, as `Backend.drop` says."""
        kept = np.zeros(((len(streams) + 3) // 4, count), dtype=np.uint8)
        for piece, found in self._pieces(kept):
            first = start + piece.start
            indices = np.arange(first, first + found.shape[1], dtype=np.int64)
            for pair, stream in enumerate(streams):
                keys = generator.keys(indices, stream).view(np.uint64)
                halves = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
                for task, drawn in enumerate(halves, 2 * pair):
                    found[task // 8] |= (drawn <= most[task]).view(np.uint8) << np.uint8(task % 8)
        return kept

    def scores(self, chunk: RawChunk, numbers: PerTaskRows) -> Vectors:
        """Return how much each task claims each element, as `Backend.scores` says."""
        found, bounds = (
            np.empty((numbers.shape[1], chunk.num_elements), np.float32),
            torch.from_numpy(numbers),
        )
        for piece, rows in self._pieces(chunk.task_vectors()):
            found[:, piece] = scores([*torch.from_numpy(rows)], *bounds).numpy()
        return found

    def spreads(self, chunk: RawChunk, active: Tasks, out: Spreads) -> None:
        """Write how far the elements of some tasks differ, as `Backend.spreads` says."""
        for piece, rows in self._pieces(chunk.task_vectors()):
            out[piece] = spreads(rows[active])

    def square_sums(self, chunk: RawChunk, spread: Spreads, least: np.float32, out: SquareSums) -> None:
        """Write sums of squares, as `Backend.square_sums` says."""
        for piece, rows in self._pieces(chunk.task_vectors(), SUMMED):
            blocks = slice(piece.start // SUMMED, piece.stop // SUMMED)
            out[:, blocks] = square_sums(rows, spread[piece], least)

    def factors_by_rank(
        self,
        start: int,
        chunk: RawChunk,
        generator: CounterGenerator,
        streams: Sequence[int],
        table: RankTable,
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return what each element is multiplied by, as `Backend.factors_by_rank` says."""
        length = (table.most.shape[1] + 1) // 2
        numbers = torch.from_numpy(np.asarray(table.most).astype(np.int64)), torch.from_numpy(table.factors)
        found = np.empty((len(table.most), chunk.num_elements), np.float32)
        for piece, rows in self._pieces(chunk.task_vectors(), length):
            indices = np.arange(start + piece.start, start + piece.start + rows.shape[1])
            keys = [generator.keys(indices, stream).view(np.uint64) for stream in streams]
            halves = [half for key in keys for half in (key & np.uint64(2**32 - 1), key >> np.uint64(32))]
            draws = torch.from_numpy(np.stack(halves[: len(rows)]).view(np.int64))
            found[:, piece] = factors_by_rank(torch.from_numpy(rows), draws, *numbers).numpy()
        return found

    def magnitude_sums(self, chunk: RawChunk, factors: Vectors, length: int) -> RowSums:
        """Return sums of the magnitudes of rows, as `Backend.magnitude_sums` says."""
        found = np.empty((2, len(factors), chunk.num_elements // length))
        for piece, rows in self._pieces(chunk.task_vectors(), length):
            own = slice(piece.start // length, piece.stop // length)
            found[..., own] = magnitude_sums(rows, factors[:, piece], length)
        return found

    def rank(self, chunk: RawChunk, wanted: PerTask, owner: Owners, codes: Codes) -> None:
        """Write winners and codes, as `Backend.rank` says."""
        for piece, rows in self._pieces(chunk.task_vectors()):
            magnitudes = [
                np.abs(row) if is_wanted else np.zeros_like(row)
                for row, is_wanted in zip(rows, wanted, strict=True)
            ]
            owner[piece], codes[piece] = _ranked(magnitudes, codes.dtype)

    def count(self, owner: Owners, value: int) -> int:
        """Return the number of elements that an owner holds."""
        return sum(int(np.count_nonzero(block == value)) for _, block in self._pieces(owner))

    def draw(self, owner: Owners, codes: Codes, draw: Draw, room: int) -> Places:
        """Give elements to their heirs, as `Backend.draw` says."""
        between = [np.empty(0, np.int64)]
        for piece, block in self._pieces(owner):
            places = np.flatnonzero(block == draw.value) + piece.start
            keys = keys_of(places, draw.before, draw.middle)
            is_given = keys < draw.low
            hand_over(owner, codes, places[is_given], draw)
            between.append(places[~is_given & (keys <= draw.high)])
        return np.concatenate(between)

    def histogram(self, chunk: RawChunk, histograms: Histograms, rule: Any = None) -> bool:
        """Add magnitudes to histograms, as `Backend.histogram` says; nothing is merged meanwhile."""
        for _, rows in self._pieces(chunk.task_vectors()):
            for number, (low, high, shift, *_) in enumerate(histograms.bounds.tolist()):
                bits = np.abs(rows[number // histograms.num_ranks]).view(np.int32)
                # numpy compares at .04 ns per element, and finds few places among many at .2 ns.
                inside = bits[np.flatnonzero((bits > low) & (bits < high))]
                outside = bits > high, bits == high, bits == low
                histograms.outside[number] += [np.count_nonzero(is_there) for is_there in outside]
                own = slice(*histograms.edges[number : number + 2])
                places, bins = (inside - low) >> shift, histograms.bins[own]
                bins += np.bincount(places, minlength=len(bins))
                np.maximum.at(histograms.most[own], places, inside - low + 1)
                np.maximum.at(histograms.least[own], places, high - inside + 1)
        return False

    def part(self, owner: Owners, codes: Codes, value: int, bits: int, name: int) -> int:
        """Rename elements whose codes have none of some bits, as `Backend.part` says."""
        found = 0
        for piece, block in self._pieces(owner):
            is_part = (block == value) & (codes[piece] & codes.dtype.type(bits) == 0)
            np.putmask(block, is_part, np.uint8(name))
            found += int(np.count_nonzero(is_part))
        return found

    def rename(self, owner: Owners, names: Names) -> None:
        """Turn every owner into its entry of `names`."""
        for _, block in self._pieces(owner):
            np.take(names, block, out=block, mode="clip")

    def look(
        self,
        part: Iterable[tuple[int, RawChunk]],
        contest: Contest,
        owner: Owners,
        rule_of: RuleOf | None = None,
    ) -> Sight:
        """Write winners and collect elements near a tie, as `Backend.look` says, without merging."""
        counts, largest, kept = np.zeros(256, np.int64), 0.0, Kept(len(contest.active))
        classes = Classes(contest.codes, contest.examples.T)
        for start, chunk in part:
            for piece, rows in self._pieces(chunk.task_vectors()):
                values = np.abs(rows if len(contest.active) == len(rows) else rows[contest.active])
                largest = max(largest, float(values.max()))
                first = start + piece.start
                block = owner[first : first + values.shape[1]]
                block[:], places, alike = compare(values, contest)
                block[places] = classes.marks(alike)
                counts += np.bincount(block, minlength=256)
                single = places[block[places] == NOBODY]
                kept.add(single + first, values.take(single, axis=1).T)
        return Sight(counts, largest, kept)

    def _pieces(
        self, values: Shaped[np.ndarray, "*rows elements"], multiple_of: int = 1
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield pieces of an array along its last axis, in multiples of some elements, and their places."""
        length = max(1, self.piece_elements // multiple_of) * multiple_of
        for start in range(0, values.shape[-1], length):
            piece = slice(start, start + length)
            yield piece, values[..., piece]


def _ranked(
    magnitudes: Sequence[Float32[np.ndarray, " block"]], dtype: np.dtype[Any]
) -> tuple[UInt8[np.ndarray, " block"], Shaped[np.ndarray, " block"]]:
    """Return winners and codes of one block, from at least two tasks.

    In numpy, whose comparisons cost .04 ns per element where torch's cost 1.2: 2 ns in all for five
    tasks, against 22.
    """
    first, best = magnitudes[:2]
    best_task = np.ones(first.shape, dtype=np.uint8)
    code = (best >= first).astype(dtype) << 1
    for task, magnitude in enumerate(magnitudes[2:], start=2):
        rises = magnitude >= best
        # Tasks come in order, so the largest number is the latest rise.
        np.maximum(best_task, rises.view(np.uint8) * np.uint8(task), out=best_task)
        code |= (rises & (magnitude >= first)).astype(dtype) << task
        best = np.maximum(best, magnitude)
    first_wins = first > best
    # Where task 0 wins, no other task reached it and the code is still empty.
    alone = np.array([(1 << task) | 1 for task in range(len(magnitudes))], dtype=dtype)
    code |= np.take(alone, best_task, mode="clip") * first_wins
    return _with_ties(magnitudes, best_task * ~first_wins, code)


def _with_ties(
    magnitudes: Sequence[Float32[np.ndarray, " block"]],
    owner: UInt8[np.ndarray, " block"],
    code: Shaped[np.ndarray, " block"],
) -> tuple[UInt8[np.ndarray, " block"], Shaped[np.ndarray, " block"]]:
    """Return winners and codes with those of elements that several tasks share."""
    top = np.maximum.reduce(magnitudes)
    tied = np.zeros_like(code)
    for task, magnitude in enumerate(magnitudes):
        tied |= (magnitude == top).astype(code.dtype) << code.dtype.type(task)
    is_tied = (tied & (tied - code.dtype.type(1))) != 0
    owner = np.where(is_tied, highest_bit(tied) + np.uint8(TIED), owner)
    return np.where(top == 0, np.uint8(ZERO), owner), np.where(is_tied, tied, code)


def hand_over(owner: Owners, codes: Codes, places: Places, draw: Draw) -> None:
    """Give elements to their heirs, as `Draw` says."""
    heirs = highest_bit(codes[places] & codes.dtype.type(draw.mask))
    owner[places] = heirs + draw.mark


_BIT_LENGTHS = np.array([byte.bit_length() for byte in range(256)], dtype=np.uint8)


def highest_bit(codes: Shaped[np.ndarray, " count"]) -> UInt8[np.ndarray, " count"]:
    """Return the place of each code's highest bit, 0 where no bit is set."""
    highest = np.zeros(codes.shape, dtype=np.uint8)
    for shift in range(0, 8 * codes.itemsize, 8):
        length = np.take(_BIT_LENGTHS, (codes >> shift).astype(np.uint8), mode="clip")
        highest = np.maximum(highest, (length + np.uint8(shift) - np.uint8(1)) * (length > 0))
    return highest


def merge_piece(
    op: Op, values: Sequence[torch.Tensor], inputs: Inputs, dtype: torch.dtype, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return merged values, elements per task, and the sum of everything, which overflows at worst."""
    base, *checkpoints = values
    rows = task_rows(base, checkpoints)
    found = op.find(rows, inputs, base)
    counts = torch.empty(0, dtype=torch.int64)
    if op.selects:
        counts = torch.bincount(found, minlength=len(rows))
        found = select_rows(rows, found)
    merged = apply_update(base, found, scaling, dtype)
    probe = torch.stack([row.sum() for row in (*rows, merged.float())]).sum()
    return merged, counts, probe
