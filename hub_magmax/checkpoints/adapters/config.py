"""`adapter_config.json`: rank and scale of a LoRA adapter's layers, and adapters that are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError
from hub_magmax.text import shown

_MAX_CONFIG_BYTES = 1_000_000

#: Steps for adapters that PEFT does not merge.
_TRAIN_AGAIN = "PEFT does not merge it into weights either: train a LoRA without it."
_NO_WEIGHTS = "It adds to the input of layers, and no weights do what it does: train a LoRA instead."
_WITH_BIAS = "PEFT merges it where layers have a bias of their own. "
_RESIZED = "If tokens were added before training, call resize_token_embeddings on the base model first. "
_BEFORE_MERGING = (_WITH_BIAS, _RESIZED)
_CONVERT = (
    "Its start is drawn at random, so only the model in training can be converted, by PEFT: "
    "model.save_pretrained('OUT', path_initial_model_for_weight_conversion='INITIAL'), where INITIAL is the "
    "adapter as it was before training."
)

#: Keys of adapters that are more than products of two matrices, their names in messages, and what to do where
#: PEFT does not merge them.
_REFUSED = (
    ("use_dora", "DoRA, which rescales every row", ""),
    ("lora_bias", "a bias inside the adapter", _WITH_BIAS),
    ("layer_replication", "replicated layers", _TRAIN_AGAIN),
    ("trainable_token_indices", "single trained tokens", _RESIZED),
    ("target_parameters", "parameters outside of layers", ""),
    ("use_qalora", "QA-LoRA", ""),
    ("alora_invocation_tokens", "an activated LoRA", _TRAIN_AGAIN),
    ("megatron_config", "Megatron's parallel layers", ""),
)

#: Types of adapters without weights to merge.
_WITHOUT_WEIGHTS = (
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
)

#: Types of adapters that PEFT does not merge.
_UNMERGED = ("LILY", "POLY", "XLORA")

#: Ways to start training that change the base model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: One of them that cannot be repeated.
_DRAWN = "pissa_niter"

#: Said where the class of the line that merges is a guess.
_ANY_CLASS = ", with the task's model class"

#: Classes of transformers by PEFT's types of tasks.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Size of the products, from `adapter_config.json`.

    Attributes:
        rank, alpha: For all layers that no pattern names.
        ranks, alphas: By pattern, for layers with names that end in it.
        rslora: Whether the scale is alpha / √rank.
        transposed: Whether base weights are stored as (inputs, outputs).
        model_class: Class of transformers that it was trained with, or empty.
        ensures_ties: Whether what is tied in the base model was trained as one parameter.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    transposed: bool
    model_class: str = ""
    ensures_ties: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a layer."""
        return self.ranks.get(_pattern(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of a layer's product."""
        alpha, rank = self.alphas.get(_pattern(self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that the whole end of a layer's name matches."""
    return next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), "")


def parse_config(content: bytes, label: str) -> AdapterConfig:
    """Return the sizes that a configuration states.

    Raises:
        CheckpointError: If it is malformed, or of an adapter that is more than a product of two matrices.
    """
    where = f"{label}, {ADAPTER_CONFIG_NAME}"
    try:
        values = json.loads(content)
        _refuse(values, where)
        found = AdapterConfig(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            ranks={str(key): int(rank) for key, rank in (values.get("rank_pattern") or {}).items()},
            alphas={str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            rslora=bool(values.get("use_rslora")),
            transposed=bool(values.get("fan_in_fan_out")),
            model_class=_model_class(values),
            ensures_ties=bool(values.get("ensure_weight_tying")),
        )
        for pattern in (*found.ranks, *found.alphas):
            re.compile(pattern)
        valid = min(found.rank, *found.ranks.values(), 1) >= 1 and all(
            math.isfinite(alpha) for alpha in (found.alpha, *found.alphas.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise CheckpointError(
            f"not a LoRA configuration ({type(error).__name__}: {str(error)[:100]})",
            where=where,
            hint="Save the adapter again with PEFT's `save_pretrained`.",
        ) from error
    if not valid:
        raise CheckpointError("a rank below 1, or an alpha that is no finite number", where=where)
    return found


def _refuse(values: Mapping[str, Any], where: str) -> None:
    found = [*_refused(values)]
    if not found:
        return
    merged = materialise("Merge it into its base model first", _model_class(values))
    steps = [step for _, step in found if step]
    instead = [step for step in steps if step not in _BEFORE_MERGING]
    raise CheckpointError(
        f"this adapter has {' and '.join(what for what, _ in found)}",
        where=where,
        expected="LoRA, with or without rslora, patterns and modules_to_save",
        hint=instead[0] if instead else "".join(steps) + merged,
    )


def _refused(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what an adapter is beyond products, and what to do if not to merge it with PEFT."""
    kind, start = str(values.get("peft_type", "LORA")), values.get("init_lora_weights")
    if kind != "LORA":
        step = _NO_WEIGHTS if kind in _WITHOUT_WEIGHTS else _TRAIN_AGAIN if kind in _UNMERGED else ""
        yield f"an adapter of type {shown(kind)}", step
    yield from ((what, step) for key, what, step in _REFUSED if values.get(key))
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        what = f"a start by {shown(start)}, which changes the base model's weights too"
        yield what, _CONVERT if start.lower().startswith(_DRAWN) else ""


def _model_class(values: Mapping[str, Any]) -> str:
    """Return the class of transformers that an adapter was trained with, or an empty text."""
    mapping = values.get("auto_mapping")
    if isinstance(mapping, Mapping) and str(mapping.get("parent_library")).startswith("transformers"):
        name = str(mapping.get("base_model_class"))
        return name if name.isidentifier() else ""
    return _CLASSES.get(str(values.get("task_type")), "")


def materialise(what: str, model_class: str = "") -> str:
    """Return how to make a whole checkpoint of an adapter with PEFT.

    Args:
        what: Beginning of the sentence.
        model_class: Class of transformers to load its base model with, or empty where it is not known.
    """
    return (
        f"{what}{'' if model_class else _ANY_CLASS}: "
        f'python -c "from transformers import {model_class or "AutoModelForCausalLM"} as M; '
        "from peft import PeftModel as P; "
        "P.from_pretrained(M.from_pretrained('BASE'), 'ADAPTER').merge_and_unload()"
        ".save_pretrained('OUT')\", and name OUT in the recipe."
    )


def resize_first(num_rows: int, model_class: str = "") -> str:
    """Return how to make a whole checkpoint of an adapter that was trained after tokens were added."""
    return (
        "Add the rows to its base model, and merge it into that: "
        f'python -c "from transformers import {model_class or "AutoModelForCausalLM"} as M; '
        "from peft import PeftModel as P; b = M.from_pretrained('BASE'); "
        f"b.resize_token_embeddings({num_rows}); "
        "P.from_pretrained(b, 'ADAPTER').merge_and_unload().save_pretrained('OUT')\". "
        "Copy the tokenizer with the added tokens to OUT, and name OUT in the recipe and in "
        "output.files_from, with token_rows for the embedding and the head."
    )


def config_of(adapter: TensorSource) -> bytes:
    """Return the content of an adapter's configuration.

    Raises:
        CheckpointError: If it has none, or one that is too large.
    """
    size = adapter.sizes.get(ADAPTER_CONFIG_NAME, 0)
    if not 0 < size <= _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"there is no {ADAPTER_CONFIG_NAME}" if not size else f"{size:,} bytes long",
            where=f"{adapter.label}, {ADAPTER_CONFIG_NAME}",
            expected="what PEFT's `save_pretrained` writes beside the adapter's weights",
        )
    return adapter.read_bytes(ADAPTER_CONFIG_NAME, 0, size)
