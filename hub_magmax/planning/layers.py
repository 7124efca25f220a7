"""Stacks of layers in a plan: the order of their tensors, and where their blocks come from, for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from hub_magmax.checkpoints.stacked_layers import numbered_slices
from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.lockfile import Lock, LockedSlice
from hub_magmax.text import listed

#: Why a tensor of a stack is not merged.
LAYERS_REASON = "stack of layers"


def in_order_of_blocks(base: Iterable[str], added: Collection[str], lock: Lock) -> list[str]:
    """Return the base model's tensors and added ones, with the blocks in order if both have some."""
    stacks, names = {one.of for one in lock.layers}, [*base, *added]

    def place(name: str) -> int:
        block = block_of(name)
        return block[1] if block is not None and block[0] in stacks else -1

    return sorted(names, key=place) if any(place(name) >= 0 for name in added) else names


def shifted_blocks(lock: Lock) -> frozenset[tuple[str, int]]:
    """Return the output's blocks that sources have at different places, by stack and number."""
    return frozenset(
        (stack, start + number)
        for stack, slices in numbered_slices(lock.layers).items()
        for start, one in slices
        for number in range(one.num_blocks if len({*one.blocks.values()}) > 1 else 0)
    )


def described_layers(lock: Lock) -> list[dict[str, Any]]:
    """Return the stack of layers for programs: of each slice its blocks in the output and in the sources."""
    return [
        {
            "stack": stack,
            "blocks": [start, start + one.num_blocks],
            "take": one.take,
            "of": {source: list(own) for source, own in one.blocks.items()},
        }
        for stack, slices in numbered_slices(lock.layers).items()
        for start, one in slices
    ]


def layer_rows(lock: Lock) -> Iterator[str]:
    """Yield a line for each slice of a stack of layers."""
    for stack, slices in numbered_slices(lock.layers).items():
        for start, one in slices:
            yield f"{stack} {_numbers(start, start + one.num_blocks)}: {_origin(one)}"


def _origin(one: LockedSlice) -> str:
    if one.take is not None:
        return f"{_numbers(*one.blocks[one.take])} of {one.take}"
    if len({*one.blocks.values()}) == 1:
        return f"merged, {_numbers(*next(iter(one.blocks.values())))} of every source"
    return f"merged, {listed([f'{_numbers(*own)} of {name}' for name, own in one.blocks.items()])}"


def _numbers(first: int, end: int) -> str:
    return f"block {first}" if end == first + 1 else f"blocks {first} to {end - 1}"


def layer_notices(lock: Lock) -> Iterator[str]:
    """Yield what a stack of layers is, where there is one."""
    if lock.layers:
        yield (
            "a stack of layers is no average of equals: where its slices meet, a block was not trained "
            "behind the one that stands before it"
        )
