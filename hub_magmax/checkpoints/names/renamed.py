"""Checkpoints under the base model's names: tensors renamed, taken out of a joint one, or joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.names.joined_tensors import Joining, Place, joining_of, part_of, whole_of
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.renaming import LockedJoint, Renaming, collapsed, filled

#: A tensor of a pattern, and the numbers in its name.
_Instance = tuple[TensorInfo, tuple[str, ...]]


def places(renaming: Renaming, own: CheckpointIndex, base: CheckpointIndex) -> dict[str, Place]:
    """Return where a source has tensors that the base model calls by another name, by the base's name.

    Args:
        renaming: Patterns of names.
        own: Index of the source.
        base: Index of the base model.
    """
    found: dict[str, Place] = {}
    for stored, name in _renamed(renaming.names, [name for name in own.tensors if name not in base.tensors]):
        if name not in own.tensors:
            found[name] = Place(replace(own.tensors[stored], name=name), stored)
    wholes = {is_own: _by_pattern(own if is_own else base) for is_own in {j.is_own for j in renaming.joints}}
    for joint in renaming.joints:
        instances = wholes[joint.is_own].get(joint.whole, [])
        found |= (_parts if joint.is_own else _wholes)(joint, instances, own, base)
    return found


def _renamed(pairs: Iterable[tuple[str, str]], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield names of a source with those that they get, as pairs of patterns say."""
    patterns = dict(pairs)
    for name in names:
        pattern, numbers = collapsed(name)
        if name in patterns:  # a name of its own goes before its pattern
            yield name, patterns[name]
        elif pattern in patterns:
            yield name, filled(patterns[pattern], numbers)


def _by_pattern(index: CheckpointIndex) -> dict[str, list[_Instance]]:
    """Return tensors with the numbers in their names, by the pattern of the name."""
    found: dict[str, list[_Instance]] = {}
    for name, info in index.tensors.items():
        pattern, numbers = collapsed(name)
        found.setdefault(pattern, []).append((info, numbers))
    return found


def _rows(joint: LockedJoint, whole: TensorInfo, numbers: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    count = whole.shape[0] if joint.is_stacked else 1
    return tuple(tuple(filled(part, numbers, row) for part in joint.parts) for row in range(count))


def _parts(
    joint: LockedJoint, instances: Sequence[_Instance], own: CheckpointIndex, base: CheckpointIndex
) -> dict[str, Place]:
    """Return tensors of the base model that are parts of the source's."""
    found: dict[str, Place] = {}
    for whole, numbers in instances:
        rows = _rows(joint, whole, numbers)
        infos = [base.tensors.get(name) for row in rows for name in row]
        joining = _joining(joint, whole, infos[: len(joint.parts)])
        if joining is None or None in infos or any(name in own.tensors for row in rows for name in row):
            continue
        for (row, names), column in product(enumerate(rows), range(len(joint.parts))):
            info = base.tensors[names[column]]
            found[info.name] = part_of(whole, info.name, info.shape, joining, row, column)
    return found


def _wholes(
    joint: LockedJoint, instances: Sequence[_Instance], own: CheckpointIndex, base: CheckpointIndex
) -> dict[str, Place]:
    """Return tensors of the base model that hold several of the source's."""
    found: dict[str, Place] = {}
    for whole, numbers in instances:
        rows = _rows(joint, whole, numbers)
        stored = [[own.tensors[name] for name in row if name in own.tensors] for row in rows]
        if whole.name not in own.tensors and _are_alike(stored):
            joining = _joining(joint, whole, stored[0])
            if joining is not None:
                found[whole.name] = whole_of(stored[0][0], whole.name, whole.shape, joining, rows)
    return found


def _are_alike(rows: Sequence[Sequence[TensorInfo]]) -> bool:
    """Say whether all rows have parts of the same shapes, and all parts one dtype."""
    shapes = {tuple(info.shape for info in row) for row in rows}
    return len(shapes) == 1 and len({info.dtype for row in rows for info in row}) == 1


def _joining(joint: LockedJoint, whole: TensorInfo, parts: Iterable[TensorInfo | None]) -> Joining | None:
    shapes = [info.shape for info in parts if info is not None]
    return joining_of(joint, whole.shape, shapes) if len(shapes) == len(joint.parts) else None


class RenamedSource(DerivedSource):
    """A checkpoint under the base model's names; a `TensorSource`.

    Tensors that the renaming does not name keep their own names. Of a joint tensor the elements that are
    asked for are read, and nothing else.

    Args:
        source: The checkpoint.
        renaming: Says which tensors stand for which.
        base: The base model's index, which has the shapes of parts.
    """

    def __init__(self, source: TensorSource, renaming: Renaming, base: CheckpointIndex) -> None:
        super().__init__(source)
        self._places = places(renaming, source.index, base)

    @cached_property
    def index(self) -> CheckpointIndex:
        own = self.source.index
        used = {name for place in self._places.values() for name in place.stored}
        kept = {name: info for name, info in own.tensors.items() if name not in used}
        found = {name: place.info for name, place in self._places.items()}
        return CheckpointIndex(own.label, own.shards, kept | found)

    def stored_name(self, name: str) -> str:
        place = self._places.get(name)
        return self.source.stored_name(name if place is None else place.own)

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        place = self._places.get(name)
        if place is None:
            return self.source.stored(name)
        return ((self.source, info) for info in place.infos(self.source))

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the elements `[start, stop)` of a tensor in their stored form."""
        place = self._places.get(name)
        if place is None or stop == start:
            return self.source.read_stored(self.stored_name(name), start, stop, out)
        return place.read(self.source, start, stop, out)

    def tensor_file(self, name: str) -> TensorFile | None:
        place = self._places.get(name)
        return self.source.tensor_file(name) if place is None else place.file(self.source)

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        found: list[str] = []
        for name in names:
            place = self._places.get(name)
            found += (name,) if place is None else place.expected
        self.source.expect(found, budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        place = self._places.get(name)
        if place is None:
            self.source.release(name, stop)
        else:
            place.release(self.source, stop)


def with_base_names(
    sources: Mapping[str, TensorSource], locked: Mapping[str, LockedSource]
) -> dict[str, TensorSource]:
    """Return the sources of a lock with the base model's names, where they have others.

    The base model itself is renamed where wrappers changed its names.
    """
    base = unwrapped_base(sources["base_model"], locked["base_model"].renamed)
    return {
        name: base
        if name == "base_model"
        else source
        if (renamed := locked[name].renamed) is None
        else RenamedSource(source, renamed, base.index)
        for name, source in sources.items()
    }


def unwrapped_base(base: TensorSource, renaming: Renaming | None) -> TensorSource:
    """Return the base model under the names that it had before wrappers changed them."""
    nothing = CheckpointIndex(base.label, (), {})
    return base if renaming is None else RenamedSource(base, renaming, nothing)
