"""The selection that keeps the most magnitude, of all that meet the quotas.

The tasks compete for elements in a market. Each task has a price, and an element goes to the task whose
magnitude exceeds its price the most. Sought are the prices at which every task gets its quota. A small
market is solved in memory (`clearing`, `ledger`); a large one in these steps:

1. Sample: solve a market of a few thousand elements or more, drawn evenly from all, in the same way.
2. Box: its prices are nearly right for all elements. How far off they can be follows from how counts
   vary between samples, and gives a range for each price; together the ranges are a box (`estimate`).
3. Settle: in one pass over all elements, an element that has the same winner at all prices in the box
   goes to that task (`settlement`).
4. Rest: the other elements, a few per cent, are a market of their own, with what is left of the quotas.
   Solve it in the same way. Elements that tie exactly are many in 16-bit checkpoints; those alike are
   counted as a group, and its members shared out at random in the end.
5. Repair: if a price of the rest lies outside the box, and an element would now be better with another
   task, the sample misled. Repeat from step 2 with a wider box around the prices of the rest. The same
   goes for a rest that cannot be solved, because a task was given more than its quota.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hub_magmax.kernels.chunk import memory_of
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import ArrayChunks, Chunks, Selection, blocks, check_task_count
from hub_magmax.methods.selection.exact.elements import (
    DIRECT_ELEMENTS,
    OffScaleError,
    RuleOf,
    Source,
    Stream,
    active_magnitudes,
    on_grid,
    sample_size,
    survey,
)
from hub_magmax.methods.selection.exact.in_memory import solve_directly
from hub_magmax.methods.selection.exact.market import Allocation, Groups, Market, in_memory
from hub_magmax.methods.selection.exact.price_bounds import Box, bound, sample_market
from hub_magmax.methods.selection.exact.settlement import Split, settle
from hub_magmax.methods.selection.owners import FIRST_MARK, MAX_TASKS, PICKED, Draws, Owners
from hub_magmax.methods.selection.streams import SHARE

# Tensors of up to this many numbers (tasks times elements) are read once and held.
_HELD_NUMBERS = 1 << 20
# Standard deviations of a sample's counts by which its prices may at first be wrong.
_DEVIATIONS = 3.0
_MAX_ATTEMPTS = 4
# A sample of what is left must be so much denser to be taken: 1.2 to 2 do, 2.5 takes three times as long.
_DENSER = 1.7
# Of more than this, it is taken if anything was settled: solving directly needs memory.
_MOST_DIRECTLY = 1 << 17
# Sums run side by side, as in the registers of a processor.
_LANES = 8


def top_n(
    chunks: Chunks, quotas: Sequence[int], generator: CounterGenerator, *, rule_of: RuleOf | None = None
) -> Selection:
    """Select so that the kept magnitude is the largest that the quotas allow.

    Every task has a price, and an element goes to the task whose magnitude exceeds its price the most:
    winner = argmax_t |τ_t| − p_t. Prices under which the counts equal the quotas are optimal: they
    solve the dual of a transportation problem. With equal prices this is MAGMAX. Elements that are
    worth the same to several tasks are shared out between these at random.

    Magnitudes are compared at a resolution of 2**-42 of the tensor's largest or finer, and at that
    resolution the result is optimal unless samples misled every attempt. `duality_gap` is measured
    afterwards on all elements and says what holds. Task vectors that are multiples of each other make it
    slow: then every price depends on every other.

    Args:
        chunks: Read once, and a sample of them before if they are not small; twice more if the sample
            misleads; once more if it is not certain that the duality gap is zero. Besides a byte per element,
            some per cent of the elements are kept in memory.
        quotas: Elements per task, as `quotas` returns them. A task without a quota never wins.
        generator: Draws the samples and decides between equals.
        rule_of: Turns winners of a chunk (uint8) into the rule that takes each element from its winner, for
            those that may be merged while they are looked at.

    Returns:
        The selection; its counts equal `quotas`.

    Raises:
        RecipeError: If more than 64 tasks have a quota.

    Source: ours.
    """
    assert len(quotas) == chunks.num_tasks and sum(quotas) == chunks.num_elements
    active = tuple(task for task, quota in enumerate(quotas) if quota)
    check_task_count(len(active), limit=MAX_TASKS)
    if len(active) <= 1:
        return _describe(
            quotas, active, (0.0,) * len(active), Owners(chunks.num_elements, chunks.scratch), 0.0
        )
    chunks = _hold(chunks)
    source = survey(chunks, active, generator, rule_of)
    wanted = np.array([quotas[task] for task in active], dtype=np.int64)
    market = Market(source, Groups.none(len(active)), wanted, np.zeros(len(active)))
    try:
        allocation = _solve(market)
    except OffScaleError:
        assert isinstance(source, Stream)
        source = source.rescaled()
        allocation = _solve(replace(market, source=source))
    assert allocation is not None
    prices = tuple((allocation.prices - allocation.prices.min()).tolist())
    unscaled = tuple(price / source.scale for price in prices)
    gap = 0.0 if allocation.has_no_regret else _duality_gap(chunks, active, allocation.owners, unscaled)
    return _describe(quotas, active, unscaled, allocation.owners, gap)


def _hold(chunks: Chunks) -> Chunks:
    """Read a small tensor into memory."""
    if isinstance(chunks, ArrayChunks) or chunks.num_tasks * chunks.num_elements > _HELD_NUMBERS:
        return chunks
    size = chunks.num_elements
    return ArrayChunks(chunks.runs(size, size), is_compiled=chunks.is_compiled)


def _describe(
    quotas: Sequence[int],
    active: tuple[int, ...],
    prices: tuple[float, ...],
    owners: Owners,
    gap: float,
) -> Selection:
    """Turn a solution among the active tasks into one among all tasks."""
    price_of = dict(zip(active, prices, strict=True))
    owners.rename(np.array(active or (0,), dtype=np.uint8))
    return Selection(
        owner=owners.owner,
        counts=tuple(quotas),
        num_unaligned=(0,) * len(quotas),
        duality_gap=gap,
        prices=tuple(price_of.get(task, math.inf) for task in range(len(quotas))),
    )


def _duality_gap(chunks: Chunks, active: tuple[int, ...], owners: Owners, prices: tuple[float, ...]) -> float:
    """Return how much the kept magnitude could at most grow, as a fraction of it, by a look at all elements.

    With counts equal to quotas, dual minus primal value is the sum over elements of what the winner
    falls short of the best task, both net of prices; so nothing cancels.
    """
    regrets: list[float] = []
    kept: list[float] = []
    price = np.array(prices)
    for start, block in blocks(chunks):
        owner = owners.owner[start : start + block.shape[1]]
        sums = _weigh(block, active, price, owner, is_compiled=chunks.is_compiled)
        regrets += sums[0].tolist()
        kept += sums[1].tolist()
    regret, total = math.fsum(regrets), math.fsum(kept)
    return regret / total if total else (math.inf if regret else 0.0)


def _weigh(
    block: Float32[np.ndarray, "tasks block"],
    active: tuple[int, ...],
    prices: Float64[np.ndarray, " active"],
    owner: UInt8[np.ndarray, " block"],
    *,
    is_compiled: bool,
) -> Float64[np.ndarray, "2 lanes"]:
    """Return the sums of each eighth element's regret and value: an order that compiled loops can keep to."""
    if is_compiled:
        found, scratch = np.zeros((2, _LANES)), np.empty((2, cache.BLOCK))
        cache.weigh(*memory_of(block), np.array(active), prices, owner, found[0], found[1], scratch)
        return found
    values = active_magnitudes(block, active).astype(np.float64)
    count = values.shape[1]
    chosen = values.ravel().take(owner.astype(np.int64) * count + np.arange(count))
    net = values - prices[:, None]
    both = np.zeros((2, -(-count // _LANES) * _LANES))
    both[:, :count] = net.max(axis=0) - (chosen - prices.take(owner)), chosen
    sums: np.ndarray = both.reshape(2, -1, _LANES).sum(axis=1)
    return sums


def _solve(market: Market) -> Allocation | None:
    """Allocate a market to the exact quotas, at the best total; None if groups make that impossible."""
    if market.source.num_elements <= DIRECT_ELEMENTS:
        return solve_directly(market)
    sample = sample_market(market)
    estimate = _solve(sample)
    prices = market.guess if estimate is None else estimate.prices
    allocation = None
    for attempt in range(_MAX_ATTEMPTS):
        box = bound(sample, prices, _DEVIATIONS * 4**attempt)
        split = settle(market, box, in_memory(sample))
        rest = _solve_rest(split, market, sample)
        if rest is not None:
            allocation = _merge(market, split, rest)
            if box.contains(rest.prices):
                is_whole = isinstance(market.source, Stream)
                return replace(allocation, has_no_regret=is_whole and _has_no_regret(split, rest))
            if _is_best(market.source, allocation):
                return allocation
            prices = rest.prices
    if allocation is None:
        # No box was right: settle nothing, and solve all of it in memory.
        everywhere = np.full_like(prices, np.inf)
        split = settle(market, Box(prices, everywhere, everywhere), in_memory(sample))
        rest = solve_directly(split.rest)
        allocation = rest and _merge(market, split, rest)
    return allocation


def _solve_rest(split: Split, market: Market, sample: Market) -> Allocation | None:
    """Solve the market of the rest; None if a task got more than its quota when elements were settled."""
    size, whole, quotas = split.rest.source.num_elements, market.source.num_elements, split.rest.quotas
    if quotas.min() < 0:
        return None
    # All that is left is near a tie: a sample of it settles some only if it is denser than the one before.
    is_denser = sample_size(size, len(quotas)) * whole > _DENSER * sample.source.num_elements * size
    has_shrunk = size <= (3 * whole // 4 if size > _MOST_DIRECTLY else 0)
    return _solve(split.rest) if is_denser or has_shrunk else solve_directly(split.rest)


def _has_no_regret(split: Split, rest: Allocation) -> bool:
    """Say whether it is certain that no element is better with another task than with its own.

    This takes the place of a look at all elements. Prices p are those of the rest and lie in the box, up to
    a number added to all. Then:

    1. A settled element has none to regret. `settle` found |τ_w| + least_w > |τ_t| + most_t for its winner w
       and every other task t, where `least` and `most` are a number c less the top or the bottom of a price's
       range. They were rounded outwards, and sums to float32, which keeps their order. So
       |τ_w| + c − p_w > |τ_t| + c − p_t, and rounding both to float64 cannot turn them round.
    2. The elements of the rest are in memory, as they are in the tensor, and are looked at one by one.
    3. Members of a group are looked at once for each task that gets some. They have the distances of the
       group's example, number by number, if no magnitude of theirs had to be rounded to the grid. A task out
       of reach is worse than another one everywhere in the box.

    Sums and differences of numbers on the grid are exact in float64, and a scale is a power of two.
    """
    if not split.is_exact:
        return False
    net = (split.rest.groups.rows - rest.prices[:, None]).T
    if (net.max(axis=1, keepdims=True) > net)[rest.shares > 0].any():
        return False
    source = split.rest.source
    prices = (rest.prices - rest.prices.min()) / source.scale
    for start, block in source.blocks():
        owner = rest.owners.owner[start : start + block.shape[1]]
        regrets, _ = _weigh(block, source.active, prices, owner, is_compiled=source.is_compiled)
        if regrets.any():
            return False
    return True


def _merge(market: Market, split: Split, rest: Allocation) -> Allocation:
    """Fill in the winners of the rest, and share each group's members out at random."""
    owners, give = split.owners, _giver(market.source, split.owners)
    num_outer = len(market.groups.sizes)
    owners.owner[split.positions] = rest.owners.owner
    names = np.arange(256, dtype=np.uint8)
    for mark, shares in enumerate(rest.shares[num_outer:].tolist(), start=FIRST_MARK):
        remaining = sum(shares)
        takers = [task for task, share in enumerate(shares) if share]
        for task in takers[1:]:
            give(mark, shares[task], remaining, task)
            remaining -= shares[task]
        names[mark] = takers[0] if takers else mark
    if market.source.is_compiled:
        cache.rename(owners.owner, names)
    else:
        owners.rename(names)
    return Allocation(owners, rest.shares[:num_outer], rest.prices)


def _giver(source: Source, owners: Owners) -> Callable[[int, int, int, int], object]:
    """Return what gives a task some of the elements with a mark, at random: mark, how many of all, task."""
    if isinstance(source, Stream):
        draws = Draws(
            owners,
            owners.owner,
            source.generator,
            is_compiled=source.is_compiled,
            num_threads=source.chunks.num_threads,
        )
        return lambda mark, count, total, task: draws.give(
            mark, count, total, stream=SHARE + task, mask=0, mark=task
        )

    def give(mark: int, count: int, total: int, task: int) -> None:
        owners.pick(mark, count, total, lambda at: source.generator.keys(source.places[at], SHARE + task))
        owners.replace(PICKED, task)

    return give


def _is_best(source: Source, allocation: Allocation) -> bool:
    """Say whether every element is with a task that is best for it at the allocation's prices."""
    prices = allocation.prices[:, None]
    for start, block in source.blocks():
        values = active_magnitudes(block, source.active)
        owner = allocation.owners.owner[start : start + values.shape[1]].astype(np.int64)
        reduced = on_grid(values, source.scale) - prices
        if (reduced.max(axis=0) > np.take_along_axis(reduced, owner[None], axis=0)[0]).any():
            return False
    return True
