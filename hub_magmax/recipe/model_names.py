"""Names of models in recipes: which kind of location a name belongs to, and paths of folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hub_magmax.registry import LOCATIONS


def parse_model_name(written: str, folder: Path) -> Any:
    """Return the location (`checkpoints.locations.Location`) that `written` names.

    An existing folder wins over a repository of the same name. A name that starts with `./`, `../`, `/`
    or `~` is always a path. A name that starts with a kind of another package, and a colon, is that
    package's. All others are names on the Hub.

    Args:
        written: As a recipe has it.
        folder: Where relative paths start.

    Raises:
        RecipeError: If it is neither a folder nor a well-formed name.
    """
    scheme, colon, _ = written.partition(":")
    is_path = written.startswith(("./", "../", "/", "~")) or written in (".", "..")
    if is_path or ("://" not in written and is_folder(folder / written)):
        kind = "local"
    else:
        is_kind = colon and scheme not in ("local", "hub") and scheme in LOCATIONS.names()
        kind = scheme if is_kind else "hub"
    return LOCATIONS.get(kind).parse(written, folder)


def relative_path(written: str, folder: Path) -> str:
    """Return an absolute path (or one that starts with ~) as a path relative to `folder`.

    What is stored and published then names no folder of this machine, and a recipe means the
    same wherever its whole tree is moved. Everything else is returned as it is.
    """
    if not written.startswith(("/", "~")):
        return written
    absolute = expanded(written)
    if not absolute.is_absolute():
        return written
    path = os.path.relpath(absolute, folder.absolute())
    return path if path.startswith(".") else f"./{path}"


def expanded(written: str) -> Path:
    """Return a path with ~ replaced by the home folder, or as it is if the home folder is unknown."""
    try:
        return Path(written).expanduser()
    except RuntimeError:
        return Path(written)


def is_folder(path: Path) -> bool:
    """Say whether `path` is a folder; False if the system cannot even look, as for an overlong name."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Say whether anything is at `path`; False if the system cannot even look."""
    try:
        return path.exists()
    except OSError:
        return False
