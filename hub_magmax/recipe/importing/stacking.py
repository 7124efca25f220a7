"""Stacks of blocks of an imported configuration, as a recipe's `layers` says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hub_magmax.recipe.importing.cases import Case
from hub_magmax.recipe.importing.configuration import Input
from hub_magmax.recipe.importing.counterparts import Counterpart
from hub_magmax.recipe.importing.emission import Merged
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.regions import Blocks, Known, Layout, Region

#: What recipes call the base model.
_BASE = "base_model"


def check_stack(layout: Layout, known: Known, notes: Notes) -> None:
    """Note ranges of blocks that a model does not have, and those of a slice that hold unequally many."""
    for region in layout.regions:
        for one in region.part.inputs if region.is_inside else ():
            facts = known.get(one.reference.written)
            why = _wrong(one, region.blocks, facts.num_blocks if facts else None)
            if why and one.blocks_at is not None:
                notes.lose(one.blocks_at, why)


def _wrong(one: Input, blocks: Blocks | None, count: int | None) -> str:
    """Return why a source has no such blocks; empty where it has."""
    if one.blocks is None or blocks is None:
        return ""
    if count is not None and one.blocks[1] > count:
        return f"the model has {count} blocks"
    return (
        ""
        if _length(one.blocks) == _length(blocks)
        else "other sources of the slice have more blocks, or fewer"
    )


def _length(blocks: Blocks) -> int:
    return blocks[1] - blocks[0]


def layers_of(
    layout: Layout, merged: Sequence[Merged], family: Family, notes: Notes
) -> list[dict[str, Any]] | None:
    """Return a recipe's `layers`; None where the blocks are those of a model, or, noted, cannot be said."""
    parts = [(region, _takes(cases)) for region, cases in merged if region.is_inside]
    if not layout.is_stacked and not _are_copied([takes for _, takes in parts]):
        return None
    layers = [_layer(region, takes, family, notes) for region, takes in parts]
    return None if None in layers else [layer for layer in layers if layer is not None]


def _are_copied(parts: Sequence[set[str | None]]) -> bool:
    """Say whether several slices are copied, none of them merged."""
    return len(parts) > 1 and not any(None in takes for takes in parts)


def _takes(cases: Sequence[tuple[Case, Counterpart]]) -> set[str | None]:
    """Return where the tensors of a region are copied from; None is for those that are merged."""
    return {found.take for _, found in cases}


def _layer(region: Region, takes: set[str | None], family: Family, notes: Notes) -> dict[str, Any] | None:
    """Return one slice: copied from one source, or merged."""
    if len(takes) == 1 and None not in takes:
        return {"take": next(iter(takes)), "blocks": [*(region.part.inputs[0].blocks or ())]}
    found = _merged_blocks(region, family, notes)
    return None if found is None else {"blocks": found}


def _merged_blocks(region: Region, family: Family, notes: Notes) -> Any:
    """Return the range of every source of a slice that is merged, or the one that all have."""
    own: dict[str, Blocks] = {}
    for one in region.part.inputs:
        for name in _sources_of(one, family):
            blocks = one.blocks or (0, 0)
            if own.setdefault(name, blocks) != blocks:
                notes.lose(one.blocks_at or one.at, f"blocks {[*blocks]} and {[*own[name]]} of {name}")
                return None
    # Sources that do not take part count nothing there, whichever of their blocks these are.
    spare = (0, _length(region.blocks or (0, 0)))
    every = {name: own.get(name, spare) for name in (_BASE, *family.tasks)}
    same = {*every.values()}
    return [*same.pop()] if len(same) == 1 else {name: [*blocks] for name, blocks in every.items()}


def _sources_of(one: Input, family: Family) -> tuple[str, ...]:
    """Return the sources that a model is made of: an adapter stands on the base model's blocks."""
    tasks = family.parts[one.reference]
    is_base = one.reference.model.plain == family.base.plain
    return (*tasks, _BASE) if is_base or one.reference.lora is not None else tasks


def without_tasks(family: Family, layers: Sequence[Mapping[str, Any]] | None) -> bool:
    """Say whether a recipe needs no tasks: one model alone is made deeper."""
    return not family.tasks and layers is not None
