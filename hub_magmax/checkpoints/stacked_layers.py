"""Stacks of layers: checkpoints whose blocks are numbered as those of the output.

A recipe's `layers` says which blocks of a source are which blocks of the output. Seen so, every source has
the output's blocks, or those of them that it counts in, and whatever follows sees one family. Of an
architecture nothing is known but the numbers in the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import Tensor, np
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.lockfile import LockedSlice, own_base_name

#: By stack, the number of its own block for each block of the output that a source counts in.
Blocks = Mapping[str, Mapping[int, int]]


def in_block(stack: str, number: int, rest: str) -> str:
    """Return the name of a tensor in a block."""
    return ".".join(part for part in (stack, str(number), rest) if part)


def own_blocks(layers: Sequence[LockedSlice], source: str) -> dict[str, dict[int, int]]:
    """Return the blocks of the output that a source counts in, with its own blocks for them, by stack."""
    found: dict[str, dict[int, int]] = {}
    for stack, numbered in numbered_slices(layers).items():
        own = found.setdefault(stack, {})
        for start, one in numbered:
            if source in one.blocks:
                first, end = one.blocks[source]
                own |= {start + number - first: number for number in range(first, end)}
    return found


def numbered_slices(layers: Sequence[LockedSlice]) -> dict[str, list[tuple[int, LockedSlice]]]:
    """Return the slices of each stack, each with the number of its first block in the output."""
    found: dict[str, list[tuple[int, LockedSlice]]] = {}
    for one in layers:
        assert one.of is not None, "the stack was found when the recipe was locked"
        slices = found.setdefault(one.of, [])
        slices.append((slices[-1][0] + slices[-1][1].num_blocks if slices else 0, one))
    return found


def with_stacked_layers(
    sources: Mapping[str, TensorSource], layers: Sequence[LockedSlice]
) -> dict[str, TensorSource]:
    """Return the sources with the blocks that a lock says; as they are where it says nothing of blocks.

    A task's own base model has the blocks of the task.
    """
    if not layers:
        return dict(sources)
    tasks = {own_base_name(name): name for name in sources}
    blocks = {name: own_blocks(layers, tasks.get(name, name)) for name in sources}
    found = {name: (source, blocks[name]) for name, source in sources.items()}
    return {
        name: source if _is_as_stored(source.index, blocks) else StackedSource(source, blocks)
        for name, (source, blocks) in found.items()
    }


def _is_as_stored(index: CheckpointIndex, blocks: Blocks) -> bool:
    """Say whether a checkpoint has the output's blocks already, so that its order is kept, too."""
    stacks = stacks_of(index.tensors)
    return all(own == {number: number for number in stacks.get(stack, ())} for stack, own in blocks.items())


def stacks_of(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers of the blocks of each stack."""
    found: dict[str, set[int]] = {}
    for name in names:
        if (block := block_of(name)) is not None:
            found.setdefault(block[0], set()).add(block[1])
    return found


def whole_stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each stack that is counted from 0 without a gap."""
    return {stack: len(found) for stack, found in stacks_of(names).items() if found == {*range(len(found))}}


class StackedSource(DerivedSource):
    """A checkpoint with its blocks numbered as the output's, each as often as it occurs; a `TensorSource`.

    Tensors of no stacked block come first, in the order of the files; then the blocks in the output's order.

    Args:
        source: The checkpoint.
        blocks: Its own block for each of the output's that it has.
    """

    def __init__(self, source: TensorSource, blocks: Blocks) -> None:
        super().__init__(source)
        self._own = dict(_names(source.index.tensors, blocks))

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        found = {name: replace(index.tensors[own], name=name) for name, own in self._own.items()}
        return replace(index, tensors=found)

    def stored_name(self, name: str) -> str:
        return self.source.stored_name(self._own[name])

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        return self.source.stored(self._own[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat, in its stored dtype."""
        return self.source.read(self._own[name], start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        return self.source.read_stored(self._own[name], start, stop, out)

    def tensor_file(self, name: str) -> TensorFile | None:
        return self.source.tensor_file(self._own[name])

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        self.source.expect([self._own[name] for name in names], budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        self.source.release(self._own[name], stop)


def _names(tensors: Mapping[str, TensorInfo], blocks: Blocks) -> Iterator[tuple[str, str]]:
    """Yield names of the output's tensors, with the source's own."""
    stacked: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for name in tensors:
        block = block_of(name)
        if block is None or block[0] not in blocks:
            yield name, name
        else:
            stacked.setdefault(block[:2], []).append((block[2], name))
    for stack, numbers in blocks.items():
        for number, own in sorted(numbers.items()):
            for rest, name in stacked.get((stack, own), ()):
                yield in_block(stack, number, rest), name
