"""The output's config.json: a source's own, with the values that describe the output's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hub_magmax.checkpoints.config import with_values
from hub_magmax.files import os_errors
from hub_magmax.planning.plan import ConfigChange


def change_config(path: Path, changes: Sequence[ConfigChange]) -> None:
    """Carry out the changes in a copied config.json; without changes nothing is read or written."""
    if changes:
        with os_errors(path):
            path.write_bytes(with_changes(path.read_bytes(), changes))


def with_changes(content: bytes, changes: Sequence[ConfigChange]) -> bytes:
    """Return a config.json with some values changed, and its order of keys, indentation and end kept."""
    return with_values(content, {change.path: change.new for change in changes})
