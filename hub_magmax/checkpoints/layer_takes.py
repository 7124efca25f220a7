"""Tensors that a stack of layers copies from one source, with those around its blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.names.matching import common_parts
from hub_magmax.checkpoints.stacked_layers import numbered_slices, whole_stacks
from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.lockfile import Lock, LockedSlice

#: Names of what a model computes before its first block.
_BEFORE = re.compile(
    r"(.*\.)?(\w*embed(?!_?out)\w*|wte|wpe|shared|(cls|class|mask|distillation|register)_tokens?|patch\w*|pos_?\w*|"
    r"positional_\w+|position\w*|token_type\w*|pre_?layr?norm\w*|stem|conv\d?|feature_\w+|masked_spec\w*)(\..*)?"
)


def taken_by_layers(lock: Lock, indexes: Mapping[str, CheckpointIndex]) -> dict[str, str]:
    """Return the source of every tensor that a lock's stack of layers copies, or `nothing`, by name.

    What is in no block goes with the first slice where it stands before the blocks, as embeddings do by their
    names, and else with the last one; if that one's source lacks it, the base model's is taken. Of several
    stacks each has what is nearest to it by name, and what is as near to two goes with none.

    Args:
        lock: Its layers.
        indexes: Of the sources, with the output's blocks.
    """
    if not lock.layers:
        return {}
    slices = numbered_slices(lock.layers)
    stacks = {*slices, *whole_stacks(indexes["base_model"].tensors)}
    names = dict.fromkeys(name for index in indexes.values() for name in index.tensors)
    takes = {name: _take_of(name, slices, stacks) for name in names}
    return {name: _there(name, take, indexes) for name, take in takes.items() if take is not None}


_Slices = Mapping[str, list[tuple[int, LockedSlice]]]


def _take_of(name: str, slices: _Slices, stacks: Collection[str]) -> str | None:
    """Return the source that a tensor is copied from, None where it is merged."""
    block = block_of(name)
    if block is None or block[0] not in stacks:
        stack = _nearest(name, stacks)
        return _beside(name, slices[stack]).take if stack is not None and stack in slices else None
    return _slice_at(slices[block[0]], block[1]).take if block[0] in slices else None


def _there(name: str, take: str, indexes: Mapping[str, CheckpointIndex]) -> str:
    """Return the source of a tensor, or in its place the base model, or `nothing`, where it lacks it."""
    having = [source for source in (take, "base_model") if name in indexes[source].tensors]
    return having[0] if having else "nothing"


def _slice_at(slices: list[tuple[int, LockedSlice]], number: int) -> LockedSlice:
    return next(one for start, one in reversed(slices) if start <= number)


def _beside(name: str, slices: list[tuple[int, LockedSlice]]) -> LockedSlice:
    """Return the slice that a tensor outside of the blocks goes with."""
    return slices[0 if _BEFORE.fullmatch(name) else -1][1]


def _nearest(name: str, stacks: Iterable[str]) -> str | None:
    """Return the stack whose name has the most leading parts in common with a tensor's; None of several."""
    common = {stack: common_parts(name, stack) for stack in stacks}
    most = max(common.values())
    found = [stack for stack, count in common.items() if count == most]
    return found[0] if len(found) == 1 else None
