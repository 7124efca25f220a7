"""Identity of a checkpoint: what is another value after any change of a file that loaders read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.checkpoints.side_files import is_needed
from hub_magmax.files import sha256_of
from hub_magmax.recipe.lockfile import LockedSource


def identity_of(locked: LockedSource, folder: Path) -> list[Any] | None:
    """Return plain values that tell a checkpoint's content from every other.

    They are its commit, or where it has none the sha256 of every file that loaders read, of which all are
    read whole: a lock does not see weights that changed under the same header.

    Args:
        locked: The pinned checkpoint.
        folder: Where relative paths start.

    Returns:
        None where neither is there.
    """
    if locked.commit:
        return [locked.kind, locked.repo_id or locked.reference, locked.commit, locked.part]
    place = location_of(locked, folder).model_place
    whole = Path(place.name)
    if not whole.is_dir():
        return None
    part = whole / str(place.options.get("subfolder", ""))
    return [place.part, [_hashes(one) for one in dict.fromkeys((whole, part)) if one.is_dir()]]


def is_loaded(file: str) -> bool:
    """Say whether a loader may read a file at the top of a checkpoint."""
    return file.endswith((".safetensors", ".index.json")) or is_needed(file)


def _hashes(folder: Path) -> list[list[str]]:
    paths = sorted(path for path in folder.iterdir() if is_loaded(path.name) and path.is_file())
    return [[path.name, sha256_of(path)] for path in paths]
