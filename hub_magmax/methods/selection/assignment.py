"""The selection that keeps the most magnitude, of all that meet the quotas.

Every task has a price, and an element goes to a task whose magnitude exceeds its price the most:
winner = argmax_t |τ_t| − p_t. Prices at which every task can get its quota are optimal, because they solve
the dual of a transportation problem. A tensor is solved in these steps:

1. Sample: the prices of a sample are nearly right. How counts vary in it says by how much they may be off,
   and gives each price a range; the ranges together are a box.
2. One pass: an element that has the same winner at all prices in the box goes to it. Of elements that tie
   exactly at the sample's prices, and have no other task in reach, a class is counted for each set of tasks.
   The others are kept: values and places, some per cent.
3. What was kept, and the classes, are solved exactly in memory (`prices`).
4. Where their prices lie outside the box, the sample misled: back to 2, with a wider box.
5. Elements that tie at the last prices are shared out by counter-based draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.structures import FIRST_MARK
from hub_magmax.kernels.winners import Classes, RuleOf, compare, mixed, on_grid
from hub_magmax.methods.chunks import (
    ArrayChunks,
    Chunks,
    Selection,
    blocks,
    check_task_count,
)
from hub_magmax.methods.selection.looks import MAX_CLASSES, Contest, Seen, look
from hub_magmax.methods.selection.owners import MAX_TASKS, rename
from hub_magmax.methods.selection.prices import (
    FAR,
    Box,
    Market,
    Prices,
    leaders,
    rough,
    smallest,
    solve,
    tied_masks,
)
from hub_magmax.methods.selection.sharing import share_out

#: Tensors of up to this many numbers (tasks times elements) are read once and held.
HELD_NUMBERS = 1 << 20
#: Tensors of up to this many elements are solved without a sample.
DIRECT_ELEMENTS = 1 << 12
#: Standard deviations of a sample's counts by which its prices may at first be wrong.
DEVIATIONS = 3.0
_MAX_ATTEMPTS = 4
# Magnitudes are rounded to whole numbers of this many bits, relative to the largest of a sample.
_GRID_BITS, _LEAST_BITS, _MOST_BITS = 42, 40, 47
# A sample is read in runs of neighbours. To read 256 takes as long as to read 64; but neighbours can be
# alike, so there are as many runs as this, if they have 64 or more.
_RUNS, _SHORTEST, _LONGEST = 256, 64, 256
MIN_SAMPLE = 1 << 11
_FEW = 1 << 10
_MIN_CLASS = 8


def top_n(
    chunks: Chunks, quotas: Sequence[int], generator: CounterGenerator, *, rule_of: RuleOf | None = None
) -> Selection:
    """Select so that the kept magnitude is the largest that the quotas allow.

    Magnitudes are compared at a resolution of 2**-42 of the tensor's largest or finer, and at that resolution
    the result is optimal. With equal prices this is MAGMAX. Elements that are worth the same to several tasks
    are shared out between these at random.

    Args:
        chunks: Read once, and a sample of them before if they are not small; once more each time that the
            sample misleads; once more if it is not certain that the duality gap is zero. Besides a byte per
            element, some per cent of the elements are kept in memory.
        quotas: Elements per task, as `quotas` returns them. A task without a quota never wins.
        generator: Decides between equals.
        rule_of: Turns winners of a chunk (uint8) into the rule that takes each element from its winner, for
            those that may be merged while they are looked at.

    Returns:
        The selection; its counts equal `quotas`.

    Raises:
        RecipeError: If more than 64 tasks have a quota.

    Source: ours.
    """
    assert len(quotas) == chunks.num_tasks and sum(quotas) == chunks.num_elements
    active = np.flatnonzero(quotas)
    check_task_count(len(active), limit=MAX_TASKS)
    prices, gap = np.zeros(len(active)), 0.0
    if len(active) <= 1:
        owner = chunks.scratch.zeros(chunks.num_elements, np.uint8)
    else:
        chunks = _hold(chunks)
        wanted = np.array(quotas)[active]
        contest, seen, rest, found = _solve(chunks, wanted, _read_sample(chunks, active, wanted), rule_of)
        owner, prices = seen.owner, (found - found.min()) / contest.scale
        if not _share_out(seen, rest, found, chunks, generator):
            gap = _duality_gap(chunks, active, owner, prices)
    of_task = dict(zip(active.tolist(), prices.tolist(), strict=True))
    names = np.arange(256, dtype=np.uint8)
    names[: len(active)] = active
    rename(owner, names, chunks.backend)
    return Selection(
        owner=owner,
        counts=tuple(quotas),
        num_unaligned=(0,) * len(quotas),
        duality_gap=gap,
        prices=tuple(of_task.get(task, math.inf) for task in range(len(quotas))),
    )


def _hold(chunks: Chunks) -> Chunks:
    """Read a small tensor into memory."""
    if isinstance(chunks, ArrayChunks) or chunks.num_tasks * chunks.num_elements > HELD_NUMBERS:
        return chunks
    size = chunks.num_elements
    return ArrayChunks(chunks.runs(size, size), backend=chunks.backend)


@dataclass(frozen=True)
class _Stock:
    """Elements in memory, and classes of equal ones.

    Attributes:
        values: Magnitudes.
        times: Elements that have each column of these; none where each is one element.
        rows: Of classes, on the grid; −inf where a class cannot go.
        sizes: Elements of each class.
        quotas: What elements and classes sum to.
    """

    values: Float32[np.ndarray, "tasks columns"]
    times: Int64[np.ndarray, " times"]
    scale: float
    quotas: Int64[np.ndarray, " tasks"]
    backend: Backend
    rows: Float64[np.ndarray, "tasks classes"]
    sizes: Int64[np.ndarray, " classes"]

    def seen(self, box: Box) -> Seen:
        num_tasks = len(self.quotas)
        contest = Contest(np.arange(num_tasks), self.scale, box, Classes.none(num_tasks))
        seen = look(ArrayChunks(self.values, backend=self.backend), contest)
        if len(self.times):
            counts = np.bincount(seen.owner, self.times, len(seen.counts)).astype(np.int64)
            seen = replace(seen, counts=counts)
        return seen

    def elements(self, columns: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """Return how many elements have each of some columns."""
        return self.times[columns] if len(self.times) else np.ones(len(columns), np.int64)

    def market(self, seen: Seen) -> Market:
        """Return what a look left open, with all classes."""
        values = np.concatenate((on_grid(seen.values, self.scale), self.rows), axis=1)
        sizes = np.concatenate((self.elements(seen.places), self.sizes))
        return Market(values, sizes, self.quotas - seen.counts[: len(self.quotas)])

    def solve(self, *start: Any) -> tuple[Prices, Prices] | None:
        return solve(lambda box: self.market(self.seen(box)), *start)


# Steps 1 to 4 of this module's docstring, with their ways back: apart they would hand nine values on.
def _solve(
    chunks: Chunks, quotas: Int64[np.ndarray, " tasks"], sample: _Sample, rule_of: RuleOf | None
) -> tuple[Contest, Seen, _Stock, Prices]:
    """Return a look at all elements, what it left open, and prices at which the quotas can be met."""
    prices, widths = _rough(sample)
    if not sample.is_whole:
        solved = sample.stock.solve(prices, widths, sample.stock.quotas)
        assert solved is not None, "elements of a sample can go to every task"
        prices, densities = solved
    for attempt in range(_MAX_ATTEMPTS + 1):
        if not sample.is_whole and attempt < _MAX_ATTEMPTS:
            box = _bound(sample, prices, DEVIATIONS * 4**attempt, densities)
            classes, widths = _classes(sample.stock, box), np.rint(_sides(box) / 16) + 1
        else:
            box, classes = Box.everywhere(prices), Classes.none(len(quotas))
        contest = Contest(sample.active, sample.stock.scale, box, classes)
        seen = look(chunks, contest, rule_of)
        if seen.largest and not 2.0**_LEAST_BITS <= seen.largest * contest.scale < 2.0**_MOST_BITS:
            stock = replace(sample.stock, scale=_scale(seen.largest))
            return _solve(chunks, quotas, replace(sample, stock=stock), rule_of)
        rest = _Stock(
            seen.values,
            np.empty(0, np.int64),
            contest.scale,
            quotas - seen.counts[: len(quotas)],
            chunks.backend,
            np.where(classes.distances < 0, -np.inf, box.prices[:, None] - classes.distances),
            seen.counts[FIRST_MARK : FIRST_MARK + len(classes.codes)],
        )
        solved = rest.solve(prices, widths) if rest.quotas.min() >= 0 else None
        if solved is not None:
            prices = solved[0]
            if box.contains(prices):
                return contest, seen, rest, prices
    raise AssertionError("everywhere, prices can be found")


def _rough(sample: _Sample) -> tuple[Prices, Prices]:
    """Return prices that are right for a few of the elements, and how far they may be off."""
    stock, total = sample.stock, len(sample.columns)
    values = on_grid(stock.values[:, sample.columns[:: -(-total // _FEW)]], stock.scale)
    quotas = np.rint(stock.quotas * (values.shape[1] / total)).astype(np.int64)
    return rough(values, quotas), np.full(len(values), np.rint(values.mean() / 16) + 1)


@dataclass(frozen=True)
class _Sample:
    """Some elements of a tensor, or all of a small one, with quotas of their own.

    Attributes:
        stock: A column for each element, or for all that are alike where many are.
        columns: That of each element.
        run: How many in a row are neighbours.
    """

    stock: _Stock
    columns: Int64[np.ndarray, " elements"]
    active: Int64[np.ndarray, " tasks"]
    is_whole: bool
    run: int


def _read_sample(
    chunks: Chunks, active: Int64[np.ndarray, " tasks"], quotas: Int64[np.ndarray, " tasks"]
) -> _Sample:
    num_elements = chunks.num_elements
    length = every = num_elements
    if num_elements > DIRECT_ELEMENTS:
        size = max(MIN_SAMPLE, int(2 * num_elements ** (2 / 3) * max(1, (len(active) / 5) ** 0.5)))
        length = min(max(_SHORTEST, size // _RUNS), _LONGEST)
        every = num_elements * length // size | 1  # odd, so that runs begin in ever other columns of a matrix
    values = np.abs(chunks.runs(length, every)[active])
    total = values.shape[1]
    shares = np.maximum(1, np.floor(quotas * (total / num_elements)).astype(np.int64))
    # Rounding down leaves some over and raising to one takes too many: the largest quotas make up for it.
    while missing := total - int(shares.sum()):
        largest = int(shares.argmax())
        shares[largest] += max(missing, 1 - int(shares[largest]))
    nothing = np.empty((len(active), 0)), np.empty(0, np.int64)
    values, columns, times = _distinct(values)
    stock = _Stock(values, times, _scale(float(values.max())), shares, chunks.backend, *nothing)
    return _Sample(stock, columns, active, total == num_elements, length)


def _distinct(
    values: Float32[np.ndarray, "tasks elements"],
) -> tuple[Float32[np.ndarray, "tasks columns"], Int64[np.ndarray, " elements"], Int64[np.ndarray, " times"]]:
    """Return different columns, that of each element, and how many elements have each.

    Rounded task vectors often have few. Of others the columns stay as they are, and nothing is counted.
    """
    codes, every = mixed(values.view(np.int32)), -(-values.shape[1] // _FEW)
    if 2 * len(np.unique(codes[::every])) < len(codes[::every]):
        _, first, columns, times = np.unique(
            codes, return_index=True, return_inverse=True, return_counts=True
        )
        found = values.take(first, axis=1)
        if np.array_equal(found.take(columns, axis=1), values):
            return found, columns, times
    return values, np.arange(len(codes)), np.empty(0, np.int64)


def _scale(largest: float) -> float:
    """Return what turns magnitudes into numbers on the grid: a power of two."""
    return math.ldexp(1.0, _GRID_BITS - math.frexp(largest)[1])


def _bound(sample: _Sample, prices: Prices, deviations: float, densities: Prices) -> Box:
    """Bound the error of prices that solve a sample.

    A sample's count above the right price is off by a few standard deviations, so the right price lies
    between the elements that many ranks above and below the quota. Neighbours are more alike than chance has
    it, and so counts of the runs in a sample vary more.
    """
    stock, run = sample.stock, sample.run
    total, num_tasks = len(sample.columns), len(prices)
    seen = stock.seen(Box(prices, np.zeros(num_tasks), np.zeros(num_tasks)))
    masks = tied_masks(on_grid(seen.values, stock.scale) - prices[:, None])
    ranks = np.empty(num_tasks, np.int64)
    for task, quota in enumerate(stock.quotas.tolist()):
        wins = seen.owner == task
        wins[seen.places] = masks >> task & 1
        runs = np.add.reduceat(
            wins[sample.columns] if len(stock.times) else wins, np.arange(0, total, run), dtype=np.int64
        )[: total // run]
        spread = max(quota * (total - quota) / total, len(runs) * runs.var()) ** 0.5
        # The second term matters for small quotas: how far their counts spread is itself uncertain.
        ranks[task] = math.ceil(deviations * spread + deviations**2 / 2)
    widths = np.rint(ranks / densities) + 1
    while True:
        box = _ranges(
            stock.market(stock.seen(Box.around(prices, widths))), prices, stock.quotas, ranks, total
        )
        if widths.min() >= FAR or (_sides(box) <= widths + widths.min()).all():
            return box
        widths = 4 * widths


def _sides(box: Box) -> Prices:
    """Return the longer side of each price, of those that end."""
    return np.maximum(np.where(box.down < FAR, box.down, 0), np.where(box.up < FAR, box.up, 0))


def _ranges(
    market: Market,
    prices: Prices,
    quotas: Int64[np.ndarray, " tasks"],
    ranks: Int64[np.ndarray, " tasks"],
    total: int,
) -> Box:
    """Return how far each price moves until its task wins `ranks` elements more or fewer than its quota."""
    net = market.values - prices[:, None]
    winner, _, leads = leaders(net)
    best, box, settled = net.max(axis=0, initial=-np.inf), Box.everywhere(prices), quotas - market.quotas
    for task, (row, quota, rank) in enumerate(zip(net, quotas.tolist(), ranks.tolist(), strict=True)):
        won, lost = np.where(winner == task, leads, 0), best - row
        above = int(settled[task] + market.sizes[won > 0].sum())
        level = int(settled[task] + market.sizes[row == best].sum())
        if quota > rank:
            box.up[task] = _ranked(won, market.sizes, above - (quota - rank))
        if quota + rank <= total:
            box.down[task] = _ranked(lost, market.sizes, quota + rank - level - 1)
    return box


def _ranked(
    values: Float64[np.ndarray, " columns"], sizes: Int64[np.ndarray, " columns"], place: int
) -> float:
    """Return the positive value at a place in ascending order, 0 before all, almost infinite after all."""
    if place < 0:
        return 0.0
    return smallest(values, sizes, place + 1) if place < sizes[values > 0].sum() else FAR / 2


def _classes(sample: _Stock, box: Box) -> Classes:
    """Return the most frequent classes of a sample."""
    contest = Contest(np.arange(len(box.prices)), sample.scale, box, Classes.none(len(box.prices)))
    seen = sample.seen(box)
    _, open_ones, alike = compare(seen.values, contest.as_arrays())
    codes, first, inverse = np.unique(alike.codes, return_index=True, return_inverse=True)
    counts = np.bincount(inverse, sample.elements(seen.places[open_ones]), len(codes))
    frequent = (-counts).argsort(kind="stable")[:MAX_CLASSES]
    frequent = np.sort(frequent[(counts[frequent] >= _MIN_CLASS) & (codes[frequent] != 0)])
    return Classes(codes[frequent], alike.distances[:, first[frequent]])


def _share_out(seen: Seen, rest: _Stock, prices: Prices, chunks: Chunks, generator: CounterGenerator) -> bool:
    """Fill in winners of what was left open; say whether each is certainly best off with its own."""
    last = rest.seen(Box(prices, np.zeros(len(prices)), np.zeros(len(prices))))
    seen.owner[seen.places] = last.owner
    places = seen.places[last.places]
    share_out(seen.owner, places, rest.market(last), prices, chunks, generator)
    net = last.values.astype(np.float64) - (prices / rest.scale)[:, None]
    own = np.take_along_axis(net, seen.owner[places].astype(np.int64)[None], axis=0)
    return not bool((net > own).any())


def _duality_gap(
    chunks: Chunks, active: Int64[np.ndarray, " tasks"], owner: UInt8[np.ndarray, " elements"], prices: Prices
) -> float:
    """Return how much the kept magnitude could at most grow, as a fraction of it, by a look at all elements.

    With counts equal to quotas, dual minus primal value is the sum over elements of what the winner falls
    short of the best task, both net of prices; so nothing cancels.
    """
    sums: list[tuple[float, float]] = []
    for start, block in blocks(chunks):
        values = np.abs(block[active]).astype(np.float64)
        winner = owner[None, start : start + block.shape[1]].astype(np.int64)
        net = values - prices[:, None]
        regrets = net.max(axis=0) - np.take_along_axis(net, winner, axis=0)
        sums.append((float(regrets.sum()), float(np.take_along_axis(values, winner, axis=0).sum())))
    regret, kept = (math.fsum(column) for column in zip(*sums, strict=True))
    return regret / kept if kept else (math.inf if regret else 0.0)
