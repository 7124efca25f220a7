"""Tasks that were fine-tuned from another base model than the merge's: their vectors from their own base.

Merges read a checkpoint and subtract the base model. A checkpoint θ with a base θ_b of its own is read as
θ_0 + (θ − θ_b) there, in float64, so that the difference, rounded to float32, is that of θ and θ_b.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import Tensor, np
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.lockfile import own_base_name


def with_own_bases(sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return the base model and the tasks, each with its own base model where `sources` has one for it."""
    names = {own_base_name(name) for name in sources}
    return {
        name: OwnBase(source, sources[own]) if (own := own_base_name(name)) in sources else source
        for name, source in sources.items()
        if name not in names
    }


def without_own_bases(sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return what `with_own_bases` was called with: the tasks' own base models among the others."""
    tasks = {name: source for name, source in sources.items() if isinstance(source, OwnBase)}
    plain = {name: tasks[name].source if name in tasks else source for name, source in sources.items()}
    return {**plain, **{own_base_name(name): task.own_base for name, task in tasks.items()}}


class OwnBase(DerivedSource):
    """A checkpoint as it is, which knows the model that it was fine-tuned from; a `TensorSource`.

    Args:
        source: The checkpoint.
        own_base: The model that its task vector is relative to.
    """

    def __init__(self, source: TensorSource, own_base: TensorSource) -> None:
        super().__init__(source)
        self.own_base = own_base
        self._moved: _Moved | None = None

    @property
    def index(self) -> CheckpointIndex:
        return self.source.index

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read(name, start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        return self.source.read_stored(name, start, stop, out)

    def tensor_file(self, name: str) -> TensorFile | None:
        return None  # its values alone are no task vector

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        names = [*names]
        self.source.expect(names, budget_bytes // 2, in_part=in_part)
        own = [name for name in names if name in self.own_base.index.tensors]
        self.own_base.expect(own, budget_bytes // 2, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        self.source.release(name, stop)
        if name in self.own_base.index.tensors:
            self.own_base.release(name, stop)

    def keeps(self, name: str) -> bool:
        return self.source.keeps(name)

    def merged_with(self, base: TensorSource) -> TensorSource:
        if self._moved is None or self._moved.base is not base:
            self._moved = _Moved(self, base)
        return self._moved


def own_base_indexes(sources: Mapping[str, TensorSource]) -> dict[str, CheckpointIndex]:
    """Return the tensors of tasks' own base models, by `own_base_name`."""
    tasks = {name: source for name, source in sources.items() if isinstance(source, OwnBase)}
    return {own_base_name(name): task.own_base.index for name, task in tasks.items()}


class _Moved(DerivedSource):
    """A checkpoint moved from its own base model to that of a merge; in float64."""

    def __init__(self, task: OwnBase, base: TensorSource) -> None:
        super().__init__(task)
        self._own_base, self.base = task.own_base, base

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        return replace(index, tensors={name: wide(info) for name, info in index.tensors.items()})

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat."""
        if self.index.tensors[name].dtype not in MERGEABLE_DTYPES:
            return self.source.read(name, start, stop)
        own, own_base, base = (
            source.read(name, start, stop).double() for source in (self.source, self._own_base, self.base)
        )
        return base + (own - own_base)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        return Stored.of(self.read(name, start, stop))

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        for source in (self.source, self._own_base, self.base):
            yield from source.stored(name)

    def keeps(self, name: str) -> bool:
        return self.source.keeps(name)

    def release(self, name: str, stop: int) -> None:
        self.source.release(name, stop)


def wide(info: TensorInfo) -> TensorInfo:
    """Return a tensor as it is read where its values are computed in float64."""
    return replace(info, dtype="F64") if info.dtype in MERGEABLE_DTYPES else info
