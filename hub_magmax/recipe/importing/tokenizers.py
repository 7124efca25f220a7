"""Keys of a mergekit configuration that choose the tokens of the output, as `tokenizer` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration, places_of
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import ModelFacts, Models
from hub_magmax.recipe.importing.parameters import as_number, is_whole, settings_of
from hub_magmax.recipe.importing.readings import LostError
from hub_magmax.recipe.importing.references import Place, Reference, read_reference
from hub_magmax.recipe.importing.token_rows import RowReader, RowRules, check_mapping, lost

#: Names of tensors with a row for each token.
_BY_TOKEN = re.compile(r"(.*\.)?(\w*embed_(tokens|in|out)|\w*word_embeddings|wte|lm_head|shared)\.weight")

#: Keys of `tokenizer`.
_KEYS = ("source", "tokens", "pad_to_multiple_of")

#: Tokens that a recipe says something of, at most.
_MAX_TOKENS = 10_000

#: What becomes of a mean of the rows of two models that weigh equally.
_CANCELLED = (
    "of a token that the base model lacks, rows of two models with equal weights cancel: no sign is elected "
    "here, and they are their mean; mergekit takes the larger one of each two elements"
)

#: Of rows of padding, where elements are ranked.
_EQUAL_ROWS = (
    "new rows are equal to each other: of elements that equal the smallest kept one all stay here, and some "
    "of them in mergekit"
)

#: What the source of a tokenizer can be.
_SOURCES = "neither union nor base, nor one of the models as it is spelled there"


@dataclass(frozen=True)
class TokenizerReader:
    """Reads these keys.

    Attributes:
        configuration: What was read.
        models: Looks checkpoints up.
        family: Base model and tasks.
        notes: Where verdicts go.
    """

    configuration: Configuration
    models: Models
    family: Family
    notes: Notes

    def key(self) -> dict[str, Any]:
        """Return `tokenizer` of a recipe; nothing where rows and tokenizer are those of the base model."""
        source, spec = (self.configuration.top.get(key) for key in ("tokenizer_source", "tokenizer"))
        try:
            if spec is not None:
                found = self._of_mapping(spec, source)
            else:
                found = {} if source is None else self._read(source, None)
        except LostError:
            return {}
        return {"tokenizer": found} if found else {}

    def _of_mapping(self, spec: Marked, source: Marked | None) -> dict[str, Any]:
        if source is not None:
            raise lost(self.notes, spec, "tokenizer and tokenizer_source exclude each other")
        check_mapping(self.notes, spec, _KEYS)
        return self._read(spec.get("source") or spec, spec)

    def _read(self, at: Marked, spec: Marked | None) -> dict[str, Any]:
        known = self._known(at)
        target = None if at is spec else self._target(at)
        rules = RowRules(self.family, known, self._tokens(at, target))
        tokens = self._of_tokens(at, spec, rules)
        padding = self._padding(spec, len(rules.tokens))
        self._warn(at, target, rules)
        name = "union" if target is None else rules.source_of(target)
        if self._are_same() and not (tokens or padding):
            self.notes.add(at, "exact", "all models have the same tokens")
            return {} if name in ("union", "base_model") else {"source": name}
        whose = "the tokens of all models" if target is None else f"the tokens of {target.written}"
        self.notes.add(at, "rounding", f"{whose}: rows are matched by token, as docs/tokens.md says")
        return {"source": name, **({"tokens": tokens} if tokens else {}), **padding}

    def _known(self, at: Marked) -> dict[Place, Collection[str]]:
        """Return the tokens of every checkpoint; adapters have those of the base model."""
        found: dict[Place, Collection[str]] = {}
        for reference in places_of(self.configuration).values():
            facts = self.models.facts(reference.model)
            if facts is None or not facts.tokens:
                raise lost(self.notes, at, "the tokens of the models could not be read")
            if max(facts.tokens.values()) >= min(_by_token(facts).values(), default=len(facts.tokens)):
                why = f"{reference.model.path} has tokens without a row, on which mergekit fails"
                raise lost(self.notes, at, why)
            found[reference.model.plain] = facts.tokens
        return found | self._of_adapters(at, found)

    def _of_adapters(
        self, at: Marked, found: Mapping[Place, Collection[str]]
    ) -> dict[Place, Collection[str]]:
        """Return the tokens of the base model for every adapter."""
        every = [one.lora for one in places_of(self.configuration).values() if one.lora is not None]
        for lora in every:
            own, tokens = self.models.facts(lora), found.get(self.family.base.plain, ())
            if own is not None and own.tokens and {*own.tokens} != {*tokens}:
                raise lost(self.notes, at, f"the adapter {lora.path} has a tokenizer of its own")
        return dict.fromkeys((lora.plain for lora in every), found.get(self.family.base.plain, ()))

    def _target(self, at: Marked) -> Reference | None:
        """Return the model whose tokenizer counts; None for the tokens of all."""
        if at.value == "union":
            return None
        base = self.configuration.base
        if at.value == "base":
            if base is None:
                raise lost(self.notes, at, "there is no base_model, and mergekit takes any of the models")
            return base
        found = read_reference(at)
        if isinstance(found, str) or found.written not in places_of(self.configuration):
            raise lost(self.notes, at, _SOURCES)
        return found

    def _tokens(self, at: Marked, target: Reference | None) -> list[str]:
        """Return the tokens of the output."""
        first = target.model if target else self.family.base
        facts = self.models.facts(first)
        assert facts is not None
        if sorted(facts.tokens.values()) != list(range(len(facts.tokens))):
            why = f"{first.path} has rows of no token between those of tokens, on which mergekit fails"
            raise lost(self.notes, at, why)
        every = self._every() if target is None else []
        return [*dict.fromkeys(token for one in (facts, *every) for token in one.tokens)]

    def _every(self) -> list[ModelFacts]:
        """Return what is known of all models."""
        every = (self.models.facts(one.model) for one in places_of(self.configuration).values())
        return [facts for facts in every if facts is not None]

    def _are_same(self) -> bool:
        """Say whether all models have the same tokens in the same rows, and no others."""
        first, *others = self._every()
        rows = {count for one in (first, *others) for count in _by_token(one).values()}
        return rows <= {len(first.tokens)} and all(one.tokens == first.tokens for one in others)

    def _of_tokens(self, at: Marked, spec: Marked | None, rules: RowRules) -> dict[str, Any]:
        """Return what a recipe says of tokens: what is written, and where mergekit's rule is not its own."""
        written = spec.get("tokens") if spec else None
        chosen = RowReader(self.configuration, self.models, rules, self.notes).rows(written)
        rest = RowRules(rules.family, rules.known, [one for one in rules.tokens if one not in chosen])
        slices = self.configuration.slices
        usual = rest.choices((slices[0], slices[-1]))
        if usual is None:
            why = "several models have a token, others lack it, and no line of a recipe gives them its row"
            raise lost(self.notes, at, why)
        if len(usual) + len(chosen) > _MAX_TOKENS:
            raise lost(self.notes, at, f"{len(usual):,} tokens that the base model lacks and several have")
        if "mean" in usual.values() and self.configuration.method.ranks:
            self.notes.add(at, "warning", _CANCELLED)
        return {**usual, **chosen}

    @property
    def _trims(self) -> bool:
        """Whether a share of the elements below 1 is kept."""
        every = (
            condition.value
            for part in self.configuration.slices
            for levels in (part.levels, *(one.levels for one in part.inputs))
            for name in ("density", "select_topk")
            for setting in settings_of(levels, name)
            for condition in setting.conditions
        )
        return not all(map(is_whole, every))

    def _padding(self, spec: Marked | None, num_tokens: int) -> dict[str, int]:
        at = spec.get("pad_to_multiple_of") if spec else None
        if at is None:
            return {}
        number = None if isinstance(at.value, bool) else as_number(at.value)
        if number is None or number != int(number) or not 0 <= number <= 2**20:
            raise lost(self.notes, at, "expected a whole number above 0")
        if number == 0:
            self.notes.add(at, "exact", "nothing is padded")
            return {}
        why = "tokenizer.pad_to_multiple_of: new rows are the mean of all rows of a model"
        self.notes.add(at, "rounding", why)
        if num_tokens % number and self._trims:
            self.notes.add(at, "in expectation", _EQUAL_ROWS)
        return {"pad_to_multiple_of": int(number)}

    def _warn(self, at: Marked, target: Reference | None, rules: RowRules) -> None:
        """Warn of rows of no token, which are dropped, and of an order that changes from run to run."""
        for one in (one for part in self.configuration.slices for one in part.inputs):
            if (count := self._num_spare(one.reference)) > 0:
                self.notes.add(one.at, "warning", f"{count} rows of no token are dropped")
        if target is not None and (count := self._num_spare(target)) > 0:
            told = f"{len(rules.tokens)} rows, though {target.written} has {len(rules.tokens) + count}"
            self.notes.add(at, "warning", f"{told}: those of no token are dropped")
        if target is None and len(rules.tokens) > len(rules.known[self.family.base.plain]):
            why = "the order in which mergekit numbers added tokens may change from run to run"
            self.notes.add(at, "warning", f"{why}: compare rows by token")

    def _num_spare(self, reference: Reference) -> int:
        facts = self.models.facts(reference.model)
        return max(_by_token(facts).values(), default=0) - len(facts.tokens) if facts else 0


def _by_token(facts: ModelFacts) -> dict[str, int]:
    """Return the rows of the tensors that have one for each token."""
    return {name: rows for name, rows in facts.rows.items() if _BY_TOKEN.fullmatch(name)}
