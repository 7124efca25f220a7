"""Checkpoints in folders of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

from hub_magmax.checkpoints.descriptors import Descriptors
from hub_magmax.checkpoints.page_cache import PageCacheAdvice, is_cached
from hub_magmax.checkpoints.source import FileSource, TensorFile
from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.files import read_fully
from hub_magmax.recipe.model_names import is_folder, is_there

START_AGAIN = "Let what changes the file come to its end, then run the same command again."


class LocalSource(FileSource):
    """A checkpoint folder on this machine.

    Every read compares its file with the version that was opened first (device, inode, size and time
    of the last change, whether later or earlier), so all bytes belong to one version of the file, the
    one whose header was checked.

    A link is followed only if it stays inside the folder, or leads from a snapshot of the Hub's
    cache to that cache's blobs: a repository can hold a link to any file of the reader's.

    Args:
        folder: Its folder.
        label: Its name in messages; the folder by default.
        weights: The file of weights, or the index, that counts if there are several.
        is_cached: Says whether a byte of a descriptor's file is in the page cache.

    Attributes:
        descriptors: Its open files.

    Raises:
        SourceError: If the folder is not one, or a file is a link that leads out of it.
        CheckpointError: While reading, if a file was changed, replaced or cut since it was opened.
    """

    def __init__(
        self,
        folder: Path,
        label: str | None = None,
        weights: str = "",
        *,
        is_cached: Callable[[int, int], bool] = is_cached,
    ) -> None:
        self.folder, self.label, self.weights = folder, label or str(folder), weights
        self.descriptors = Descriptors(folder)
        self._advice = PageCacheAdvice(self.descriptors.lend, is_cached)
        if not is_folder(folder):
            raise SourceError(
                "this is a file, not a folder" if is_there(folder) else "there is no such folder",
                where=self.label,
                expected="a checkpoint folder, as written by `save_pretrained`",
                hint="Check the path; relative paths start at the recipe's own folder.",
            )

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        try:
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
            sizes = {path.name: path.stat().st_size for path in files}
            stray = _stray_links(self.folder, [path for path in files if path.is_symlink()])
        except OSError as error:
            raise SourceError(f"cannot be listed ({error.strerror})", where=self.label) from error
        if stray:
            raise SourceError(
                f"{stray[0]!r} is a link that leads out of the folder",
                where=self.label,
                expected="files, or links to files inside the folder",
                hint="If you trust the link, put the file itself in its place (`cp -L`).",
            )
        return sizes

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
        return TensorFile(partial(self.reading, info.file), info.start_byte)

    def version(self, path: str) -> tuple[int, ...]:
        return self.descriptors.current_version(path)

    def is_current(self) -> bool:
        return self.descriptors.are_current()

    def close(self) -> None:
        self.descriptors.close()


def _stray_links(folder: Path, links: list[Path]) -> list[str]:
    """Return links that lead out of a folder; from the Hub's cache they may lead to its blobs."""
    if not links:
        return []
    inside = [folder.resolve()]
    for above in inside[0].parents:
        if above.name == "snapshots":  # snapshots/COMMIT/FILE -> blobs/HASH
            inside.append(above.parent.joinpath("blobs").resolve())
            break
    return [link.name for link in links if not any(link.resolve().is_relative_to(top) for top in inside)]
