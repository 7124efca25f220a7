"""Names of models in recipes: kinds of locations, repositories and revisions on the Hub, paths of folders."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

from hub_magmax.registry import LOCATIONS
from hub_magmax.text import nearest_of, shown

#: A part of a repository's name: of an organisation or user, or of the repository itself.
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")

_NOT_IN_REVISIONS = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")

#: Longer names are refused by the Hub's storage.
_MAX_REVISION_LENGTH = 250


def repository_problem(name: str) -> str:
    """Return why a text cannot be a repository's id (`org/model`), as a clause; empty where it can."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(map(_PART.fullmatch, parts)):
        return (
            f"{shown(name)} is no repository id: org/model, each of up to 96 letters, digits, -, _ and ., "
            "with none of - and . first or last"
        )
    if "--" in name or ".." in name or name.endswith(".git"):
        return f"{shown(name)} is no repository id: the Hub takes no --, no .. and no .git at the end"
    return ""


def revision_problem(name: str) -> str:
    """Return why a text cannot be a branch, tag, commit or pull request, as a clause; empty where it can."""
    parts = name.split("/")
    odd = any(part.startswith((".", "-")) or part.endswith((".", ".lock")) or not part for part in parts)
    if odd or name == "@" or len(name) > _MAX_REVISION_LENGTH or _NOT_IN_REVISIONS.search(name):
        rules = r"has no spaces, none of ~^:?*[\ and no .., and begins and ends with a letter, digit or _"
        return f"{shown(name)} is no revision: a branch, tag, commit or refs/pr/N {rules}"
    return ""


#: Entries of a folder that are compared with a name.
_MAX_COMPARED = 1000

#: How a repository is written, for messages about folders that are not there.
REPOSITORY_NAMES = "a repository is written org/model, org/model@revision or hf://org/model"


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


def missing_folder(written: str, folder: Path) -> str:
    """Return what to do about a folder that is not there; empty for a name that is like any on the Hub.

    A folder is meant by a path that cannot be a repository's name, by one in a folder that is there, and by
    one whose parts are nearly those of a folder that is there.

    Args:
        written: Name of a model or of data.
        folder: Where relative paths start.
    """
    if "://" in written or not written.isprintable():
        return ""
    near = near_folder(written, folder)
    is_path = written.startswith((".", "/", "~")) or written.endswith("/") or written.count("/") > 1
    if not (near or is_path or ("/" in written and is_folder((folder / expanded(written)).parent))):
        return ""
    return f"{f'Did you mean {near}? ' if near else ''}{REPOSITORY_NAMES[0].upper()}{REPOSITORY_NAMES[1:]}."


def way_to_folder(written: str, folder: Path) -> str:
    """Return a hint about a name that is none of a repository, and so is meant for a folder."""
    near = near_folder(written, folder) if written.isprintable() and "://" not in written else ""
    if near:
        return f"Did you mean {near}?"
    if "\\" in written:
        return "Folders are written with / between their names, relative to the recipe's own."
    if written.startswith((".", "/", "~")):
        return "Check the path."
    hint = "Relative folders start at the recipe's own folder; start them with ./"
    return hint + (f" : ./{written}" if written.isprintable() and len(written) <= 200 else "")


def near_folder(written: str, folder: Path) -> str:
    """Return the folder that a misspelt path may mean, as it would be written; empty where none is near."""
    path = expanded(written.partition("@")[0])
    if not path.parts:
        return ""
    found = folder / path.anchor if path.anchor else folder
    for part in path.parts[1 if path.anchor else 0 :]:
        exists = part == ".." or is_folder(found / part)
        name = part if exists else nearest_of(part, _names_in(found))
        if not name:
            return ""
        found = found / name
    shown = os.path.relpath(found, folder) if not path.anchor else str(found)
    return shown if shown.startswith((".", "/")) else f"./{shown}"


def near_sibling(written: str, path: Path, *, files: bool = False) -> str:
    """Return the question whether a folder beside a missing one is meant; empty where none is near.

    Args:
        written: Name of the missing one.
        path: Where it would be.
        files: Files may be meant too.
    """
    name = nearest_of(path.name, _names_in(path.parent, files=files))
    start, slash, _ = written.rstrip("/").rpartition("/")
    return f"Did you mean {start}{slash}{name}?" if name else ""


def _names_in(folder: Path, *, files: bool = False) -> list[str]:
    try:
        with os.scandir(folder) as found:
            names = (one.name for one in found if one.name[0] != "." and (files or one.is_dir()))
            return sorted(islice(names, _MAX_COMPARED))
    except OSError:
        return []


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
