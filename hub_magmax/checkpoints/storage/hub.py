"""Checkpoints on the Hub, read by ranges from a pinned commit: no file is ever downloaded whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.listing import split_part
from hub_magmax.checkpoints.source import FileSource, Folder
from hub_magmax.checkpoints.storage.hub_cache import check_complete, commit_in_cache
from hub_magmax.checkpoints.storage.hub_files import (
    MAX_SKIPPED_BYTES,
    PARALLEL_REQUESTS,
    WINDOW_BYTES,
    FileFetcher,
    HubFolder,
)
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.checkpoints.storage.readahead import ReadAhead, Segment, Wanted
from hub_magmax.checkpoints.weight_files import read_index, weight_map
from hub_magmax.hub import TIMEOUT_SECONDS, hub_api, hub_errors, is_offline, retry
from hub_magmax.kernels.stored import Stored

#: Bytes of a header's first request; most headers are smaller.
HEADER_WINDOW_BYTES = 2**16

_COMMIT = re.compile(r"[0-9a-f]{40}")

#: A file's first window stays in memory if fetching it again would be more than a hundredth of the file.
_KEPT_HEAD_BYTES = 100 * HEADER_WINDOW_BYTES


def resolve_commit(repo_id: str, revision: str | None) -> str:
    """Return the 40-digit commit that `revision` (None: the default branch) names now.

    The Hub is asked, again and again while it fails in a way that can pass. Only offline does the local cache
    answer instead, also for the beginning of a commit.

    Raises:
        SourceError: If the Hub does not answer, or offline the cache does not know.
    """
    if is_offline():
        return _cached_commit(repo_id, revision)
    if revision and _COMMIT.fullmatch(revision):
        return revision
    with hub_errors(_named(repo_id, revision)):
        # Not `HfApi.resolve_revision`, which takes what the cache holds of a branch while the Hub fails.
        info = retry(lambda: hub_api().model_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS))
    assert info.sha is not None
    return info.sha


def _cached_commit(repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import RevisionResolutionError

    with hub_errors(_named(repo_id, revision)):
        try:
            found = hub_api().resolve_revision(repo_id, revision=revision, local_files_only=True)
            return str(found.resolved)
        except RevisionResolutionError:
            if (commit := commit_in_cache(repo_id, revision)) is None:
                raise
            return commit


def _named(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id


def open_hub(repo_id: str, commit: str, part: str = "") -> FileSource:
    """Open a repository at a commit, or a part of it; from the local cache when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if is_offline():
        label = _label(repo_id, commit, part)
        with hub_errors(label):
            try:
                snapshot = Path(snapshot_download(repo_id, revision=commit, local_files_only=True))
            except LocalEntryNotFoundError:
                commit_in_cache(repo_id, commit)
                raise
        check_complete(snapshot, label, repo_id, commit)
        return CachedSource(repo_id, commit, part, snapshot)
    return HubSource(repo_id, commit, part)


class CachedSource(LocalSource):
    """A model repository at one commit, in the local cache.

    Args:
        repo_id, commit, part: As for `HubSource`.
        snapshot: The folder of the commit.
    """

    def __init__(self, repo_id: str, commit: str, part: str, snapshot: Path) -> None:
        self.commit = commit
        self._place = repo_id, commit, split_part(part)[0]
        super().__init__(snapshot / self._place[2], _label(repo_id, commit, part), split_part(part)[1])

    @property
    def origin(self) -> str:
        return _origin(*self._place)

    @property
    def address(self) -> str:
        return _address(*self._place)


def _origin(repo_id: str, commit: str, folder: str) -> str:
    place = f"{repo_id!r}, revision={commit!r}"
    return f"{place}, subfolder={folder!r}" if folder else place


def _address(repo_id: str, commit: str, folder: str) -> str:
    place = f"hf://{repo_id}@{commit}"
    return f"{place}/{folder}" if folder else place


def _label(repo_id: str, commit: str, part: str) -> str:
    name = f"{repo_id}@{commit[:7]}"
    return f"{name}/{part}" if part else name


class HubSource(FileSource):
    """A model repository at one commit.

    Weight files are read by HTTP ranges from the Hub's storage. After `expect`, large ranges are fetched
    ahead; otherwise the last `WINDOW_BYTES` (or the current tensor, if larger) stay in memory, so that a
    second look at a tensor costs no second request. Small files are fetched whole, once. A file that is
    complete in the local cache is read there.

    Args:
        repo_id, commit: Of the repository.
        part: The folder or the file of weights that counts, if it holds several; see `HubModel`.
        max_skipped_bytes: Bytes before a range that are read and thrown away if a server ignores ranges.
    """

    def __init__(
        self, repo_id: str, commit: str, part: str = "", *, max_skipped_bytes: int = MAX_SKIPPED_BYTES
    ) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.label = _label(repo_id, commit, part)
        folder, self.weights = split_part(part)
        self._folder = HubFolder(repo_id, commit, self.label, f"{folder}/" if folder else "")
        self._fetcher = FileFetcher(self._folder, max_skipped_bytes)
        self._cached: dict[str, LocalSource | None] = {}
        self._small: dict[str, bytes] = {}
        self._heads: dict[str, bytes] = {}
        self._headers: dict[str, Wanted] = {}
        self._window: tuple[str, int, bytearray] = ("", 0, bytearray())
        self._ahead: ReadAhead | None = None
        self._tensor = ""

    @property
    def origin(self) -> str:
        return _origin(self.repo_id, self.commit, self._folder.prefix.removesuffix("/"))

    @property
    def address(self) -> str:
        return _address(self.repo_id, self.commit, self._folder.prefix.removesuffix("/"))

    @property
    def sizes(self) -> Mapping[str, int]:
        return self._folder.sizes

    def contents(self, path: str) -> Folder:
        return Folder.among(self._folder.all_sizes, path)

    def size_of(self, path: str) -> int | None:
        return self._folder.all_sizes.get(path)

    def stated_hashes(self, path: str) -> str:
        return self._folder.hashes(path)

    @cached_property
    def index(self) -> CheckpointIndex:
        heads: dict[str, bytearray] = {}

        def read(path: str, start: int, stop: int) -> bytes:
            if not self._is_remote(path):
                return self.read_bytes(path, start, stop)
            head = heads.setdefault(path, bytearray())
            if stop > len(head):
                more = bytearray(min(max(stop, HEADER_WINDOW_BYTES), self.sizes[path]) - len(head))
                self._fetch(path, len(head), memoryview(more))
                head += more
            return bytes(head[start:stop])

        listing = replace(self.listing, read_bytes=read)
        # Headers of many files in about the time of one; errors in them are raised below.
        paths = [path for path in weight_map(listing) if self.sizes[path] >= 8]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda path: read(path, 0, 8), paths))
        index = read_index(listing)
        for path in [shard.file for shard in index.shards if shard.file in heads]:
            self._keep_header(path, bytes(heads[path]))
        return index

    def _keep_header(self, path: str, head: bytes) -> None:
        """Keep what hashing the file needs of its header, and of a small file all that came along with it."""
        start, size = 8 + int.from_bytes(head[:8], "little"), self.sizes[path]
        sha256 = self._folder.sha256(path)
        assert sha256 is not None, "a file is remote if the Hub states its sha256"
        self._headers[path] = Wanted(sha256, hashlib.sha256(head[:start]), start, size)
        if size <= _KEPT_HEAD_BYTES:
            self._heads[path] = head

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        if (local := self._in_cache(path)) is not None:
            local.read_into(path, start, buffer)
        elif self._folder.sha256(path) is None:
            if path not in self._small:
                self._small[path] = self._fetcher.whole(path)
            buffer[:] = self._small[path][start : start + len(buffer)]
        elif self._ahead is None or not self._ahead.read_into(path, start, buffer):
            held, first, content = self._window
            if held == path and first <= start and start + len(buffer) <= first + len(content):
                buffer[:] = memoryview(content)[start - first :][: len(buffer)]
            else:
                self._fetch(path, start, buffer)

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        info = self.index.tensors[name]
        if self._ahead is not None:
            if name != self._tensor and info.num_elements:
                self._ahead.reach(info.file, info.start_byte)
        elif self._is_remote(info.file):
            # The whole tensor at once, so that later chunks and passes find it here.
            self._hold(info.file, info.start_byte, info.stop_byte)
        self._tensor = name
        return super().read_stored(name, start, stop, out)

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        infos = [self.index.tensors[name] for name in names]
        ranges = [Segment(i.file, i.start_byte, i.stop_byte) for i in infos if self._is_remote(i.file)]
        if self._ahead is not None and self._ahead.is_whole and self._ahead.ranges == tuple(ranges):
            return  # two tasks have this checkpoint, or this base model of their own: it is fetched once
        self._forget()
        if ranges:
            self._ahead = ReadAhead(ranges, self._fetch, self._headers, budget_bytes, self.label)

    def release(self, name: str, stop: int) -> None:
        info = self.index.tensors[name]
        if self._ahead is not None and info.num_elements and not self.is_shared:
            item_bytes = info.num_bytes // info.num_elements
            self._ahead.release(info.file, info.start_byte + stop * item_bytes)

    def close(self) -> None:
        self._forget()
        for local in self._cached.values():
            if local is not None:
                local.close()

    def _forget(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self._tensor, self._window = None, "", ("", 0, bytearray())

    def _is_remote(self, path: str) -> bool:
        return self._in_cache(path) is None and self._folder.sha256(path) is not None

    def _in_cache(self, path: str) -> LocalSource | None:
        if path not in self._cached:
            found = self._folder.in_cache(path)
            top = found.parents[path.count("/")] if found else None
            self._cached[path] = LocalSource(top, self.label) if top else None
        return self._cached[path]

    def _hold(self, path: str, start: int, stop: int) -> None:
        """Have a range in the window, and the bytes after it."""
        held, first, content = self._window
        if held != path or start < first or stop > first + len(content):
            self._window = ("", 0, bytearray())  # free it before fetching the next
            content = bytearray(min(max(stop, start + WINDOW_BYTES), self.sizes[path]) - start)
            self._fetch(path, start, memoryview(content))
            self._window = (path, start, content)

    def _fetch(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a remote file; those of a kept header cost no request."""
        known = self._heads.get(path, b"")[start : start + len(buffer)]
        buffer[: len(known)] = known
        self._fetcher.into(path, start + len(known), buffer[len(known) :])
