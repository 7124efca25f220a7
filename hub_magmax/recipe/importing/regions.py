"""Regions of an output: tensors that are merged from the same models under the same parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.importing.configuration import Configuration, Input, Slice
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.model_facts import ModelFacts

#: Facts about the models of a configuration, by spelling.
Known = Mapping[str, ModelFacts]

#: From the first block to before the last.
Blocks = tuple[int, int]

#: Names of what a model computes before its first block.
_BEFORE = re.compile(r"(.*\.)?(\w*embed(?!_?out)\w*|wte|wpe|shared|pos_\w+|position\w*|token_type\w*)(\..*)?")


@dataclass(frozen=True)
class Region:
    """Tensors of the output that come from one slice.

    Attributes:
        part: The slice, with the models that count here.
        blocks: Of the output; None for all of the model, or for what stands outside of its blocks.
        names: Of its tensors in the output, each with its name in every model of the slice; empty where they
            are not known.
        is_outside: Whether it is what stands before the blocks, or after them.
    """

    part: Slice
    blocks: Blocks | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_outside: bool = False

    @property
    def is_inside(self) -> bool:
        """Whether it is a slice of blocks."""
        return self.blocks is not None and not self.is_outside


@dataclass(frozen=True)
class Layout:
    """Where the tensors of an output come from.

    Attributes:
        regions: In order; one for a list of models.
        is_stacked: Whether blocks of the output have other numbers, or another count, than those of a model.
    """

    regions: tuple[Region, ...]
    is_stacked: bool = False


def layout_of(configuration: Configuration, known: Known, notes: Notes) -> Layout:
    """Return the regions of a configuration, and note what its ranges of blocks are."""
    slices = configuration.slices
    counts = {name: facts.num_blocks for name, facts in known.items()}
    if len(slices) == 1 and all(_is_whole(one, counts) for one in slices[0].inputs):
        for one in slices[0].inputs:
            _note_blocks(one, notes, f"all {_end(one)} blocks, as if the model was named alone")
        return Layout((_whole(slices[0], known),))
    starts = [0, *accumulate(map(_length, slices))]
    regions = [
        Region(part, (start, end), _in_blocks(part, start, known))
        for part, start, end in zip(slices, starts, starts[1:], strict=False)
    ]
    for region in regions:
        for one in region.part.inputs:
            _note_blocks(one, notes, _told(region.blocks or (0, 0)))
    before = _outside(slices[0], known, is_before=True)
    after = _outside(_last(slices, notes), known, is_before=False)
    return Layout((before, *regions, after), not _is_aligned(slices, starts, counts))


def _last(slices: Sequence[Slice], notes: Notes) -> Slice:
    """Return the last slice with as many models as the first one has: so many take part after the blocks."""
    *_, last = slices
    count = len(slices[0].inputs)
    for one in last.inputs[count:]:
        why = "mergekit takes as many models for final norm and head as the first slice has"
        notes.add(one.at, "warning", why)
    return replace(last, inputs=last.inputs[:count])


def _whole(part: Slice, known: Known) -> Region:
    names = {name: (name,) * len(part.inputs) for name in _names(part.inputs, known)}
    return Region(part, None, names)


def _names(inputs: Sequence[Input], known: Known) -> tuple[str, ...]:
    """Return the names of the first model whose are known."""
    found = (known[name].names for one in inputs if (name := one.reference.written) in known)
    return next(found, ())


def _in_blocks(part: Slice, start: int, known: Known) -> dict[str, tuple[str, ...]]:
    """Return the names of a slice's blocks in the output, each with its name in every model."""
    found = {}
    for name in _names(part.inputs, known):
        block = block_of(name)
        first = next(one.blocks for one in part.inputs if one.reference.written in known)
        if block is None or first is None or not first[0] <= block[1] < first[1]:
            continue
        step = block[1] - first[0]
        own = (renumbered(name, (one.blocks or (0, 0))[0] + step) for one in part.inputs)
        found[renumbered(name, start + step)] = tuple(own)
    return found


def _outside(part: Slice, known: Known, *, is_before: bool) -> Region:
    names = (name for name in _names(part.inputs, known) if block_of(name) is None)
    kept = {n: (n,) * len(part.inputs) for n in names if bool(_BEFORE.fullmatch(n)) is is_before}
    return Region(part, None, kept, is_outside=True)


def renumbered(name: str, number: int) -> str:
    """Return the name of the same tensor in another block."""
    block = block_of(name)
    assert block is not None
    stack, _, rest = block
    return ".".join(part for part in (stack, str(number), rest) if part)


def _length(part: Slice) -> int:
    first, end = part.inputs[0].blocks or (0, 0)
    return end - first


def _end(one: Input) -> int:
    return one.blocks[1] if one.blocks else 0


def _is_whole(one: Input, counts: Mapping[str, int | None]) -> bool:
    return one.blocks is None or one.blocks == (0, counts.get(one.reference.written))


def _is_aligned(slices: Sequence[Slice], starts: Sequence[int], counts: Mapping[str, int | None]) -> bool:
    """Say whether every block keeps its number, and none is left out."""
    every = chain.from_iterable(part.inputs for part in slices)
    return {counts.get(one.reference.written) for one in every} == {starts[-1]} and all(
        one.blocks == (start, start + _length(part))
        for part, start in zip(slices, starts, strict=False)
        for one in part.inputs
    )


def _note_blocks(one: Input, notes: Notes, why: str) -> None:
    if one.blocks_at is not None:
        notes.add(one.blocks_at, "exact", why)


def _told(blocks: Blocks) -> str:
    first, end = blocks
    return f"{f'block {first}' if end == first + 1 else f'blocks {first} to {end - 1}'} of the output"
