"""Search for tied weights: names that a model's files may store once, or several times with equal contents.

Names alone prove nothing. Two tensors are tied where a file stores both with equal contents, and where it
lacks one of them and its configuration ties. A stored tensor that differs is a parameter of its own:
transformers 5 loads it as one, whatever the configuration says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, TensorInfo
from hub_magmax.checkpoints.names.matching import common_parts
from hub_magmax.checkpoints.names.model_classes import declares_ties, is_said_tied, is_said_untied, tied_names
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.recipe.lockfile import LockedSource

#: Last parts of the names of embeddings, and of heads that models tie to one.
_EMBEDDING = re.compile(
    r"(.*\.)?(shared|embed_tokens|wte|word_embeddings?|tok_embeddings|tokens_embed|embed_in|embedding|"
    r"backbone\.embeddings|rwkv\.embeddings|transformer\.(embeddings|w)|embed_tokens\.(word_)?embedd?ings?)\.weight"
)
_HEAD = re.compile(
    r"(.*\.)?(lm_head|proj_out|output_projection|embed_out|generator_lm_head|vocab_projector|lm_loss|"
    r"(lm_head|predictions|mlm_score|head)\.decoder|lm_head\.out_proj|pred_layer\.proj|decoder|head|output)\.weight"
)
#: A bias that heads hold twice.
_BIAS = re.compile(r"(?P<of>.*)\.decoder(?P<end>\.bias)")

#: Parts of names that tell embeddings of one group: the first is that of the whole model.
_SHARED = re.compile(r"(.*\.)?(shared|(encoder|decoder)\.embed_tokens)\.weight")

#: Bytes of two tensors that are compared at a time.
_BLOCK_BYTES = 2**22

#: Tensors without a name that tells, up to which those of equal contents are looked for.
_MOST_UNKNOWN = 16

#: Tensors of one shape, up to which one is compared with all of them: layers have many, and tie none.
_MOST_ALIKE = 256


def with_found_ties(
    sources: Mapping[str, LockedSource],
    opened: Mapping[str, TensorSource],
    is_made_anew: Callable[[TensorInfo], bool],
) -> dict[str, LockedSource]:
    """Return the sources of a lock with their tied tensors; adapters as they are.

    Args:
        sources: `base_model` and the tasks, pinned.
        opened: The same, open, under the base model's names.
        is_made_anew: Tells buffers that a model's code makes, such as masks, equal in all layers: no
            parameters, so never tied.
    """
    whole = {name: opened[name] for name, locked in sources.items() if not locked.adapter_config}
    found = find_ties(whole, is_made_anew)
    return {name: replace(locked, ties=found.get(name) or None) for name, locked in sources.items()}


def find_ties(
    sources: Mapping[str, TensorSource], is_made_anew: Callable[[TensorInfo], bool]
) -> dict[str, dict[str, str]]:
    """Return the tied tensors of each source: their names, and the stored tensor whose values they have.

    Reads tensors only where a source stores two that may be tied, up to their first difference.

    Args:
        sources: `base_model` and the tasks that are whole checkpoints, under the base model's names.
        is_made_anew: As `with_found_ties` has it.

    Returns:
        By source; empty for each where nothing is tied, or all sources store the same as parameters of
        their own.
    """
    family = {name: _Checkpoint(source, is_made_anew) for name, source in sources.items()}
    every = _all_tensors(family)
    uneven = _uneven(every, family)
    found: dict[str, dict[str, str]] = {name: {} for name in sources}
    for group in [*_groups(every), *_groups_without_names(every, uneven, family)]:
        if uneven.isdisjoint(group) and all(model.is_said_untied for model in family.values()):
            continue
        for task, ties in _ties_of(group, family, is_even=uneven.isdisjoint(group)).items():
            found[task] |= ties
    return _completed(found, family)


def _uneven(every: Iterable[str], family: Mapping[str, _Checkpoint]) -> set[str]:
    """Return the tensors that some source lacks."""
    return {name for name in every if any(name not in model.tensors for model in family.values())}


def _all_tensors(family: Mapping[str, _Checkpoint]) -> dict[str, TensorInfo]:
    """Return every tensor of any source, as the first source that stores it has it."""
    every: dict[str, TensorInfo] = {}
    for model in family.values():
        every = {**model.tensors, **every}
    return every


@dataclass
class _Checkpoint:
    """A source, its configuration and its parameters of floating point."""

    source: TensorSource
    is_made_anew: Callable[[TensorInfo], bool]
    _equal: dict[tuple[str, str], bool] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        tensors = self.source.index.tensors
        return {
            name: info
            for name, info in tensors.items()
            if info.dtype in MERGEABLE_DTYPES and not self.is_made_anew(info)
        }

    @cached_property
    def config(self) -> dict[str, Any]:
        return stated_config(self.source)

    @cached_property
    def declares_ties(self) -> bool | None:
        return declares_ties(self.config)

    @cached_property
    def is_said_tied(self) -> bool:
        return is_said_tied(self.config)

    @cached_property
    def is_said_untied(self) -> bool:
        return is_said_untied(self.config)

    def equal(self, one: str, other: str) -> bool:
        """Say whether two stored tensors have the same bytes."""
        if (one, other) not in self._equal:
            self._equal[one, other] = self._compare(one, other)
        return self._equal[one, other]

    def _compare(self, one: str, other: str) -> bool:
        first, second = self.tensors[one], self.tensors[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        step = max(1, _BLOCK_BYTES * first.num_elements // max(first.num_bytes, 1))
        start, length = 0, min(step, 1024)  # most differ at once
        while start < first.num_elements:
            stop = min(start + length, first.num_elements)
            ours, theirs = (self.source.read_stored(name, start, stop).bits for name in (one, other))
            if not np.array_equal(ours, theirs):
                return False
            start, length = stop, step
        return True

    def is_constant(self, name: str) -> bool:
        """Say whether all elements of a tensor are the same; equal contents then mean nothing."""
        size = self.tensors[name].num_elements
        bits = self.source.read_stored(name, 0, min(size, 4096)).bits
        return not size or bool((bits == bits[0]).all())


def _groups(every: Mapping[str, TensorInfo]) -> Iterator[tuple[str, ...]]:
    """Yield names that may be one parameter, those of embeddings first, as their names tell."""
    embeddings = sorted(
        filter(_EMBEDDING.fullmatch, every), key=lambda name: not name.endswith("shared.weight")
    )
    heads = [name for name in filter(_HEAD.fullmatch, every) if len(every[name].shape) == 2]
    if embeddings and len(embeddings) + len(heads) > 1:
        yield (*embeddings, *heads)
    for match in filter(None, map(_BIAS.fullmatch, every)):
        if (of := match["of"] + match["end"]) in every:
            yield of, match[0]


def _groups_without_names(
    every: Mapping[str, TensorInfo], uneven: Iterable[str], family: Mapping[str, _Checkpoint]
) -> Iterator[tuple[str, ...]]:
    """Yield pairs of tensors that some source lacks, and that only contents or a model's class can tell."""
    told = {name for group in _groups(every) for name in group}
    unknown = sorted({*uneven} - told)
    if not 0 < len(unknown) <= _MOST_UNKNOWN:
        return
    twins = {name: _twin_of(name, family.values()) for name in unknown}
    base = family["base_model"]
    # The class takes seconds to import, and is asked where contents do not tell and the model ties something.
    ties = tied_names(base.config) if None in twins.values() and base.is_said_tied else {}
    for name, twin in twins.items():
        other = twin or ties.get(name, "")
        if _every_one_stores({other, name}, family.values()):
            yield other, name


def _every_one_stores(pair: set[str], family: Iterable[_Checkpoint]) -> bool:
    """Say whether every source stores one of a pair; not so buffers that are equal in all layers."""
    return not any(pair.isdisjoint(model.tensors) for model in family)


def _twin_of(name: str, family: Iterable[_Checkpoint]) -> str | None:
    """Return a tensor that has equal contents where a source stores both."""
    twins = (_twin(name, model) for model in family if name in model.tensors)
    return next((twin for twin in twins if twin is not None), None)


def _twin(name: str, model: _Checkpoint) -> str | None:
    """Return a tensor of the same file with equal contents, which are not one number throughout."""
    info = model.tensors[name]
    if len(info.shape) < 2 or model.source.tensor_file(name) is None or model.is_constant(name):
        return None
    alike = [n for n, other in model.tensors.items() if n != name and other.shape == info.shape]
    if len(alike) > _MOST_ALIKE:
        return None
    return next((other for other in alike if model.equal(other, name)), None)


def _ties_of(
    group: tuple[str, ...], family: Mapping[str, _Checkpoint], *, is_even: bool
) -> dict[str, dict[str, str]]:
    """Return the ties of each source within one group, of which every source may store all."""
    found = {task: _stored_twice(group, model) for task, model in family.items()}
    if is_even:
        tying = any(found.values()) and any(model.declares_ties is not False for model in family.values())
        # Or else they are parameters of their own that happen to be equal.
        return found if tying else {}
    seen = {frozenset(pair) for ties in found.values() for pair in ties.items()}
    for task, model in family.items():
        found[task] |= _not_stored(group, model, family, seen, found[task])
    return found


def _not_stored(
    group: tuple[str, ...],
    model: _Checkpoint,
    family: Mapping[str, _Checkpoint],
    seen: set[frozenset[str]],
    ties: Mapping[str, str],
) -> dict[str, str]:
    """Return the tensors that a checkpoint lacks and has by a tie, with the stored ones."""
    stored = [name for name in group if name in model.tensors]
    lacking = [name for name in group if name not in model.tensors]
    partners = {name: _partner(name, stored, seen) for name in lacking}
    return {
        name: ties.get(other, other)
        for name, other in partners.items()
        if other is not None and _has_by_tie(name, other, model, family, seen)
    }


def _has_by_tie(
    name: str,
    other: str,
    model: _Checkpoint,
    family: Mapping[str, _Checkpoint],
    seen: set[frozenset[str]],
) -> bool:
    """Say whether a checkpoint that lacks one of two tensors has it by a tie to the other one."""
    if not _fit(name, other, model, family.values()):
        return False
    if model.declares_ties is not None:
        return model.declares_ties
    return frozenset((name, other)) in seen or any(own.declares_ties for own in family.values())


def _stored_twice(group: tuple[str, ...], model: _Checkpoint) -> dict[str, str]:
    """Return tensors of a file with the contents of an earlier one of the group, by name, and that one."""
    ties, apart = {}, list[str]()
    for name in group:
        if name in model.tensors:
            same = next((other for other in apart if model.equal(other, name)), None)
            if same is None:
                apart.append(name)
            else:
                ties[name] = same
    return ties


def _fit(name: str, other: str, model: _Checkpoint, family: Iterable[_Checkpoint]) -> bool:
    """Say whether a missing tensor has the shape of another one, where some source has both."""
    own = model.tensors[other]
    return any(
        found.tensors.get(other, own).shape == found.tensors[name].shape
        for found in family
        if name in found.tensors
    )


def _partner(name: str, stored: list[str], seen: set[frozenset[str]]) -> str | None:
    """Return the stored tensor that a missing one of the same group is tied to: its twin elsewhere, or the
    nearest by name.
    """
    twins = [other for other in stored if frozenset((name, other)) in seen]
    near = sorted(twins[:1] or _candidates(name, stored), key=lambda other: -common_parts(name, other))
    return near[0] if near else None


def _candidates(name: str, stored: list[str]) -> list[str]:
    """Return the stored tensors that a missing one may be tied to, as the names tell."""
    if _SHARED.fullmatch(name):
        return [other for other in stored if _SHARED.fullmatch(other)] or stored
    embeddings = [other for other in stored if _EMBEDDING.fullmatch(other)]
    if _EMBEDDING.fullmatch(name):
        return [] if embeddings else stored  # of two embeddings, one is not the other
    return embeddings or stored


def _completed(
    found: dict[str, dict[str, str]], family: Mapping[str, _Checkpoint]
) -> dict[str, dict[str, str]]:
    """Add all names that the base model's class ties, where the sources tie different ones.

    The output is then loaded without ties, so its files have to have every name.
    """
    names = {name for ties in found.values() for pair in ties.items() for name in pair}

    def classes(ties: Mapping[str, str]) -> set[frozenset[str]]:
        return {frozenset(n for n in names if ties.get(n, n) == of) for of in {ties.get(n, n) for n in names}}

    if len({frozenset(classes(ties)) for ties in found.values()}) < 2:
        return found
    model = family["base_model"]
    for name, of in tied_names(model.config).items():
        for task, ties in found.items():
            stored = ties.get(of, of)
            if name not in family[task].tensors and stored in family[task].tensors:
                ties.setdefault(name, stored)
    return found
