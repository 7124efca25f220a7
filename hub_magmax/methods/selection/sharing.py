"""Shares of elements that are worth the same to several tasks, the last step of `top_n`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.structures import FIRST_MARK
from hub_magmax.methods.chunks import BLOCK_ELEMENTS, Chunks
from hub_magmax.methods.draws import SHARE
from hub_magmax.methods.selection.owners import Draws, rename
from hub_magmax.methods.selection.prices import Market, Prices, split, tied_masks

# Elements that are fewer than one in this many get their keys one by one; of more, all do, and it is faster.
_FEW_OF = 128

#: Tasks, and how many elements each is given.
_Takers = Sequence[tuple[int, int]]


# Single elements, classes of one task, and small and large classes of several each have a way of their own.
def share_out(
    owner: UInt8[np.ndarray, " elements"],
    places: Int64[np.ndarray, " single"],
    market: Market,
    prices: Prices,
    chunks: Chunks,
    generator: CounterGenerator,
) -> None:
    """Give elements that tie to tasks that attain their maximum, so that the quotas are met.

    Args:
        owner: Changed; classes have marks there, in order.
        places: Of the elements that are the first columns of `market`; its other columns are classes.
        market: All that tie.
        prices: At which the quotas can be met.
        chunks: The tensor's.
        generator: Decides which elements of a class go to which task.
    """
    masks = tied_masks(market.values - prices[:, None])
    distinct, inverse = np.unique(masks, return_inverse=True)
    counts = np.bincount(inverse, market.sizes, len(distinct)).astype(np.int64)
    shares, crowded = split(distinct, counts, market.quotas)
    assert crowded is None
    inverse, of_class = inverse[: len(places)], inverse[len(places) :]
    names, drawn, few = np.arange(256, dtype=np.uint8), list[_Takers](), list[_Takers]()
    for row, share in enumerate(shares):
        members, marks = places[inverse == row], FIRST_MARK + np.flatnonzero(of_class == row)
        takers = [(int(task), int(share[task])) for task in np.flatnonzero(share)]
        if not takers:
            continue
        if len(takers) == 1:
            names[marks] = owner[members] = takers[0][0]
        elif not len(marks):
            _share(owner, members, takers, generator)
        else:
            is_few = _FEW_OF * counts[row] < len(owner)
            names[marks] = 255 - len(few) if is_few else FIRST_MARK + len(drawn)
            owner[members] = marks[0]
            (few if is_few else drawn).append(takers)
    rename(owner, names, chunks.backend)
    _share_few(owner, few, generator)
    names = np.arange(256, dtype=np.uint8)
    draws = Draws(owner, owner, generator, chunks.backend, chunks.num_threads)
    for mark, several in enumerate(drawn, FIRST_MARK):
        left, names[mark] = sum(count for _, count in several), several[0][0]
        for task, count in several[1:]:
            draws.give(mark, count, left, stream=SHARE + task, mask=0, mark=task)
            left -= count
    rename(owner, names, chunks.backend)


def _share(
    owner: UInt8[np.ndarray, " elements"],
    members: Int64[np.ndarray, " some"],
    takers: _Takers,
    generator: CounterGenerator,
) -> None:
    """Give some elements to tasks, so many to each: those of smallest keys, as `Draws` does."""
    for task, count in takers[1:]:
        order = generator.keys(members, SHARE + task).argpartition(count - 1)
        owner[members[order[:count]]] = task
        members = members[order[count:]]
    owner[members] = takers[0][0]


def _share_few(
    owner: UInt8[np.ndarray, " elements"], few: Sequence[_Takers], generator: CounterGenerator
) -> None:
    """Share out classes of few elements, marked from 255 downwards."""
    least, starts = 256 - len(few), range(0, len(owner), BLOCK_ELEMENTS)
    if few:
        found = [np.flatnonzero(owner[n : n + BLOCK_ELEMENTS] >= least) + n for n in starts]
        places = np.concatenate(found)
        marks = owner[places]
        for number, takers in enumerate(few):
            _share(owner, places[marks == 255 - number], takers, generator)
