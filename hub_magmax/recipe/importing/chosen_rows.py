"""Rows of single tokens that a mergekit configuration chooses, as `tokenizer.tokens` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration, places_of
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import Models
from hub_magmax.recipe.importing.readings import LostError
from hub_magmax.recipe.importing.references import Reference, read_reference
from hub_magmax.recipe.importing.token_rows import ZERO, RowRules
from hub_magmax.text import nearest, shown

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
