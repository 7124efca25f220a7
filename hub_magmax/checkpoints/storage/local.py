"""Checkpoints in folders of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

from hub_magmax.checkpoints.recognition import refuse_file
from hub_magmax.checkpoints.source import FileSource, Folder, TensorFile
from hub_magmax.checkpoints.storage.descriptors import Descriptors
from hub_magmax.checkpoints.storage.page_cache import PageCacheAdvice, is_cached
from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.files import read_fully
from hub_magmax.recipe.model_names import is_folder, is_there, near_sibling
from hub_magmax.text import listed

START_AGAIN = "Let what changes the file come to its end, then run the same command again."

#: File with which huggingface_hub marks the store of blobs that all repositories of its cache share.
_SHARED_MARKER = ".huggingface-shared-blobs"


class LocalSource(FileSource):
    """A checkpoint folder on this machine.

    Every read compares its file with the version that was opened first (device, inode, size and time
    of the last change, whether later or earlier), so all bytes belong to one version of the file, the
    one whose header was checked.

    A link is followed only if it stays inside the folder, leads below a folder that the recipe trusts, or
    from a snapshot of the Hub's cache to that cache's blobs: a repository can hold a link to any file of the
    reader's.

    Args:
        folder: Its folder.
        label: Its name in messages; the folder by default.
        weights: The file of weights, or the index, that counts if there are several.
        is_cached: Says whether a byte of a descriptor's file is in the page cache.
        trusted_links: Folders that links may lead to.

    Attributes:
        descriptors: Its open files.

    Raises:
        SourceError: If the folder is not one, or a file is a link that leads out of it.
        CheckpointError: If it is a file of weights in a format that is not read.
        CheckpointError: While reading, if a file was changed, replaced or cut since it was opened.
    """

    def __init__(
        self,
        folder: Path,
        label: str | None = None,
        weights: str = "",
        *,
        is_cached: Callable[[int, int], bool] = is_cached,
        trusted_links: tuple[Path, ...] = (),
    ) -> None:
        self._trusted_links = trusted_links
        self.folder, self.label, self.weights = folder, label or str(folder), weights
        self.descriptors = Descriptors(folder)
        self._advice = PageCacheAdvice(self.descriptors.lend, is_cached)
        if not is_folder(folder):
            if is_there(folder):
                refuse_file(self.label, folder.name)
            raise SourceError(
                "this is a file, not a folder" if is_there(folder) else "there is no such folder",
                where=self.label,
                expected="a checkpoint folder, as written by `save_pretrained`",
                hint=near_sibling(self.label, folder)
                or "Check the path; relative paths start at the recipe's own folder.",
            )

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return self.contents("").sizes

    # Complex, and flat: entries by kind.
    def contents(self, path: str) -> Folder:
        folder, start = self.folder / path, f"{path}/" if path else ""
        try:
            found = sorted(folder.iterdir())
            files = [entry for entry in found if entry.is_file()]
            folders = tuple(f"{start}{entry.name}" for entry in found if entry.is_dir())
            sizes = {f"{start}{entry.name}": entry.stat().st_size for entry in files}
            self._refuse_stray_links([*([folder] if path else []), *files])
            _refuse_lost_links(found, self.label)
        except OSError as error:
            if path and isinstance(error, FileNotFoundError | NotADirectoryError):
                return Folder({}, ())
            raise SourceError(f"cannot be listed ({error.strerror})", where=self.label) from error
        return Folder(sizes, folders)

    def size_of(self, path: str) -> int | None:
        if "/" not in path:
            return self.sizes.get(path)
        file = self.folder / path
        try:
            if not file.is_file():
                return None
            self._refuse_stray_links([file.parent, file])
            return file.stat().st_size
        except OSError as error:
            raise SourceError(
                f"cannot be looked at ({error.strerror})", where=f"{self.label}, {path}"
            ) from error

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        with self.reading(path) as descriptor:
            done = read_fully(descriptor, start, buffer)
        if done < len(buffer):
            raise CheckpointError(
                f"ends at byte {start + done:,}; {start + len(buffer):,} were there when the header was read",
                where=f"{self.label}, {path}",
                hint=START_AGAIN,
            )

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        self._advice.start([] if in_part else [self.index.tensors[name] for name in names], budget_bytes)

    def release(self, name: str, stop: int) -> None:
        self._advice.release(self.index.tensors[name], stop)

    @contextmanager
    def reading(self, path: str) -> Iterator[int]:
        """Lend a file's descriptor. What was read meanwhile counts if this ends without an error."""
        where = f"{self.label}, {path}"
        try:
            with self.descriptors.lend(path) as descriptor:
                yield descriptor
                is_same = self.descriptors.is_unchanged(path, descriptor)
        except OSError as error:
            raise SourceError(
                f"cannot be read ({error.strerror})",
                where=where,
                hint="Check the disk and the file's permissions, then run the same command again.",
            ) from error
        if not is_same:
            raise CheckpointError(
                "the file was changed or replaced while it was being read", where=where, hint=START_AGAIN
            )

    def tensor_file(self, name: str) -> TensorFile:
        info = self.index.tensors[name]
        return TensorFile(partial(self.reading, info.file), info.start_byte, str(self.folder / info.file))

    def version(self, path: str) -> tuple[int, ...]:
        return self.descriptors.current_version(path)

    def is_current(self) -> bool:
        return self.descriptors.are_current()

    def close(self) -> None:
        self.descriptors.close()

    def _refuse_stray_links(self, paths: list[Path]) -> None:
        """Raise SourceError for links that lead out of the folder, and not to what is trusted.

        From the Hub's cache they may lead to its blobs. Of folders below this one links above count too.
        """
        links = [path for path in paths if path.is_symlink() or path.is_dir()]
        if not links:
            return
        top = self.folder.resolve()
        inside = [top, *_blobs_of(top), *self._trusted_links]
        found = {os.path.relpath(link, self.folder): link.resolve() for link in links}
        stray = {
            name: target
            for name, target in found.items()
            if not any(target.is_relative_to(place) for place in inside)
        }
        if stray:
            raise _stray_error(stray, self.label)


def _stray_error(stray: Mapping[str, Path], label: str) -> SourceError:
    """Return the error of links, by name with what they lead to, that lead where nothing is trusted."""
    names = listed([*map(repr, stray)], 3)
    kind = "is a link that leads" if len(stray) == 1 else "are links that lead"
    return SourceError(
        f"{names} {kind} out of the folder",
        where=label,
        expected="files, or links to files inside the folder",
        hint=f"If you trust the files there, add to the recipe: trusted_links: ['{_common_root(stray)}']; or "
        "put them in place of the links (`cp -L`).",
    )


def _refuse_lost_links(entries: Iterable[Path], label: str) -> None:
    """Raise SourceError for a link to a file that is not there; editors keep hidden ones."""
    for entry in entries:
        if entry.is_symlink() and not entry.exists() and not entry.name.startswith("."):
            raise SourceError(
                f"{entry.name!r} is a link to a file that is not there",
                where=label,
                expected="files, or links to files",
                hint="Copy the checkpoint with the files that its links lead to (`cp -rL`), or download it "
                "again; remove the link if nothing needs it.",
            )


def _common_root(stray: Mapping[str, Path]) -> Path:
    """Return the folder that holds what links lead to; of a content store, its top above `ab/cdef...`."""
    root = Path(os.path.commonpath([target.parent for target in stray.values()]))
    while re.fullmatch("[0-9a-f]{2}", root.name):
        root = root.parent
    return root


def _blobs_of(folder: Path) -> list[Path]:
    """Return where a snapshot of the Hub's cache has its content: blobs of the repository, and of the cache.

    CACHE/models--ORG--NAME/snapshots/COMMIT/FILE leads to CACHE/models--ORG--NAME/blobs/HASH, and what came
    by Xet from there to CACHE/blobs/HA/HASH, a store that huggingface_hub marks as its own.
    """
    snapshots = next((above for above in folder.parents if above.name == "snapshots"), None)
    if snapshots is None:
        return []
    repository = snapshots.parent
    shared = repository.parent / "blobs"
    is_cache = repository.name.startswith("models--") and (shared / _SHARED_MARKER).is_file()
    return [(repository / "blobs").resolve(), *([shared.resolve()] if is_cache else [])]
