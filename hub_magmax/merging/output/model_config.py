"""The output's config.json: a source's own, with the values that describe the output's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_magmax.files import os_errors
from hub_magmax.planning.plan import ConfigChange


def change_config(path: Path, changes: Sequence[ConfigChange]) -> None:
    """Carry out the changes in a copied config.json; without changes nothing is read or written."""
    if changes:
        with os_errors(path):
            path.write_bytes(with_changes(path.read_bytes(), changes))


def with_changes(content: bytes, changes: Sequence[ConfigChange]) -> bytes:
    """Return a config.json with some values changed, and its order of keys, indentation and end kept."""
    text = content.decode("utf-8")
    values = json.loads(text)
    for change in changes:
        *above, key = change.path
        level: Any = values
        for name in above:
            level = level[name]
        level[key] = change.new
    indented = re.match(r"\s*\{\s*?\n([ \t]+)", text)
    written = json.dumps(values, indent=indented[1] if indented else None, ensure_ascii=content.isascii())
    return (written + text[len(text.rstrip()) :]).encode("utf-8")
