"""Stacks of layers that fit: the stack that a recipe means, blocks that are there, and of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hub_magmax.checkpoints.config import levels, stated_config
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.stacked_layers import numbered_slices, stacks_of, whole_stacks
from hub_magmax.errors import KeyPath, MismatchError, RecipeError
from hub_magmax.planning.output_config.num_layers import is_numbers, is_per_layer
from hub_magmax.planning.statistics import may_lack
from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.lockfile import LockedSlice, LockedSource
from hub_magmax.recipe.matching import layers_of
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import listed, nearest, shown

#: Names and shapes of a block's tensors, without what a model's code makes anew.
Kind = frozenset[tuple[str, tuple[int, ...]]]

#: By source and stack, the kinds of its blocks, in order.
_Kinds = Mapping[str, Mapping[str, list[Kind]]]


def locked_layers(
    recipe: Recipe, locked: Mapping[str, LockedSource], sources: Mapping[str, TensorSource]
) -> tuple[LockedSlice, ...]:
    """Return a recipe's stack of layers with the stacks that it is about, once it fits the checkpoints.

    Args:
        recipe: Its `layers`.
        locked: The sources, for their ties.
        sources: The same, open, adapters as checkpoints.

    Raises:
        RecipeError: If it is not clear which stack is meant, or a source has fewer blocks.
        MismatchError: If a block has other tensors than the configuration of the output describes at its
            place, or blocks share tensors.
    """
    indexes = {name: source.index for name, source in sources.items()}
    found = tuple(
        replace(one, of=_stack_of(one, ("layers", place), indexes["base_model"]))
        for place, one in enumerate(layers_of(recipe))
    )
    for place, one in enumerate(found):
        _check_ranges(one, ("layers", place, "blocks"), indexes)
    _refuse_ties(found, locked)
    files_from = recipe.output.files_from
    kinds = {name: _kinds(index, {one.of or "" for one in found}) for name, index in indexes.items()}
    config = stated_config(sources[files_from])
    lists = {
        stack: any(_has_list(level, len(blocks)) for _, level in levels(config))
        for stack, blocks in kinds[files_from].items()
    }
    _check_kinds(found, kinds, files_from, lists)
    return found


def _has_list(level: Mapping[str, Any], num_blocks: int) -> bool:
    """Say whether a configuration has a list with an entry for each block, or of numbers of blocks."""
    return any(is_per_layer(key, value, num_blocks) or is_numbers(key, value) for key, value in level.items())


def _stack_of(one: LockedSlice, key: KeyPath, base: CheckpointIndex) -> str:
    """Return the stack of blocks that a slice is about."""
    stacks = whole_stacks(base.tensors)
    known = [f"of: {stack} ({count} blocks)" for stack, count in stacks.items()]
    if one.of in stacks:
        return one.of
    if one.of is not None or not stacks:
        _refuse_gap(one.of, key, base)
    if not stacks:
        raise RecipeError(
            f"no tensor of {base.label} has the number of a block in its name",
            key=key,
            expected="names such as model.layers.0.mlp.weight, counted from 0",
            hint="Leave layers out.",
        )
    if one.of is not None:
        raise RecipeError(
            f"{base.label} has no stack of blocks that is called {shown(one.of)}",
            key=(*key, "of"),
            hint=f"{nearest(one.of, [*stacks]) or 'Name one of its own'}: {listed(known, 8)}.",
        )
    if len(stacks) > 1:
        raise RecipeError(
            f"{base.label} has {len(stacks)} stacks of blocks",
            key=key,
            expected="in each slice the one that is meant",
            hint=f"Add {listed(known, 8)}. Stacks that no slice is about stay as they are.".replace(
                " and ", " or "
            ),
        )
    return next(iter(stacks))


def _refuse_gap(of: str | None, key: KeyPath, base: CheckpointIndex) -> None:
    """Raise RecipeError where the stack that is meant lacks a block."""
    for stack, text in _gaps(base):
        if of in (None, stack):
            expected = "blocks that are counted from 0"
            raise RecipeError(f"{base.label} {text}", key=key, expected=expected, hint="Leave layers out.")


def _gaps(index: CheckpointIndex) -> Iterator[tuple[str, str]]:
    """Yield stacks that are counted from 0 with a gap, each with what is lacking."""
    for stack, found in stacks_of(index.tensors).items():
        if 0 in found and (lacking := {*range(max(found))} - found):
            first = f"{stack}.{min(lacking)}".lstrip(".")
            yield stack, f"lacks {first} before its last block {max(found)}"


def _check_ranges(one: LockedSlice, key: KeyPath, indexes: Mapping[str, CheckpointIndex]) -> None:
    for source, (first, end) in one.blocks.items():
        stacks = whole_stacks(indexes[source].tensors)
        if (count := stacks.get(one.of or "", 0)) < end:
            raise RecipeError(
                _too_few(source, one.of or "", count, indexes[source]),
                key=key,
                expected=f"an end of at most {count}" if count else "",
                hint=f"[{first}, {end}] ends before block {end}.",
            )


def _too_few(source: str, of: str, count: int, index: CheckpointIndex) -> str:
    """Return how many blocks a source has of a stack, which it counts from 0 without a gap or not at all."""
    if count:
        return f"{source} has {count} blocks {of}.0 to {of}.{count - 1}"
    return (
        f"{source} {dict(_gaps(index)).get(of) or f'has no blocks that are called {of}.0, {of}.1 and so on'}"
    )


def _refuse_ties(layers: tuple[LockedSlice, ...], locked: Mapping[str, LockedSource]) -> None:
    stacks = {one.of for one in layers}
    for source in locked.values():
        for pair in (source.ties or {}).items():
            for name in pair:
                if (block := block_of(name)) is not None and block[0] in stacks:
                    raise MismatchError(
                        f"{shown(pair[0])} and {shown(pair[1])} are one parameter, and one of them is in a "
                        "block that would get another number",
                        where=source.label,
                        key=("layers",),
                        expected="blocks that share no tensors",
                        hint="Leave layers out: config.json could not say what is shared then.",
                    )


def _kinds(index: CheckpointIndex, stacks: set[str]) -> dict[str, list[Kind]]:
    found: dict[str, dict[int, set[tuple[str, tuple[int, ...]]]]] = {}
    for name, info in index.tensors.items():
        block = block_of(name)
        if block is not None and block[0] in stacks and not may_lack(info):
            found.setdefault(block[0], {}).setdefault(block[1], set()).add((block[2], info.shape))
    return {stack: [frozenset(found[stack][n]) for n in sorted(found[stack])] for stack in found}


def _check_kinds(
    layers: tuple[LockedSlice, ...], kinds: _Kinds, files_from: str, lists: Mapping[str, bool]
) -> None:
    """Raise where a block's tensors are not those that the configuration leads loaders to expect there.

    The configuration is that of `files_from`. Lists with an entry for each layer follow the stack, and then
    its blocks may be of any kind that the model has.
    """
    for stack, slices in numbered_slices(layers).items():
        expected = kinds[files_from].get(stack, [])
        known = {*expected}
        for start, source, own in _origins(slices):
            kind = kinds[source][stack][own]
            at_place = expected[min(start, len(expected) - 1)] if expected else kind
            if kind not in known or (not lists.get(stack) and kind != at_place):
                raise _other_kind((stack, start), (source, own), files_from, kind, at_place)


def _origins(slices: list[tuple[int, LockedSlice]]) -> Iterator[tuple[int, str, int]]:
    """Yield blocks of the output, each with a source and that one's block."""
    for start, one in slices:
        for source, (first, end) in one.blocks.items():
            yield from ((start + own - first, source, own) for own in range(first, end))


def _other_kind(
    place: tuple[str, int], origin: tuple[str, int], files_from: str, kind: Kind, expected: Kind
) -> MismatchError:
    own, theirs = dict(kind), dict(expected)
    rest = min(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
    facts = [f"of shape {list(shapes[rest])}" if rest in shapes else "missing" for shapes in (own, theirs)]
    return MismatchError(
        f"block {place[1]} of {place[0]} would be block {origin[1]} of {origin[0]}, in which {shown(rest)} "
        f"is {facts[0]}",
        key=("layers",),
        expected=f"{facts[1]}, as config.json of {files_from} describes a block at this place",
        hint="Stack blocks of one kind, or keep those of each kind at places where the model has that kind.",
    )
