"""`adapter_config.json`: rank and scale of a LoRA adapter's layers, and adapters that are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError
from hub_magmax.text import shown

_MAX_CONFIG_BYTES = 1_000_000

#: Keys of adapters that are more than products of two matrices, and their names in messages.
_REFUSED = (
    ("use_dora", "DoRA, which rescales every row"),
    ("lora_bias", "a bias inside the adapter"),
    ("layer_replication", "replicated layers"),
    ("trainable_token_indices", "single trained tokens"),
    ("target_parameters", "parameters outside of layers"),
    ("use_qalora", "QA-LoRA"),
    ("alora_invocation_tokens", "an activated LoRA"),
    ("megatron_config", "Megatron's parallel layers"),
)

#: Ways to start training that change the base model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """Size of the products, from `adapter_config.json`.

    Attributes:
        rank, alpha: For all layers that no pattern names.
        ranks, alphas: By pattern, for layers with names that end in it.
        rslora: Whether the scale is alpha / √rank.
        transposed: Whether base weights are stored as (inputs, outputs).
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    transposed: bool

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
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights")
    found = [what for key, what in _REFUSED if values.get(key)]
    if kind != "LORA":
        found.insert(0, f"an adapter of type {shown(str(kind))}")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"a start by {shown(start)}, which changes the base model's weights too")
    if found:
        raise CheckpointError(
            f"this adapter has {' and '.join(found)}",
            where=where,
            expected="LoRA, with or without rslora, patterns and modules_to_save",
            hint=materialise("Merge it into its base model first"),
        )


def materialise(what: str) -> str:
    """Return how to make a whole checkpoint of an adapter with PEFT."""
    return (
        f"{what}, with the task's model class: "
        'python -c "from transformers import AutoModelForCausalLM as M; from peft import PeftModel as P; '
        "P.from_pretrained(M.from_pretrained('BASE'), 'ADAPTER').merge_and_unload()"
        ".save_pretrained('OUT')\", and name OUT in the recipe."
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
