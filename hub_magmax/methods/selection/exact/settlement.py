"""One pass over a market: settle what no price in a box can change, group and collect the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.compiled import cache
from hub_magmax.methods.selection.exact.elements import Source, Stock, active_magnitudes, check_scale, on_grid
from hub_magmax.methods.selection.exact.market import Groups, Market
from hub_magmax.methods.selection.exact.price_bounds import Box
from hub_magmax.methods.selection.owners import FIRST_MARK, NOBODY, Owners

# Elements of a sample that must be alike to be treated as a group, and how many groups there can be.
_MIN_GROUP = 16
_MAX_GROUPS = NOBODY - FIRST_MARK
# Of a table in which compiled loops find them: a power of two, many times as many.
_SLOTS = 1 << 11


@dataclass(frozen=True)
class Split:
    """A market after one pass: settled elements, and the market of the rest.

    `owners` has the winners of settled elements, and a mark for the members of each group. `positions`
    says which elements of the market the rest consists of. `is_exact` says whether no magnitude of a group's
    member was rounded to the grid, so that members are alike to the last bit.
    """

    owners: Owners
    positions: Int64[np.ndarray, " rest"]
    rest: Market
    is_exact: bool


def settle(market: Market, box: Box, sample: Stock) -> Split:
    """Settle the elements whose winner is the same everywhere in the box, and group and collect the rest."""
    source, num_tasks = market.source, len(box.prices)
    contest = (_CompiledContest if source.is_compiled else _Contest)(source, box, _Grouping(box, sample))
    owners = Owners(source.num_elements, source.scratch)
    counts = np.zeros(256, dtype=np.int64)
    num_off_grid, rest = contest.settle(owners.owner, counts)
    positions, collected = rest.take()
    places = source.places_of(positions)
    stock = Stock(collected, places, source.scale, source.generator, source.is_compiled)
    groups = contest.grouping.groups(counts[FIRST_MARK:])
    quotas = market.quotas - counts[:num_tasks]
    inner = Market(stock, market.groups.and_also(groups), quotas, box.prices)
    return Split(owners, positions, inner, is_exact=not num_off_grid)


class _Rest:
    """Collects positions and their values in two buffers that grow.

    Keeping thousands of small tensors between large ones that come and go would leave the heap full of
    holes, ten times as large as what is collected.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._positions, self._values = bytearray(), bytearray()

    def add(self, positions: Int64[np.ndarray, " count"], values: Float32[np.ndarray, "count tasks"]) -> None:
        if len(positions):
            self._positions += positions.data.cast("B")
            self._values += values.data.cast("B")

    def extend(self, other: _Rest) -> None:
        self._positions += other._positions
        self._values += other._values

    def take(self) -> tuple[Int64[np.ndarray, " rest"], Float32[np.ndarray, "tasks rest"]]:
        """Return positions in order, and their values."""
        positions = np.frombuffer(self._positions, dtype=np.int64)
        values = np.frombuffer(self._values, dtype=np.float32).reshape(-1, self._num_tasks)
        if (positions[1:] < positions[:-1]).any():  # the shares of several threads
            order = positions.argsort(kind="stable")
            positions, values = positions[order], values[order]
        found = np.empty((self._num_tasks, len(positions)), np.float32)
        for start in range(0, len(positions), cache.BLOCK):  # in the cache: four times as fast as all at once
            found[:, start : start + cache.BLOCK] = values[start : start + cache.BLOCK].T
        return positions, found


#: Stands for an infinite distance on the grid: beyond every magnitude, and a number that can be subtracted.
_FAR = 2.0**60


def _rounded_outwards(
    bonuses: Float64[np.ndarray, " tasks"], scale: float, direction: int
) -> Float32[np.ndarray, " tasks"]:
    """Turn numbers on the grid into float32 numbers in the unit of the tensor, never closer."""
    # One more step, because magnitudes are rounded to the grid.
    exact = (bonuses + direction) / scale
    with np.errstate(over="ignore", invalid="ignore"):
        near = exact.astype(np.float32)
        closer = (near - exact) * direction < 0
    outwards = np.nextafter(near, np.float32(direction * math.inf))
    return np.where(closer, outwards, near)


class _Contest:
    """Who wins where, everywhere in the box.

    Instead of a price that is subtracted, each task has a bonus that is added: what its price is below a
    number that is above all prices. So nothing is negative, and bits of float32 sort like the numbers.
    Rounding keeps the order of numbers, so a strict inequality here holds exactly.
    """

    def __init__(self, source: Source, box: Box, grouping: _Grouping) -> None:
        self._source, self.grouping = source, grouping
        bottoms, tops = np.maximum(box.prices - box.down, -_FAR), np.minimum(box.prices + box.up, _FAR)
        above = tops.max() + 1
        self._most = _rounded_outwards(above - bottoms, source.scale, 1)
        self._least = _rounded_outwards(above - tops, source.scale, -1)

    def settle(
        self, owner: UInt8[np.ndarray, " elements"], counts: Int64[np.ndarray, " owners"]
    ) -> tuple[int, _Rest]:
        """Write winners and marks, and add up how many each has.

        Returns how many elements of groups have magnitudes that are not on the grid, and those of nobody.
        """
        active, scale = self._source.active, self._source.scale
        num_off_grid, rest = 0, _Rest(len(active))
        for start, block in self._source.blocks():
            part = owner[start : start + block.shape[1]]
            open_ = self._settle(block, part, counts[: len(active)])
            candidates = active_magnitudes(block.take(open_, axis=1), active)
            rounded = on_grid(candidates, scale)
            marks = self.grouping.marks(rounded)
            counts += np.bincount(marks, minlength=len(counts))
            part[open_] = marks
            single = np.flatnonzero(marks == NOBODY)
            rest.add(open_[single] + start, candidates[:, single].T)
            off_grid = (rounded != candidates.astype(np.float64) * scale).any(axis=0)
            num_off_grid += int(np.count_nonzero(off_grid & (marks != NOBODY)))
        return num_off_grid, rest

    def _settle(
        self,
        block: Float32[np.ndarray, "rows block"],
        owner: UInt8[np.ndarray, " block"],
        counts: Int64[np.ndarray, " tasks"],
    ) -> Int64[np.ndarray, " open"]:
        """Write winners, add up how many each task is sure of, and return the other elements' places."""
        values = active_magnitudes(block, self._source.active)
        check_scale(float(values.max()), self._source.scale)
        best = values[0] + self._most[0]
        second = np.full_like(best, -1)
        surest = values[0] + self._least[0]
        owner[:] = 0
        for task in range(1, len(values)):
            high = values[task] + self._most[task]
            np.maximum(owner, (high >= best).view(np.uint8) * np.uint8(task), out=owner)
            np.maximum(second, np.minimum(best, high), out=second)
            np.maximum(best, high, out=best)
            np.maximum(surest, values[task] + self._least[task], out=surest)
        open_ = np.flatnonzero(surest <= second)
        counts += np.array([np.count_nonzero(owner == task) for task in range(len(values))])
        counts -= np.bincount(owner[open_], minlength=len(values))
        return open_


class _CompiledContest(_Contest):
    """The same by compiled loops."""

    def settle(
        self, owner: UInt8[np.ndarray, " elements"], counts: Int64[np.ndarray, " owners"]
    ) -> tuple[int, _Rest]:
        active, rule_of = np.array(self._source.active), self._source.rule_of
        bonuses, grouping = np.stack((self._most, self._least)), self.grouping.for_loops()

        def settle(part: Iterator[tuple[int, RawChunk]]) -> tuple[np.ndarray, int, _Rest]:
            found, facts, left = np.zeros_like(counts), np.zeros(4, np.int64), _Rest(len(active))
            single, values = np.empty(0, np.int64), np.empty((0, len(active)), np.float32)
            opened, marks = single, np.empty(cache.BLOCK, np.uint8)
            lanes = len(active), cache.LANES
            near = np.zeros(lanes, np.float32), np.zeros(lanes), np.zeros(cache.LANES, np.int64)
            for start, chunk in part:
                if len(single) < chunk.num_elements:  # memory that is not written to costs nothing
                    single = np.empty(chunk.num_elements, np.int64)
                    opened = np.empty(chunk.num_elements + cache.SPARE, np.int64)
                    values = np.empty((chunk.num_elements, len(active)), np.float32)
                winners = owner[start : start + chunk.num_elements]
                looking: tuple[Any, ...] = (
                    active,
                    bonuses,
                    self._source.scale,
                    *grouping,
                    winners,
                    found,
                    facts,
                    single,
                    values,
                    marks,
                    opened,
                    *near,
                )
                if chunk.one_pass is not None and rule_of is not None:
                    tasks = np.empty(chunk.num_elements, np.uint8)  # which the loop fills
                    rule = rule_of(tasks)
                    number = chunk.one_pass.merge(cache.settle_and_merge, (*looking, tasks), rule)
                else:
                    bits = chunk.bits()
                    nothing = np.float32(0), np.empty(0, bits.rows.dtype), np.empty(0, np.uint8)
                    number = cache.settle(*bits, *looking, *nothing)
                chunk.check_bits(int(facts[1]))
                check_scale(float(np.int32(facts[1]).view(np.float32)), self._source.scale)
                left.add(single[:number] + start, values[:number])
            return found, int(facts[0]), left

        (found, num_off_grid, rest), *others = self._source.map(settle, is_early=rule_of is not None)
        counts += found
        for found, off_grid, left in others:
            counts += found
            num_off_grid += off_grid
            rest.extend(left)
        return num_off_grid, rest


#: Of the elements of a sample: distances and codes as `_Grouping._describe` has them, and the places of those
#: that several tasks have in reach.
_Description = tuple[Float64[np.ndarray, "tasks count"], Int64[np.ndarray, " count"], Int64[np.ndarray, " _"]]


class _Grouping:
    """Recognise open elements that are alike: the same tasks in reach, at the same distances.

    Exact ties are the common case in 16-bit checkpoints. What is frequent in the sample is a group, and
    its members need a mark instead of a place in the rest.
    """

    def __init__(self, box: Box, sample: Stock) -> None:
        self._prices, self._bottoms, self._tops = (
            prices[:, None] for prices in (box.prices, box.prices - box.down, box.prices + box.up)
        )
        describe = self._describe_compiled if sample.is_compiled else self._describe_sample
        distances, codes, shared = describe(sample)
        distinct, first, counts = np.unique(codes[shared], return_index=True, return_counts=True)
        frequent = (-counts).argsort(kind="stable")[:_MAX_GROUPS]
        frequent = np.sort(frequent[counts[frequent] >= _MIN_GROUP])
        self._codes = distinct[frequent]
        self._distances = distances[:, shared[first[frequent]]]

    def marks(self, values: Float64[np.ndarray, "tasks open"]) -> UInt8[np.ndarray, " open"]:
        """Return each element's group as a mark, or `NOBODY`."""
        if not len(self._codes):
            return np.full(values.shape[1], NOBODY, np.uint8)
        distances, codes = self._describe(values)
        group = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        alike = (self._distances.take(group, axis=1) == distances).all(axis=0)
        return np.where(alike, group + FIRST_MARK, NOBODY).astype(np.uint8)

    def for_loops(self) -> tuple[np.ndarray, ...]:
        """Return the box, and a table, codes and distances of the groups, as `loops.settle` takes them."""
        codes = self._codes
        slots = np.full(_SLOTS, -1, dtype=np.int64)
        for group, code in enumerate(codes.tolist()):
            slot = code % _SLOTS
            while slots[slot] >= 0:
                slot = (slot + 1) % _SLOTS
            slots[slot] = group
        return self._box, slots, codes, np.ascontiguousarray(self._distances.T)

    def groups(self, sizes: Int64[np.ndarray, " marks"]) -> Groups:
        """Return the groups with their sizes."""
        rows = np.where(self._distances < 0, -math.inf, self._prices - self._distances)
        return Groups(rows, sizes[: rows.shape[1]])

    @property
    def _box(self) -> Float64[np.ndarray, "3 tasks"]:
        return np.stack([prices[:, 0] for prices in (self._prices, self._bottoms, self._tops)])

    def _describe_sample(self, sample: Stock) -> _Description:
        distances, codes = self._describe(on_grid(sample.values, sample.scale))
        return distances, codes, np.flatnonzero(np.count_nonzero(distances >= 0, axis=0) > 1)

    def _describe_compiled(self, sample: Stock) -> _Description:
        distances, codes = np.empty(sample.values.shape), np.empty(sample.num_elements, np.int64)
        in_reach = np.empty(sample.num_elements, np.uint8)
        values = np.ascontiguousarray(sample.values)
        cache.describe(values, sample.scale, self._box, distances, codes, in_reach)
        return distances, codes, np.flatnonzero(in_reach > 1)

    def _describe(
        self, values: Float64[np.ndarray, "tasks count"]
    ) -> tuple[Float64[np.ndarray, "tasks count"], Int64[np.ndarray, " count"]]:
        """Return each task's distance below the best, −1 if out of reach, and a code of them."""
        in_reach = values - self._bottoms >= (values - self._tops).max(axis=0)
        reduced = values - self._prices
        distances = (reduced.max(axis=0) + 1 - reduced) * in_reach - 1
        codes = np.zeros(values.shape[1], np.int64)
        for row in distances.astype(np.int64):
            codes ^= row
            codes *= np.int64(0x9E3779B97F4A7C15 - 2**64)
            codes ^= (codes.view(np.uint64) >> np.uint64(29)).view(np.int64)
        return distances, codes
