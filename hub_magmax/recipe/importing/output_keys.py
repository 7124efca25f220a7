"""Keys of a mergekit configuration that decide dtype, tokenizer and chat template of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import ModelFacts
from hub_magmax.text import shown

#: dtypes of mergekit that recipes have, and how safetensors writes them.
_DTYPES: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: dtypes that float32 holds without loss.
_IN_FLOAT32 = frozenset(("F32", "F16", "BF16"))


@dataclass(frozen=True)
class OutputReader:
    """Reads these keys.

    Attributes:
        configuration: What was read.
        facts: Of the models that are merged, by spelling, as far as they are known.
        notes: Where verdicts go.
        is_copy: Whether values are copied and not computed.
    """

    configuration: Configuration
    facts: Mapping[str, ModelFacts]
    notes: Notes
    is_copy: bool = False

    def output(self, base_dtypes: Iterable[str] = ()) -> dict[str, Any]:
        """Return keys of a recipe's `output`.

        Args:
            base_dtypes: Of the base model that the recipe names, which the output has by default.
        """
        top = self.configuration.top
        found: dict[str, Any] = {}
        for key in ("dtype", "out_dtype"):
            at = top.get(key)
            dtype = self._dtype(at) if at else None
            if at and dtype:
                found["dtype"] = dtype
                self._judge_dtype(key, at, dtype)
        if not found and (promoted := self._promoted(set(base_dtypes))):
            found["dtype"] = promoted
        self._chat_template(top.get("chat_template"))
        return found

    def _dtype(self, at: Marked) -> str | None:
        dtype = str(at.plain()).removeprefix("torch.")
        if dtype in _DTYPES:
            return dtype
        self.notes.lose(
            at, f"{shown(at.plain(), 40)} is no dtype of an output here: {', '.join(_DTYPES)} are"
        )
        return None

    def _judge_dtype(self, key: str, at: Marked, dtype: str) -> None:
        inputs = {dtype for facts in self.facts.values() for dtype in facts.dtypes.values()}
        if key == "dtype" and self.configuration.top.get("out_dtype"):
            is_exact = dtype == "float32" and bool(inputs) and inputs <= _IN_FLOAT32
            why = "sums are formed in float32 or wider, and out_dtype says what is stored"
            self.notes.add(at, "exact" if is_exact else "rounding", why)
        elif inputs == {_DTYPES[dtype]} or (
            key == "dtype" and dtype == "float32" and inputs and inputs <= _IN_FLOAT32
        ):
            self.notes.add(at, "exact", "output.dtype; the models hold it, or what widens to it without loss")
        elif self.is_copy:
            self.notes.add(at, "exact", "output.dtype: each element is rounded once")
        else:
            how = "mergekit rounds the models and what it sums to it; here sums are in float32 or wider"
            why = f"output.dtype; {how}, rounded once" if key == "dtype" else "output.dtype, rounded once"
            self.notes.add(at, "rounding", why)

    def _promoted(self, base: set[str]) -> str | None:
        """Return the dtype of the inputs together, where the base model's, which counts here, is another."""
        inputs = {dtype for facts in self.facts.values() for dtype in facts.dtypes.values()}
        inputs &= set(_DTYPES.values())
        if len(inputs) < 2 or inputs == base:
            return None
        return "float64" if "F64" in inputs else "float32"

    def _chat_template(self, at: Marked | None) -> None:
        if at is not None:
            why = "no weights: set it in the tokenizer of the merged folder"
            self.notes.add(at, "warning", why)


def tokenizer_of(configuration: Configuration, facts: Sequence[ModelFacts | None], notes: Notes) -> None:
    """Note what `tokenizer_source` and `tokenizer` become."""
    top = configuration.top
    source, spec = top.get("tokenizer_source"), top.get("tokenizer")
    if spec is not None:
        for at in [spec] if spec.entries is None else spec.entries.values():
            notes.lose(at, "rows of single tokens, unions and padding are not chosen here")
    if source is None:
        return
    same = bool(facts) and None not in facts and len({tuple(f.tokens.items()) for f in facts if f}) == 1
    if same and (source.value == "base"):
        notes.add(source, "exact", "all models have the same tokens; the base model's files are copied")
    else:
        notes.lose(source, "rows of other vocabularies than the base model's are not put together yet")
