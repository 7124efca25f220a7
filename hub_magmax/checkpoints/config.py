"""Values of a checkpoint's config.json, and of the configurations nested in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from hub_magmax.checkpoints.headers import DAMAGED, parse_json
from hub_magmax.errors import CheckpointError

CONFIG_NAME = "config.json"

#: Bytes that are read of a configuration; the largest known are some hundred kilobytes.
MAX_CONFIG_BYTES = 10_000_000

#: Keys with a value for each label, which is no configuration.
LABELS = ("id2label", "label2id")

#: Keys that lead to a value.
Path = tuple[str, ...]


class Files(Protocol):
    """Files of a checkpoint: a source, or its listing."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def read_bytes(self, path: str, start: int, stop: int, /) -> bytes: ...


def read_config(files: Files) -> bytes | None:
    """Return the content of config.json, cut off where it is longer than any; None where there is none."""
    if CONFIG_NAME not in files.sizes:
        return None
    size = min(files.sizes[CONFIG_NAME], MAX_CONFIG_BYTES)
    return files.read_bytes(CONFIG_NAME, 0, size) if size else b""


def stated_config(files: Files) -> dict[str, Any]:
    """Return the values of config.json; none where it is not there, no JSON or no mapping."""
    return values_of(read_config(files))


def values_of(config: bytes | None) -> dict[str, Any]:
    """Return the values of a configuration; none where it is not there, no JSON or no mapping."""
    with suppress(ValueError, RecursionError):
        values = json.loads(b"{}" if config is None else config)
        return values if isinstance(values, dict) else {}
    return {}


def config_values(config: bytes | None, label: str) -> dict[str, Any]:
    """Return the same, for a configuration that is read the first time.

    Raises:
        CheckpointError: If `config` is empty, not JSON or no mapping.
    """
    where = f"{label}, {CONFIG_NAME}"
    values = {} if config is None else parse_json(config, where)
    if not isinstance(values, dict):
        raise CheckpointError("no mapping of keys to values", where=where, hint=DAMAGED)
    return values


def stated_architecture(config: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return `model_type` and `architectures` of a configuration, without values that are no names."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    names = classes if isinstance(classes, list) else []
    return model_type if _is_name(model_type) else None, tuple(name for name in names if _is_name(name))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value, re.ASCII) is not None


def levels(config: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the configuration and those nested in it, with the keys that lead to each."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in LABELS:
            yield from levels(value, (*path, key))


def level_at(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return a nested configuration; empty where there is none."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def with_values(content: bytes, values: Mapping[Path, Any]) -> bytes:
    """Return a configuration with other values, and its order of keys, indentation and end kept."""
    text = content.decode("utf-8")
    found = json.loads(text)
    for (*above, key), value in values.items():
        level: Any = found
        for name in above:
            level = level[name]
        level[key] = value
    indented = re.match(r"\s*\{\s*?\n([ \t]+)", text)
    written = json.dumps(found, indent=indented[1] if indented else None, ensure_ascii=content.isascii())
    return (written + text[len(text.rstrip()) :]).encode("utf-8")


def counts_at(config: Mapping[str, Any], key: str) -> dict[Path, int]:
    """Return the whole numbers that a configuration and those nested in it state under a key."""
    return {path: level[key] for path, level in levels(config) if is_count(level.get(key))}


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def with_special_floats(value: Any) -> Any:
    """Return a configuration with numbers for `{"__float__": "Infinity"}`, as transformers writes these."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: with_special_floats(inner) for key, inner in value.items()}
    return [*map(with_special_floats, value)] if isinstance(value, list) else value
