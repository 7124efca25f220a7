"""Rows of tokens as mergekit chooses them, and the lines of a recipe's `tokenizer.tokens` for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration, Slice, places_of
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import Models
from hub_magmax.recipe.importing.readings import LostError
from hub_magmax.recipe.importing.references import Place, Reference, read_reference
from hub_magmax.text import nearest, shown

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


#: Keys of a token, and of the source of its row.
_OF_TOKEN = ("source", "force")
_OF_ROW = ("kind", "model", "token", "token_id")


def lost(notes: Notes, at: Marked, why: str) -> LostError:
    """Note that something has no counterpart; return what ends the reading."""
    notes.lose(at, why)
    return LostError(why)


def check_mapping(notes: Notes, at: Marked, known: Sequence[str]) -> None:
    """Note keys that mergekit reads over.

    Raises:
        LostError: If it is no mapping.
    """
    if not at.is_mapping:
        raise lost(notes, at, f"expected a mapping with {', '.join(known)}")
    for key, one in (at.entries or {}).items():
        if key not in known:
            hint = nearest(key, known)
            notes.add(
                one, "warning", f"no key of mergekit here: it reads over this{f'; {hint}' if hint else ''}"
            )


@dataclass(frozen=True)
class RowReader:
    """Reads `tokens` of `tokenizer`.

    Attributes:
        configuration: What was read.
        models: Looks checkpoints up.
        rules: Of the tokens of the output.
        notes: Where verdicts go.
    """

    configuration: Configuration
    models: Models
    rules: RowRules
    notes: Notes

    def rows(self, at: Marked | None) -> dict[str, Any]:
        """Return whose row a token gets, as a recipe says it.

        Raises:
            LostError: If no recipe says it.
        """
        if at is None:
            return {}
        if not at.is_mapping:
            raise lost(self.notes, at, "expected a mapping of tokens")
        found = {}
        for token, entry in (at.entries or {}).items():
            if token not in self.rules.tokens:
                why = "a token that the tokenizer of the output lacks, and that mergekit adds to it"
                raise lost(self.notes, entry, why)
            found[token] = self._row(token, entry)
        return found

    def _row(self, token: str, entry: Marked) -> Any:
        """Return the row of one token."""
        check_mapping(self.notes, entry, _OF_TOKEN)
        at, force = entry.get("source"), entry.get("force")
        if at is None:
            raise lost(self.notes, entry, "no source of the row, which mergekit needs")
        if force is not None and not isinstance(force.value, bool):
            raise lost(self.notes, force, "neither true nor false")
        row = self._source(token, at)
        for leaf in _leaves(entry):
            self.notes.add(leaf, "rounding", "tokenizer.tokens: whose row a token gets")
        if force is not None and force.value:
            return {**row, "force": True}
        return row["take"] if len(row) == 1 else row

    def _source(self, token: str, at: Marked) -> dict[str, Any]:
        """Return `take`, and which row of that source."""
        kind = at.get("kind")
        if kind is None:
            found, own = read_reference(at), {"token": token}
        elif kind.value == ZERO:
            return {"take": ZERO}
        else:
            found, own = self._of_other_token(at)
        if isinstance(found, str) or found.written not in places_of(self.configuration):
            raise lost(self.notes, at, "neither one of the models as it is spelled there, nor kind: zero")
        self._check_row(at, own, found)
        return {"take": self.rules.source_of(found), **({} if own == {"token": token} else own)}

    def _of_other_token(self, at: Marked) -> tuple[Reference | str, dict[str, Any]]:
        """Return a model, and the token or the number of its row."""
        check_mapping(self.notes, at, _OF_ROW)
        entries = at.entries or {}
        own = {key: entries[key].value for key in ("token", "token_id") if at.get(key)}
        if len(own) != 1:
            raise lost(self.notes, at, "expected token or token_id, one of them")
        model = at.get("model")
        is_known = model is not None and entries["kind"].value == "model_token"
        return read_reference(model) if is_known and model is not None else "no row of a token", own

    def _check_row(self, at: Marked, own: Mapping[str, Any], reference: Reference) -> None:
        """Raise where a model has no row of a token, on which mergekit fails too."""
        facts = self.models.facts(reference.model)
        assert facts is not None
        number, token = own.get("token_id"), own.get("token")
        is_there = token in facts.tokens if number is None else number in facts.tokens.values()
        if not is_there or isinstance(number, bool):
            name = shown(str(number if token is None else token))
            raise lost(self.notes, at, f"{reference.written} has no row of {name}")


def _leaves(at: Marked) -> Iterator[Marked]:
    """Yield the values in a mapping that are no mappings."""
    if at.entries is None:
        yield at
    for one in (at.entries or {}).values():
        yield from _leaves(one)
