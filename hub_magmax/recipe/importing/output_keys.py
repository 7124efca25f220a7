"""Keys of a mergekit configuration that decide dtype, tokenizer and chat template of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.configuration import Configuration, places_of
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.model_facts import ModelFacts, Models
from hub_magmax.text import shown

#: dtypes of mergekit that recipes have, and how safetensors writes them.
_DTYPES: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: Chat templates that mergekit has, and one that it takes from the models.
_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")

#: Of any other name.
_NO_TEMPLATE = (
    f"neither a template's text nor one of {', '.join(_TEMPLATES)}: mergekit writes no tokenizer then, or, "
    "where a tokenizer is set, fails after the weights"
)

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
                found["dtype"] = self._stored(key, at, dtype)
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

    def _stored(self, key: str, at: Marked, dtype: str) -> str:
        """Return the dtype that mergekit writes, and note what the key does."""
        if not self._is_widened(dtype):
            self._judge_dtype(key, at, dtype)
            return dtype
        why = f"{self.configuration.method_name} of mergekit writes float32 where there is no out_dtype"
        self.notes.add(at, "warning", f"{why}: only the models are rounded to {dtype}")
        self.notes.add(at, "rounding", "output.dtype: float32, from models that are not rounded here")
        return "float32"

    def _judge_dtype(self, key: str, at: Marked, dtype: str) -> None:
        widens = (key, dtype) == ("dtype", "float32") and set() < self._inputs <= _IN_FLOAT32
        if key == "dtype" and self.configuration.top.get("out_dtype"):
            why = "sums are formed in float32 or wider, and out_dtype says what is stored"
            if dtype in ("float16", "bfloat16"):
                why += (
                    f"; mergekit rounds models and sums to {dtype} before, so that a step is one of {dtype}"
                )
            self.notes.add(at, "exact" if widens else "rounding", why)
        elif widens or self._inputs == {_DTYPES[dtype]}:
            self.notes.add(at, "exact", "output.dtype; the models hold it, or what widens to it without loss")
        elif self.is_copy:
            self.notes.add(at, "exact", "output.dtype: each element is rounded once")
        else:
            more = "; mergekit rounds models and sums to it too" if key == "dtype" else ""
            self.notes.add(at, "rounding", f"output.dtype: float32 or wider is rounded once{more}")

    def _is_widened(self, dtype: str) -> bool:
        """Say whether mergekit multiplies by masks in float32, and leaves the product in that."""
        is_half = dtype in ("float16", "bfloat16") and not self.configuration.top.get("out_dtype")
        return is_half and self.configuration.method_name in ("arcee_fusion", "ramplus_tl")

    @property
    def _inputs(self) -> set[str]:
        """The dtypes of the models, as far as they are known."""
        return {dtype for facts in self.facts.values() for dtype in facts.dtypes.values()}

    def _promoted(self, base: set[str]) -> str | None:
        """Return the dtype of the inputs together, where the base model's, which counts here, is another."""
        inputs = self._inputs & set(_DTYPES.values())
        name = next((name for name, dtype in _DTYPES.items() if inputs == {dtype}), "")
        if self._is_widened(name):
            return "float32"
        if not inputs or inputs == base:
            return None
        if name:
            return name
        return "float64" if "F64" in inputs else "float32"

    def _chat_template(self, at: Marked | None) -> None:
        if at is not None and not isinstance(at.value, str):
            self.notes.lose(at, "expected the name or the text of a template")
        elif at is not None:
            is_known = at.value in _TEMPLATES or (len(at.value) >= 20 and "{" in at.value)
            why = "no weights: set it in the tokenizer of the merged folder"
            self.notes.add(at, "warning", why if is_known else _NO_TEMPLATE)


#: Methods that mergekit computes in float32, whatever the models hold.
_IN_FULL = ("linear", "slerp")


def working_dtype(configuration: Configuration, models: Models) -> str:
    """Return the dtype in which mergekit computes, as safetensors writes it."""
    at = configuration.top.get("dtype")
    if at is not None:
        return _DTYPES.get(str(at.plain()).removeprefix("torch."), "F32")
    facts = [models.facts(reference.model) for reference in places_of(configuration).values()]
    inputs = {dtype for one in facts if one is not None for dtype in one.dtypes.values()} & {
        *_DTYPES.values()
    }
    is_half = len(inputs) == 1 and configuration.method_name not in _IN_FULL
    return inputs.pop() if is_half else "F32"
