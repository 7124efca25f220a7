"""Stored results of the merges of a language model's adapters."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_magmax.files import write_text

Result = dict[str, Any]


def kept(results: Path, conditions: Mapping[str, Any]) -> Result:
    """Return the stored results, or empty ones under the conditions.

    Args:
        results: File of the results.
        conditions: Settings, sources and versions of the rows to come.

    Raises:
        SystemExit: If the stored rows were measured under other conditions.
    """
    if not results.is_file():
        return {"seeds": {}, "training_seconds": {}, **conditions}
    stored: Result = json.loads(results.read_text())
    for name, value in conditions.items():
        if stored[name] != value:
            raise SystemExit(
                f"the rows of {results} were measured with the {name} {stored[name]}, now they are {value}: "
                "measure with the former, or move the file and the adapters away to start anew"
            )
    return stored


def keep(results: Path, stored: Result) -> None:
    """Write JSON with one line for each model."""
    write_text(results, re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(stored, indent=1)) + "\n")


@contextmanager
def training_time(results: Path, stored: Result, seed: str) -> Iterator[None]:
    """Add the processor time inside to a seed's training, also if an error or Ctrl+C ends it.

    The time of a process that is killed is lost.
    """
    begun, seconds = time.process_time(), stored["training_seconds"]
    try:
        yield
    finally:
        seconds[seed] = round(seconds.get(seed, 0.0) + time.process_time() - begun, 1)
        keep(results, stored)
