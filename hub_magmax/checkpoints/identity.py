"""Identity of a checkpoint: what is another value after any change of a file that loaders read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.checkpoints.needed_files import loaded_files
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.files import sha256_of
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.text import step


@step("reading a checkpoint, for its sha256")
def identity_of(locked: LockedSource, folder: Path) -> list[Any] | None:
    """Return plain values that tell a checkpoint's content from every other.

    They are its commit, or where it has none the sha256 of every file that loaders read, in sub-folders too.
    All are read whole: a lock does not see weights that changed under the same header.

    Args:
        locked: The pinned checkpoint.
        folder: Where relative paths start.

    Returns:
        None where neither is there.

    Raises:
        OSError: If a file cannot be read.
        HubMagmaxError: If a folder cannot be listed.
    """
    if locked.commit:
        return [locked.kind, locked.repo_id or locked.reference, locked.commit, locked.part]
    part = location_of(locked, folder).model_place.part
    hashes = [[[path, sha256_of(one / path)] for path in paths] for one, paths in _files(locked, folder)]
    return [part, hashes] if hashes else None


def state_of(locked: LockedSource, folder: Path) -> list[Any]:
    """Return name, size, inode and times of the files that `identity_of` reads; a commit needs none.

    It takes no time, and any change shows in it. Arguments and errors are those of `identity_of`.
    """
    if locked.commit:
        return []
    return [[path, *_state(one / path)] for one, paths in _files(locked, folder) for path in paths]


def folder_state(folder: Path) -> list[Any]:
    """Return the same of the files of a folder that loaders read.

    Raises:
        OSError: If a file is not there any more.
        HubMagmaxError: If the folder cannot be listed.
    """
    return [[path, *_state(folder / path)] for path in _loaded_in(folder)]


def _files(locked: LockedSource, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders of a checkpoint, the whole and the part, with the files there that loaders read."""
    place = location_of(locked, folder).model_place
    whole = Path(place.name)
    for one in dict.fromkeys((whole, whole / str(place.options.get("subfolder", "")))):
        if one.is_dir():
            weights = {file.path for file in locked.files if (one / file.path).is_file()}
            yield one, sorted(weights.union(_loaded_in(one)))


def _loaded_in(folder: Path) -> tuple[str, ...]:
    # Whether links may lead out of the folder was decided when it was locked.
    with closing(LocalSource(folder, trusted_links=(Path(folder.anchor),))) as source:
        return loaded_files(source)


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
