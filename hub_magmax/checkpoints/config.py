"""Facts from a checkpoint's config.json: architecture and quantisation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from hub_magmax.checkpoints.headers import DAMAGED, json_problem
from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, CheckpointIndex
from hub_magmax.errors import CheckpointError
from hub_magmax.text import shown

#: Formats of quantised weights: pattern of a tensor name, name of the tensor that it belongs to, and the
#: dtypes of the latter. A name alone is no proof: models have parameters called `scales`.
_QUANTISED: tuple[tuple[str, re.Pattern[str], str, tuple[str, ...]], ...] = (
    ("GPTQ or AWQ", re.compile(r"(.*\.)qweight"), r"\1qweight", ("I32", "I16", "U8", "I8")),
    (
        "bitsandbytes",
        re.compile(r"(.*)\.(nested_)?(absmax|quant_map|quant_state\..*)"),
        r"\1",
        ("U8", "I8", "BF16", "F16", "F32"),  # 4-bit values may be stored as any of them
    ),
    ("bitsandbytes", re.compile(r"(.*\.)SCB"), r"\1weight", ("I8",)),
    (
        "8-bit with scales",
        re.compile(r"(.*\.)weight_scale(_inv)?"),
        r"\1weight",
        ("F8_E4M3", "F8_E5M2", "I8", "U8"),
    ),
    ("compressed-tensors", re.compile(r"(.*\.)weight_packed"), r"\1weight_packed", ("I32", "U8", "I8")),
    ("MXFP4", re.compile(r"(.*)_blocks"), r"\1_scales", ("U8", "F8_E8M0")),
)


def refuse_quantised(index: CheckpointIndex, config: bytes | None) -> None:
    """Raise CheckpointError if the weights are quantised: their numbers are codes, not weights.

    Args:
        index: Gives the names and dtypes of its tensors.
        config: Content of `config.json`, or None.
    """
    said = _quantisation_in(config, index.label)
    found = next(_quantised_tensors(index), None)
    if found is not None:
        kind, tensor = found
        raise CheckpointError(
            f"the checkpoint is quantised ({said or kind}; it holds {shown(tensor)})",
            where=index.label,
            expected=f"weights in full, as {', '.join(MERGEABLE_DTYPES)}",
            hint="Merge the checkpoints from before quantisation, and quantise the merged model. Where only "
            "this one is left, transformers can write some formats out in full: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('IN').dequantize().save_pretrained('OUT')\", with the task's model class.",
        )
    if said is not None:
        raise CheckpointError(
            f"config.json says that the weights are quantised ({said}), and they do not look like it",
            where=index.label,
            expected="a configuration that fits the weights, since the merged model gets a copy of it",
            hint="If the weights are plain numbers, remove `quantization_config` from config.json.",
        )


def _quantisation_in(config: bytes | None, label: str) -> str | None:
    """Return the kind of quantisation that a configuration names, or None."""
    stated = config_values(config, label).get("quantization_config")
    if not stated:
        return None
    kind = stated.get("quant_method") if isinstance(stated, dict) else None
    return shown(kind).strip("'") if isinstance(kind, str) else "of a kind it does not name"


def config_values(config: bytes | None, label: str) -> dict[str, Any]:
    """Return the values of a configuration; none if there is no configuration, or it is no mapping."""
    if config is None:
        return {}
    try:
        values = json.loads(config.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not readable as JSON ({json_problem(error)})",
            where=f"{label}, config.json",
            hint=DAMAGED,
        ) from error
    return values if isinstance(values, dict) else {}


def stated_architecture(config: bytes | None, label: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the `model_type` and the `architectures` of a configuration, without values that are no names.

    Args:
        config: Content of `config.json`, or None.
        label: Name of the checkpoint in messages.

    Raises:
        CheckpointError: If `config` is not JSON.
    """
    values = config_values(config, label)
    model_type, classes = values.get("model_type"), values.get("architectures")
    names = classes if isinstance(classes, list) else []
    return model_type if _is_name(model_type) else None, tuple(name for name in names if _is_name(name))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value, re.ASCII) is not None


def _quantised_tensors(index: CheckpointIndex) -> Iterator[tuple[str, str]]:
    for name in index.tensors:
        for kind, mark, values, dtypes in _QUANTISED:
            if match := mark.fullmatch(name):
                tensor = index.tensors.get(match.expand(values))
                if tensor is not None and tensor.dtype in dtypes:
                    yield kind, name
