"""Tied weights as one parameter: sources as a lock says that their tensors are tied.

A lock says for each source which of its tensors have the values of another one (`LockedSource.ties`): not
stored, or stored once more. Tensors that are tied in every source are one parameter: merged once, and stored
in the output as often as the base model stores it. Tensors that a source trained apart are merged apart, and
a source that ties them counts with its one tensor for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import DerivedSource, TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import Tensor, np
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import rule_for


@dataclass(frozen=True)
class Ties:
    """The tied tensors of a merge.

    Attributes:
        copies: Tensors that are tied to another one in every source, by name, and that one.
        apart: Tensors that are tied in some source and not in all, each with the one it is tied to, and the
            sources that trained it apart.
    """

    copies: Mapping[str, str]
    apart: Mapping[str, tuple[str, tuple[str, ...]]]


def ties_of(lock: Lock) -> Ties:
    """Return what a lock says about tied tensors; empty where nothing is tied."""
    known = _known(lock)
    pairs = [pair for ties in known.values() for pair in ties.items()]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(chain.from_iterable(pairs)):
        groups.setdefault(tuple(ties.get(name, name) for ties in known.values()), []).append(name)
    copies: dict[str, str] = {}
    for (stored, *_), group in groups.items():
        first = stored if stored in group else group[0]
        copies |= {name: first for name in group if name != first}
    return Ties(copies, _apart(known, pairs))


def _apart(
    known: Mapping[str, Mapping[str, str]], pairs: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the tensors of pairs that some source does not tie, as `Ties.apart` has them."""
    apart: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name, other in pairs:
        trained = tuple(
            task for task, ties in known.items() if ties.get(name, name) != ties.get(other, other)
        )
        if trained and other not in apart:
            apart.setdefault(name, (other, trained))
    return apart


def _known(lock: Lock) -> dict[str, Mapping[str, str]]:
    """Return the ties of each source; an adapter whose own are not known has the base model's."""
    of_base = lock.base_model.ties or {}
    return {
        name: of_base if source.ties is None and source.adapter_config else source.ties or {}
        for name, source in lock.every_source.items()
    }


def with_ties(opened: Mapping[str, TensorSource], recipe: Recipe, lock: Lock) -> dict[str, TensorSource]:
    """Return the sources with all names of the merge's tied tensors, adapters as they are.

    What is tied everywhere, and what neither the base model nor the source of the output's files stores, is
    in no source any more, unless a rule of the recipe is about it: the output goes without it, too. Where
    tensors are merged apart the output has all of them, since its model ties none.
    """
    ties = ties_of(lock)
    if not ties.copies and not ties.apart:
        return dict(opened)
    hidden = (
        frozenset[str]() if ties.apart else frozenset(ties.copies).difference(_kept(opened, recipe, ties))
    )
    return {
        name: source
        if lock.every_source[name].adapter_config
        else TiedSource(source, lock.every_source[name].ties or {}, hidden)
        for name, source in opened.items()
    }


def _kept(opened: Mapping[str, TensorSource], recipe: Recipe, ties: Ties) -> set[str]:
    """Return the names of copies that the output stores."""
    stored = [opened[name].index.tensors for name in ("base_model", recipe.output.files_from)]
    return {
        name
        for name in ties.copies
        if any(name in tensors for tensors in stored) or rule_for(name, recipe.tensors)
    }


class TiedSource(DerivedSource):
    """A checkpoint with the names of tied tensors that its files lack; a `TensorSource`.

    Args:
        source: The checkpoint.
        ties: Names of tensors, and the stored ones whose values they have.
        hidden: Names that are left out.
    """

    def __init__(
        self, source: TensorSource, ties: Mapping[str, str], hidden: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(source)
        stored = source.index.tensors
        self._hidden = hidden
        self._aliases = {n: of for n, of in ties.items() if n not in stored and n not in hidden}

    @cached_property
    def index(self) -> CheckpointIndex:
        index = self.source.index
        found = {name: info for name, info in index.tensors.items() if name not in self._hidden}
        tied = {name: replace(index.tensors[of], name=name) for name, of in self._aliases.items()}
        return replace(index, tensors={**found, **tied})

    def _stored(self, name: str) -> str:
        return self._aliases.get(name, name)

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        return self.source.stored(self._stored(name))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat, in its stored dtype."""
        return self.source.read(self._stored(name), start, stop)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form."""
        return self.source.read_stored(self._stored(name), start, stop, out)

    def tensor_file(self, name: str) -> TensorFile | None:
        return self.source.tensor_file(self._stored(name))

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        once = dict.fromkeys(map(self._stored, names))  # ranges are fetched ahead once
        self.source.expect(once, budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        self.source.release(self._stored(name), stop)
