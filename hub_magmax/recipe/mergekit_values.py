"""Values of mergekit's recipes: numbers, names of models with their adapters, keys of an entry."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any


def finite(value: Any) -> float | None:
    """Return a number, None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def short(value: float) -> float:
    """Return a number as a person would write it, where nothing is lost that counts."""
    return float(f"{value:.12g}")


def reference_of(written: Any) -> str | None:
    """Return the name of a model, with its adapter after a plus sign; None where it is none."""
    if isinstance(written, dict):
        model, lora = (_path(written.get(key)) for key in ("model", "lora"))
        if not model or (written.get("lora") and not lora):
            return None
        return f"{model}+{lora}" if lora else model
    return written if isinstance(written, str) and written else None


def _path(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("path"), str):
        return None
    return f"{part['path']}@{part['revision']}" if part.get("revision") else part["path"]


def task_model(name: str, base: str) -> str | None:
    """Return the checkpoint of a model's name: of one with an adapter on the base model, the adapter."""
    model, plus, adapter = name.partition("+")
    if not plus:
        return name
    return adapter if model == base else None


def task_names(models: list[str]) -> list[str]:
    """Return a name for every task, from the ends of their models' names."""
    found: list[str] = []
    for model in models:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", model.partition("@")[0].rstrip("/").rpartition("/")[2])
        stem = stem.strip("-._")[:58] or "task"
        taken = found.count(stem)
        found.append(stem if not taken and stem != "base_model" else f"{stem}-{len(found) + 1}")
    return found


def keys_of(entry: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the keys of a model and of its parameters with their values."""
    if not isinstance(entry, dict):
        return
    yield from (((key,), value) for key, value in entry.items() if key not in ("model", "parameters"))
    parameters = entry.get("parameters")
    if isinstance(parameters, dict):
        yield from ((("parameters", key), value) for key, value in parameters.items())
