"""Facts from a checkpoint's config.json."""

from __future__ import annotations

import json
import re
from typing import Any

from hub_magmax.checkpoints.headers import DAMAGED, json_problem
from hub_magmax.errors import CheckpointError

#: Bytes that are read of a configuration; the largest known are some hundred kilobytes.
MAX_CONFIG_BYTES = 10_000_000


def config_values(config: bytes | None, label: str) -> dict[str, Any]:
    """Return the values of a configuration; none if there is no configuration, or it is no mapping.

    Raises:
        CheckpointError: If `config` is not JSON.
    """
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
