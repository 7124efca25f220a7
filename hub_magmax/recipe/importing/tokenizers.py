"""Keys of a mergekit configuration that choose the tokens of the output, as `token_rows` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration, places_of
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import ModelFacts
from hub_magmax.recipe.importing.references import Reference, read_reference
from hub_magmax.text import shown

#: Names of tensors with a row for each token.
_BY_TOKEN = re.compile(r"(.*\.)?(\w*embed_(tokens|in|out)|\w*word_embeddings|wte|lm_head|shared)\.weight")


@dataclass(frozen=True)
class TokenizerReader:
    """Reads these keys.

    Attributes:
        configuration: What was read.
        facts: Of the models, by spelling, as far as they are known.
        family: Base model and tasks.
        notes: Where verdicts go.
    """

    configuration: Configuration
    facts: Mapping[str, ModelFacts]
    family: Family
    notes: Notes

    def keys(self) -> dict[str, Any]:
        """Return `token_rows` and `files_from`; nothing where all have the same tokens."""
        source = self.configuration.top.get("tokenizer_source")
        spec = self.configuration.top.get("tokenizer")
        if spec is not None:
            for at in _leaves(spec):
                self.notes.lose(at, "rows of single tokens, unions and padding are not chosen here")
        if source is not None or spec is not None:
            self._warn_of_padding()
        return {} if source is None else self._of_source(source)

    def _of_source(self, at: Marked) -> dict[str, Any]:
        target = self._target(at)
        facts = self.facts.get(target.written) if target else None
        if target is None:
            return {}
        if facts is None or not all(one.tokens for one in self._models()):
            self.notes.lose(at, "the tokens of the models could not be read")
            return {}
        rows = _by_token(facts)
        if set(rows.values()) - {len(facts.tokens)}:
            told = f"{len(facts.tokens)} rows for {max(rows.values())}"
            self.notes.lose(at, f"mergekit drops rows of no token: {told}")
            return {}
        return self._matched(at, target, facts)

    def _matched(self, at: Marked, target: Reference, facts: ModelFacts) -> dict[str, Any]:
        """Return whose tokens the output has, and which tensors have a row for each."""
        files = self._files(target)
        if all(one.tokens == facts.tokens and _by_token(one) == _by_token(facts) for one in self._models()):
            self.notes.add(at, "exact", "all models have the same tokens")
            return files
        if shared := self._shared(facts):
            told = shown(shared[0]) if len(shared) == 1 else f"{shown(shared[0])} and {len(shared) - 1} more"
            why = f"several models have {told}, and the base model does not: there each keeps its own row"
            self.notes.lose(at, why)
            return {}
        self.notes.add(at, "rounding", "token_rows: rows by token of this tokenizer")
        return {"token_rows": [*_by_token(facts)], **files}

    def _shared(self, facts: ModelFacts) -> list[str]:
        """Return the tokens that several models have, and the recipe's base model lacks."""
        base = next((f for n, f in self.facts.items() if n == self.family.base.written), ModelFacts({}))
        models = self._models()
        return [t for t in facts.tokens if t not in base.tokens and sum(t in m.tokens for m in models) > 1]

    def _models(self) -> list[ModelFacts]:
        """Return facts about all models; about those that are not known, none."""
        every = places_of(self.configuration)
        return [self.facts.get(name, ModelFacts({})) for name in every]

    def _target(self, at: Marked) -> Reference | None:
        """Return the model whose tokenizer counts; None, noted, where that is not one of them."""
        if at.value == "union":
            self.notes.lose(at, "a union of vocabularies is not put together here")
            return None
        if at.value == "base":
            if self.configuration.base is None:
                self.notes.lose(at, "there is no base_model, and mergekit takes any of the models")
            return self.configuration.base
        found = read_reference(at)
        if isinstance(found, str) or found.written not in places_of(self.configuration):
            self.notes.lose(at, "neither union nor base, nor one of the models as it is spelled there")
            return None
        return found

    def _files(self, target: Reference) -> dict[str, Any]:
        """Return where the tokenizer's files are copied from."""
        tasks = [name for name, place in self.family.tasks.items() if place.plain == target.model.plain]
        return {"files_from": tasks[0]} if tasks else {}

    def _warn_of_padding(self) -> None:
        """Note models with rows of no token, which mergekit drops."""
        for one in (one for part in self.configuration.slices for one in part.inputs):
            facts = self.facts.get(one.reference.written)
            rows = max(_by_token(facts).values(), default=0) if facts else 0
            if facts and rows > len(facts.tokens) > 0:
                self.notes.add(one.at, "warning", f"{rows - len(facts.tokens)} rows of no token are dropped")


def _by_token(facts: ModelFacts) -> dict[str, int]:
    """Return the rows of the tensors that have one for each token."""
    return {name: rows for name, rows in facts.rows.items() if _BY_TOKEN.fullmatch(name)}


def _leaves(at: Marked) -> Iterator[Marked]:
    """Yield the values in a mapping that are no mappings."""
    if at.entries is None:
        yield at
    for one in (at.entries or {}).values():
        yield from _leaves(one)
