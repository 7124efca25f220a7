"""Base model and tasks of an imported configuration, and which tasks each of its models becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from hub_magmax.recipe.importing.configuration import Configuration, Input, Slice
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.references import Place, Reference, task_names

#: Of a base model that is named otherwise than among the models.
_RESPELLED = "the base model under another spelling: mergekit takes it for a task whose vector is 0"

#: Methods by which slices may have base models of their own: each of them is a task.
_WITH_OWN_BASES = ("slerp", "task_arithmetic")

#: Methods that sum whole task vectors, so that a model with an adapter is two of them.
SUMS = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class Family:
    """Base model and tasks.

    Attributes:
        base: The base model.
        tasks: Checkpoints and adapters, by name.
        parts: By model, the tasks whose vectors sum to its own; none where it is the base model itself.
    """

    base: Place
    tasks: Mapping[str, Place] = field(default_factory=dict)
    parts: Mapping[Reference, tuple[str, ...]] = field(default_factory=dict)

    def with_base_as_task(self) -> Family:
        """Return the same family with the base model as one more task, the first one."""
        places = {self.base: None, **dict.fromkeys(self.tasks.values())}
        names = dict(zip(places, task_names([*places]), strict=True))
        old = {name: names[place] for name, place in self.tasks.items()}
        parts = {
            reference: tuple(old[name] for name in found) or (names[self.base],)
            for reference, found in self.parts.items()
        }
        return Family(self.base, {name: place for place, name in names.items()}, parts)


def family_of(configuration: Configuration, notes: Notes) -> Family | None:
    """Return base model and tasks of all slices; None, noted, where a recipe has no such family."""
    slices, method = configuration.slices, configuration.method_name
    base = _base_of(configuration, notes)
    every = [one for part in slices for one in part.inputs]
    if base is None or (method not in SUMS and not _are_single(every, base, method, notes)):
        return None
    parts = _all_parts(slices, base.model)
    for part in slices:
        _note_models(part, parts, method, notes)
    return _named(base.model, parts)


def _all_parts(slices: Sequence[Slice], base: Place) -> dict[Reference, tuple[Place, ...]]:
    """Return what every model adds to the base model, a slice's own base model too."""
    models = [one.reference for part in slices for one in part.inputs]
    bases = [part.base for part in slices if part.base is not None]
    return {reference: _parts(reference, base) for reference in (*models, *bases)}


def _named(base: Place, parts: Mapping[Reference, tuple[Place, ...]]) -> Family:
    """Return a family with names for its tasks."""
    places = [*dict.fromkeys(chain.from_iterable(parts.values()))]
    names = dict(zip(places, task_names(places), strict=True))
    named = {reference: tuple(names[place] for place in found) for reference, found in parts.items()}
    return Family(base, {name: place for place, name in names.items()}, named)


def _base_of(configuration: Configuration, notes: Notes) -> Reference | None:
    """Return the base model of the recipe; None, noted, where there is none for all slices."""
    slices = configuration.slices
    named = {part.base.plain: part.base for part in slices if part.base is not None}
    if len(named) > 1 and configuration.method_name not in _WITH_OWN_BASES:
        _lose_bases(slices, notes)
        return None
    # A base model that all slices have as their own counts, not the one at the top.
    at_top = configuration.base if len(named) != 1 else None
    base = at_top or next(iter(named.values()), None) or _chosen(slices, notes)
    if base.lora is not None:
        at = slices[0].base_at or slices[0].at
        notes.lose(at, "a base model with an adapter: merge the adapter into it first")
        return None
    return base


def _lose_bases(slices: Sequence[Slice], notes: Notes) -> None:
    for part in slices:
        notes.lose(part.base_at or part.at, "slices with base models of their own")


def _are_single(every: Sequence[Input], base: Reference, method: str, notes: Notes) -> bool:
    """Say whether every model is one task; note where one is not."""
    whole = [one for one in every if len(_parts(one.reference, base.model)) > 1]
    for one in whole:
        notes.lose(one.at, f"an adapter on another model than the base model, which {method} takes as one")
    return not whole


def _chosen(slices: Sequence[Slice], notes: Notes) -> Reference:
    """Return the model that plays the base model where none is named."""
    inputs = [one for part in slices for one in part.inputs]
    chosen = Reference(inputs[0].reference.model)
    if len({one.reference.model.plain for one in inputs}) > 1:
        why = (
            f"no base_model is named, so the first model, {chosen.written}, plays it, and gives config and "
            "tokenizer; mergekit takes those of any of the models"
        )
        notes.add(slices[0].at, "warning", why)
    return chosen


def _parts(reference: Reference, base: Place) -> tuple[Place, ...]:
    """Return the checkpoint and the adapter that a model adds to the base model."""
    own = () if reference.model.plain == base.plain else (reference.model,)
    return (*own, reference.lora) if reference.lora else own


def _note_models(
    part: Slice, parts: Mapping[Reference, tuple[Place, ...]], method: str, notes: Notes
) -> None:
    """Note what every model is."""
    for one in part.inputs:
        _note_model(one, part, parts[one.reference], notes)
    if part.base_at is not None:
        # Where a slice has its own it is merged; so it is as the centre of a sphere.
        is_merged = method in ("nuslerp", "multislerp") or (part.base is not None and bool(parts[part.base]))
        notes.add(part.base_at, "rounding" if is_merged else "exact", "base_model")


def _note_model(one: Input, part: Slice, tasks: tuple[Place, ...], notes: Notes) -> None:
    """Note what one of the models is."""
    if one.reference.lora is not None:
        named = one.at.get("model")
        for at in (one.at, *((named and named.entries) or {}).values()):
            notes.add(at, "rounding", "the adapter is a task, its product added to the base model")
    elif one.at is not part.base_at:
        told = _told(one, part, tasks)
        notes.add(one.at, "warning" if told is _RESPELLED else "exact", told)


def _told(one: Input, part: Slice, tasks: tuple[Place, ...]) -> str:
    if one.is_base:
        return "the base model of the slice" if tasks else "the base model"
    return "a task" if tasks else "the base model" if part.base is None else _RESPELLED
