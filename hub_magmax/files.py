"""Files and values on disk: digests, canonical JSON, durable writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from hub_magmax.errors import HubMagmaxError, OutputError

Value = TypeVar("Value")

#: What the name of a file ends with until all of it is on the disk.
_UNFINISHED = ".tmp"


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: If `value` holds a NaN or an infinity, which JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return `sha256:` and 64 hexadecimal digits over the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(
    text: str | bytes, kind: type[Value], refused: HubMagmaxError, apart: Sequence[str] = ()
) -> tuple[Value, list[Any]]:
    """Return a value stored as JSON, checked by its type, and what was stored under the keys `apart`.

    Raises:
        HubMagmaxError: `refused`, if the text holds anything else.
    """
    from pydantic import TypeAdapter

    try:
        values = json.loads(text)
        beside = [values.pop(key) for key in apart]
        return TypeAdapter(kind).validate_python(values), beside
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise refused from error


def read_result(path: Path, kind: type[Value], name: str, again: str, apart: Sequence[str] = ()) -> Value:
    """Return a result from a file of JSON.

    Args:
        path: The file.
        kind: Type of the result.
        name: What it is called in messages, such as "a diagnosis".
        again: How it is made again.
        apart: Keys that stand beside its own.

    Raises:
        OutputError: If the file cannot be read, or holds anything else.
    """
    refused = OutputError(f"this is not {name} of this version", where=from_here(path), hint=again)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OutputError(
            f"cannot be read ({error.strerror or type(error).__name__})",
            where=from_here(path),
            hint="Check the path and its permissions.",
        ) from error
    return read_json(text, kind, refused, apart)[0]


def json_text(values: Any) -> str:
    """Return the text of a file of JSON that people read too."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, values: Any) -> Path:
    """Write values as `json_text` in one step, as `write_text`, and return the path."""
    write_text(path, json_text(values))
    return path


def from_here(path: Path) -> str:
    """Return a path as it is named from the current folder: below it relative, elsewhere absolute."""
    path = path.absolute()
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def own_command() -> str:
    """Return how this program is typed in a shell here: by its name, or its path where PATH lacks it."""
    name = "hub-magmax"
    if shutil.which(name):
        return name
    python = Path(sys.executable)
    script = python.with_name(name)
    if script.is_file():
        return shlex.quote(from_here(script))
    return f"{shlex.quote(from_here(python))} -m hub_magmax"


def user_cache(name: str, variable: str) -> Path | None:
    """Return the path that a variable names, or `hub_magmax/NAME` in the user's cache; None for none."""
    named = os.environ.get(variable)
    if named is not None:
        return Path(named) if named else None
    with contextlib.suppress(RuntimeError):  # no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hub_magmax", name)
    return None


def named_after(path: str, ending: str) -> str:
    """Return the path of another folder beside a folder: `merged-winner` for `merged/`."""
    return f"{os.path.normpath(path)}-{ending}"


def existing_parent(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists; the path itself where there is none."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


#: Errors of a full disk, an exhausted quota, a file size limit.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(files: Iterable[Path], folder: Path) -> str:
    """Return one sha256 over names below `folder` and contents of files; dangling links are left out."""
    hasher = hashlib.sha256()
    for path in sorted(files):
        if path.is_file():
            hasher.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return hasher.hexdigest()


@contextlib.contextmanager
def os_errors(where: Path, hint: str = "") -> Iterator[None]:
    """Turn an error of the file system while writing into an OutputError.

    Args:
        where: What is written.
        hint: What to do, where more is known than that the path or its permissions are wrong.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror or type(error).__name__})",
            where=str(where),
            hint="Free some space or choose another output.path; finished shards are kept, "
            "and the same command goes on from there."
            if error.errno in _NO_ROOM
            else hint or "Check the path and its permissions, or choose another one.",
        ) from error


def check_files(paths: Iterable[Path], hint: str = "") -> None:
    """Raise OutputError where one of these files could not be written; called before the work for them.

    Args:
        paths: Files that are there and will be replaced, or are not there.
        hint: What to do where their folder cannot be written.
    """
    paths = tuple(paths)
    for folder in dict.fromkeys(path.parent for path in paths):
        check_folder(folder, hint)
    for path in paths:
        _refuse_folder(path)


def check_folder(folder: Path, hint: str = "") -> None:
    """Raise OutputError where no file can be made in a folder, by making one that has no name."""
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise OutputError(what, where=str(folder), hint="Name a folder, or make this one.")
    with os_errors(folder, hint), tempfile.TemporaryFile(dir=folder):
        pass


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise OutputError(
            "this is a folder, not a file",
            where=str(path),
            hint="Name a file in it, or move the folder away.",
        )


def claim(file: IO[Any], refused: HubMagmaxError) -> None:
    """Raise `refused` if another process has claimed an open file; a process that ends lets go of it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise refused from None
    except OSError:  # a file system without locks
        return


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text as UTF-8, and have the disk hold it.

    Raises:
        OSError: If it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(path.name + _UNFINISHED)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def killed_writes(folder: Path) -> list[Path]:
    """Return what `write_durably` left beside files of a folder when it was killed before its last step."""
    found = sorted(folder.glob(f"*{_UNFINISHED}"))
    return [path for path in found if path.is_file() and path.with_suffix("").is_file()]


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new one.

    Raises:
        OutputError: If it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, as `write_text`."""
    _refuse_folder(path)
    with os_errors(path):
        write_durably(path, content)


def read_fully(descriptor: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from a file's byte `start` on; return the bytes read, fewer only at its end."""
    done = 0
    while done < len(buffer):  # one call moves at most 2 GiB
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            break
        done += count
    return done
