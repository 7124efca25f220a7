"""Rows of tokens as mergekit chooses them, and the lines of a recipe's `tokenizer.tokens` for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hub_magmax.recipe.importing.configuration import Slice
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.references import Place, Reference

#: What recipes call the base model.
_BASE = "base_model"

#: In place of a source: a row of zeros, and the mean of the rows of the tasks that have a token.
ZERO, _MEAN = "zero", "mean"

#: Of a token that no model lacks.
_ANY = "any"


@dataclass(frozen=True)
class RowRules:
    """Rows of the tokens that models lack.

    mergekit gives a token that some models lack, in these, the row of the base model; if that lacks it too,
    the row of the one model that has it, the mean of those that have it, or zeros.

    Attributes:
        family: Base model and tasks.
        known: Tokens of every checkpoint, and of every adapter those of the model that it is on.
        tokens: Of the output.
    """

    family: Family
    known: Mapping[Place, Collection[str]]
    tokens: Sequence[str]

    def choices(self, parts: Sequence[Slice]) -> dict[str, str] | None:
        """Return the source of the row by token, where a recipe does not choose that by itself.

        Args:
            parts: The models of the embedding, and those of the head.

        Returns:
            None where no line of a recipe says it.
        """
        found: dict[str, str] = {}
        for token in self.tokens:
            wanted = {self._choice(token, part) for part in parts} - {_ANY}
            if len(wanted) > 1 or None in wanted:
                return None
            if chosen := next(iter(wanted), ""):
                found[token] = chosen
        return found

    def _choice(self, token: str, part: Slice) -> str | None:
        """Return the source of a row; empty for what a recipe chooses, None where nothing says it."""
        having = [one.reference for one in part.inputs if token in self.known[one.reference.model.plain]]
        places = self.family.tasks.items()
        tasks = {name: place for name, place in places if token in self.known[place.plain]}
        usual = self._usual(token, [*tasks])
        if len(having) == len(part.inputs):
            # A base model that takes no part counts as having the token, so that every task keeps its row.
            return _ANY if usual else _MEAN
        wanted = self._row_of(having, part)
        if wanted == usual:
            return ""
        return None if wanted == _MEAN and not _are_of(tasks.values(), having) else wanted

    def _usual(self, token: str, tasks: Sequence[str]) -> str:
        """Return the source of the row that a recipe chooses by itself; empty for a mean by preference."""
        if token in self.known[self.family.base.plain]:
            return _BASE
        return tasks[0] if len(tasks) == 1 else ""

    def _row_of(self, having: Sequence[Reference], part: Slice) -> str:
        """Return where mergekit takes the row of the models that lack a token."""
        if len(having) == 1:
            return self.source_of(having[0])
        if not having:
            return ZERO
        return self.source_of(part.base) if part.base is not None and part.base in having else _MEAN

    def source_of(self, reference: Reference) -> str:
        """Return what the recipe calls the checkpoint of a model, without its adapter."""
        places = self.family.tasks.items()
        own = (name for name, place in places if place.plain == reference.model.plain)
        return _BASE if reference.model.plain == self.family.base.plain else next(own, _BASE)


def _are_of(tasks: Iterable[Place], models: Iterable[Reference]) -> bool:
    """Say whether tasks are these models, and no others."""
    return {place.plain for place in tasks} == {one.model.plain for one in models}
