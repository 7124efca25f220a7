"""Named groups of arrays and numbers that backends and compiled loops take as one argument."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Shaped, UInt8, UInt16, UInt32, UInt64

#: Task vectors of a chunk.
Vectors = Float32[np.ndarray, "tasks chunk"]
#: Sums of the products of each pair of vectors over each block.
BlockSums = Float64[np.ndarray, "pairs blocks"]
#: A number for each task, for each element, and for each kind of owner.
PerTask = UInt8[np.ndarray, " tasks"]
Owners = UInt8[np.ndarray, " elements"]
Names = UInt8[np.ndarray, "256"]
#: Rows of numbers, each with one for every task.
PerTaskRows = Float32[np.ndarray, "rows tasks"]
#: Numbers of some tasks; how far tasks differ on each element; and sums of squares.
Tasks = Int64[np.ndarray, " some"]
Spreads = Float32[np.ndarray, " chunk"]
SquareSums = Float64[np.ndarray, "tasks blocks"]
#: Sums of the magnitudes of each row, of all of them and of those that are kept.
RowSums = Float64[np.ndarray, "2 tasks rows"]
#: Sets of tasks as bits, without a sign, for each element.
Codes = Shaped[np.ndarray, " elements"]
#: Indices of some elements.
Places = Int64[np.ndarray, " places"]
#: Keys without a sign, ascending.
Edges = UInt64[np.ndarray, " edges"]
#: The largest halves of keys with which elements are kept, for each task.
MostKeys = UInt32[np.ndarray, " tasks"]

#: Owners of an element besides tasks: marks of classes from the first one on, or nobody.
FIRST_MARK, NOBODY = 64, 254

#: Owners of an element on which several tasks are largest, this number plus the last of them, and of one that
#: is zero in every task.
TIED, ZERO = 128, 253


class Bits(NamedTuple):
    """Values of a chunk for loops over a whole tensor: bits of bfloat16 (uint16) or of float32 (uint32).

    Attributes:
        rows: A row per task, each `stride` after the one before.
        base: The base model's row, yet to be subtracted; empty where `rows` are task vectors.
    """

    rows: Shaped[np.ndarray, " memory"]
    stride: int
    base: Shaped[np.ndarray, " _"]


class Draw(NamedTuple):
    """A draw among the elements of one owner: those of small keys go to their heirs.

    An heir is the highest task in an element's code among those in `mask`, task 0 where there is none.

    Attributes:
        value: The owner.
        mask: Tasks as bits.
        mark: Added to the number of the heir, which gives the new owner.
        before, middle: Constants of the stream of keys, for indices from the first element on.
        low, high: Elements of keys below `low` are given away; those up to `high` are collected.
    """

    value: np.uint8
    mask: int | np.uint32
    mark: np.uint8
    before: np.uint64
    middle: np.uint64
    low: int
    high: int


class Histograms(NamedTuple):
    """Histograms of magnitudes between two bounds, some for each task; what equals a bound is only counted.

    Attributes:
        num_ranks: Histograms per task; those of the first task come first.
        bounds: Five numbers per histogram: `low` and `high`, as bits, and `shift`: a bin holds 2**shift
            neighbouring magnitudes, the first one beginning at `low`; and the least and the largest magnitude
            that leaves an element open.
        edges: Where the bins of each histogram begin, and the number of all bins.
        bins: Magnitudes in each bin, added to.
        most, least: Per bin: its largest less `low`, `high` less its smallest, plus 1 each, raised.
        outside: Three numbers per histogram, added to: how many lie above `high`, at it, and at `low`.
    """

    num_ranks: int
    bounds: Int32[np.ndarray, "histograms 5"]
    edges: Int64[np.ndarray, " edges"]
    bins: Int64[np.ndarray, " bins"]
    most: Int32[np.ndarray, " bins"]
    least: Int32[np.ndarray, " bins"]
    outside: Int64[np.ndarray, "histograms 3"]


class Reading(NamedTuple):
    """The source of a chunk: files that are open, or memory.

    Attributes:
        descriptors: int32, of the open file of each row; none if `memory` holds all of the chunk.
        places: int64, the byte of the file at which the tensor of each row begins.
        spent: int64, 4: the number of a clock, nanoseconds that are added to, and two to be overwritten.
        offset: Bytes from `places` to the chunk.
        memory: A row of bits per checkpoint, the base model's first: float32 as uint32, bfloat16 as uint16.
            For files: memory for as much as is read at a time, a multiple of `BLOCK`.
        flat: The same memory, row after row.
    """

    descriptors: Int32[np.ndarray, " _"]
    places: Int64[np.ndarray, " _"]
    spent: Int64[np.ndarray, " _"]
    offset: int
    memory: Shaped[np.ndarray, "rows elements"]
    flat: Shaped[np.ndarray, " memory"]


class Merging(NamedTuple):
    """The merge of a chunk by one operation.

    Attributes:
        kind: Number of the operation.
        per_task: Tasks in its columns. The last row holds weights; before it `TIES` and `TIES_SUM` have
            thresholds, `RESCALED_TIES` thresholds and shares, `BAND` the least and the largest magnitudes,
            `DROPPED_TIES` shares, and `DROPPED_TIES_SUM` rescaled weights. `LARGEST` and `CHOSEN` have no
            rows.
        per_element: Elements in its columns: winners for `CHOSEN`, bits of kept elements, as `drop` writes
            them, for `DROPPED`, `DROPPED_TIES` and `DROPPED_TIES_SUM`; else no rows.
        scaling: Scaling coefficient, float32.
        out: Takes merged elements as bits, of the dtype of the rows.
        counts: Elements from each task, added to by `LARGEST` and `CHOSEN`.
        scratch: Tasks by `LANES`.
        winners: `BLOCK`, scratch.
    """

    kind: int
    per_task: Float32[np.ndarray, "numbers tasks"]
    per_element: UInt8[np.ndarray, "rows elements"]
    scaling: np.float32
    out: Shaped[np.ndarray, " elements"]
    counts: Int64[np.ndarray, " tasks"]
    scratch: Int32[np.ndarray, "tasks lanes"]
    winners: UInt8[np.ndarray, " block"]


class Undecided(NamedTuple):
    """Elements of a chunk that a survey leaves open, and the largest magnitude of the merged ones.

    Attributes:
        number: One number, added to: the elements.
        largest: One number, raised: the largest bits merged.
        places: As long as the chunk, takes the places of undecided elements.
        rows: Takes their stored bits, in rows as long as that.
    """

    number: Int64[np.ndarray, " one"]
    largest: Int64[np.ndarray, " one"]
    places: Int64[np.ndarray, " elements"]
    rows: Shaped[np.ndarray, "rows elements"]


class Ranking(NamedTuple):
    """Scratch of loops that rank the elements of one row at a time.

    Bins hold neighbouring magnitudes, in ascending order, and are numbered thrice: first for what equals the
    lower end of its bin, but not in the first one, which has none; then sixteen numbers for zeros, of which
    neighbours have different ones, so that they are counted at different places; then for all others.

    Attributes:
        bits, bins, keys: Elements of a row, up to a multiple of sixteen: magnitudes, numbers of their bins,
            and random keys.
        counts, bounds, factors: By these numbers, of which there are twice the bins and sixteen: elements,
            the largest draw that keeps them, and their factor.
        below: By bin, the elements of smaller bins, and of its own lower end, that equal an end, or are zero.
        sorted: Elements of a row: others, as bits above their places.
    """

    bits: UInt32[np.ndarray, " padded"]
    bins: UInt16[np.ndarray, " padded"]
    keys: Int64[np.ndarray, " padded"]
    counts: UInt32[np.ndarray, " numbers"]
    bounds: UInt32[np.ndarray, " numbers"]
    factors: Float32[np.ndarray, " numbers"]
    below: Int64[np.ndarray, " bins"]
    sorted: UInt64[np.ndarray, " elements"]

    @classmethod
    def of_rows(cls, length: int, lanes: int) -> Ranking:
        """Return scratch for rows of `length` elements, and a bin for two to four of them."""
        padded, bins = -(-length // lanes) * lanes, 1 << min(max(length.bit_length() - 2, 5), 14)
        numbers = 2 * bins + lanes
        return cls(
            np.empty(padded, np.uint32),
            np.empty(padded, np.uint16),
            np.empty(padded, np.int64),
            np.empty(numbers, np.uint32),
            np.empty(numbers, np.uint32),
            np.empty(numbers, np.float32),
            np.empty(bins, np.int64),
            np.empty(length, np.uint64),
        )


class Contest(NamedTuple):
    """Tasks, their prices, and classes of elements, for `look`.

    Attributes:
        active: int64, the rows that take part; below, tasks are numbered as they are here.
        scale: float64, a power of two, turns magnitudes into numbers on the grid.
        bounds: float64, 3 rows of a number per task on the grid: prices, and the least and the most that they
            may be.
        bonuses: float32, 2 rows of a non-negative number per task: the most and the least in the box of what
            is added to its magnitudes, instead of a price that is subtracted from them; so bits sort like
            numbers.
        slots: int64, 2**k: at a code's low bits or after them, the number of its class, -1 where there is
            none.
        codes, examples: int64 and float64, per class a code, and how far each task is below the best.
    """

    active: np.ndarray
    scale: float
    bounds: np.ndarray
    bonuses: np.ndarray
    slots: np.ndarray
    codes: np.ndarray
    examples: np.ndarray


class Found(NamedTuple):
    """Results of `look`, and its scratch.

    Attributes:
        owner: uint8 per element: its winner, the mark of its class, or `NOBODY`.
        tasks: uint8 per element, takes the row that it was merged from, 0 where that is open; none where
            nothing is merged.
        counts: int64 for each byte, added to.
        largest: int64, two numbers, raised: the largest bits of a magnitude, and of what was merged.
        places: int64 per element, takes the places of those that belong to nobody.
        values: float32, elements by tasks, takes their magnitudes.
        near, grid, classes, opened: Scratch: float32 and float64, tasks by `LANES`, zeros at first; int64, 3
            by `LANES`; and int64, `BLOCK` + `SPARE`.
    """

    owner: np.ndarray
    tasks: np.ndarray
    counts: np.ndarray
    largest: np.ndarray
    places: np.ndarray
    values: np.ndarray
    near: np.ndarray
    grid: np.ndarray
    classes: np.ndarray
    opened: np.ndarray
