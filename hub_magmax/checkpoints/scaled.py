"""Checkpoints whose task vectors merges read times a factor, so that these have a common length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex
from hub_magmax.checkpoints.own_bases import wide
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import Tensor, np
from hub_magmax.kernels.stored import Stored
from hub_magmax.methods.factors import Factors
from hub_magmax.recipe.merge_values import MergeValues
from hub_magmax.recipe.norms import Lengths


def read_by_merges(
    sources: Mapping[str, TensorSource],
    lengths: Lengths | None,
    values_of: Callable[[str], MergeValues],
) -> dict[str, TensorSource]:
    """Return the base model and the tasks as merges read them: a difference from the base is a task vector.

    Args:
        sources: From `opening.as_merged`.
        lengths: Of the task vectors, where they are scaled to a common one.
        values_of: Returns for a tensor the numbers by which it is merged.
    """
    base, found = sources["base_model"], dict[str, TensorSource]()
    for number, (name, source) in enumerate(sources.items()):
        found[name] = source if source is base else source.merged_with(base)
        if number and lengths is not None:
            found[name] = Scaled(found[name], base, _factors(lengths, values_of, number - 1))
    return found


def _factors(lengths: Lengths, values_of: Callable[[str], MergeValues], task: int) -> Callable[[str], float]:
    return lambda tensor: lengths.factors(tensor, values_of(tensor))[task]


class Scaled(DerivedSource):
    """A checkpoint θ as θ_0 + f (θ − θ_0), in float64, where the factor f of a tensor is not 1.

    Args:
        source: The checkpoint, as merges read it.
        base: The base model.
        factor_of: Returns the factor of a tensor.
    """

    def __init__(self, source: TensorSource, base: TensorSource, factor_of: Callable[[str], float]) -> None:
        super().__init__(source)
        self._base, self._factor_of = base, factor_of
        self._factors: dict[str, float] = {}

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        tensors = {
            name: wide(info) if self._factor(name) != 1 else info for name, info in index.tensors.items()
        }
        return replace(index, tensors=tensors)

    def _factor(self, name: str) -> float:
        if name not in self._factors:
            self._factors[name] = self._factor_of(name)
        return self._factors[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat."""
        own = self.source.read(name, start, stop)
        if self._factor(name) == 1 or self.source.index.tensors[name].dtype not in MERGEABLE_DTYPES:
            return own
        base = self._base.read(name, start, stop).double()
        return base + self._factor(name) * (own.double() - base)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        if self._factor(name) == 1:
            return self.source.read_stored(name, start, stop, out)
        return Stored.of(self.read(name, start, stop))

    def tensor_file(self, name: str) -> TensorFile | None:
        return self.source.tensor_file(name) if self._factor(name) == 1 else None

    def factors(self, name: str, base: TensorSource) -> Factors | None:
        found = self.source.factors(name, base)
        return None if found is None else found.times(self._factor(name))

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        self.source.expect(names, budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        self.source.release(name, stop)

    def keeps(self, name: str) -> bool:
        return self.source.keeps(name)
