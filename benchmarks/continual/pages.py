"""Stored results, and the page that is written from them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hub_magmax.io.writer import write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"


def store(data: str, result: dict[str, Any], results: Path = RESULTS) -> Path:
    """Store one family's results and return where."""
    path = results / data / f"{result['family']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {_value(value)}" for key, value in result.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _value(value: Any) -> str:
    """Return JSON with one line per item of a list of mappings, so that a change shows where it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def render() -> str:
    return ""
