"""Checkpoints on the Hub, read by ranges from a pinned commit: no file is ever downloaded whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.hub_files import FileFetcher
from hub_magmax.checkpoints.index import CheckpointIndex, read_index, weight_map
from hub_magmax.checkpoints.local import LocalSource
from hub_magmax.checkpoints.readahead import ReadAhead, Segment, Wanted
from hub_magmax.checkpoints.source import TensorSource, _Source
from hub_magmax.errors import SourceError
from hub_magmax.hub import TIMEOUT_SECONDS, hub_api, hub_errors, persistently
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.references import split_part

#: Bytes fetched at least in one request where nobody said what is read next: neighbours come along.
WINDOW_BYTES = 16 * 2**20

#: The same for headers, most of which are smaller.
HEADER_WINDOW_BYTES = 2**16

#: A file's first window stays in memory where fetching it again would be more than a hundredth of the file.
_KEPT_HEAD_BYTES = 100 * HEADER_WINDOW_BYTES

#: Requests for the parts of one large read.
_PARALLEL_REQUESTS = 8


def resolve_commit(repo_id: str, revision: str | None) -> str:
    """Return the 40-digit commit that `revision` (None: the default branch) names now.

    Works offline from the local cache.
    """
    name = f"{repo_id}@{revision}" if revision else repo_id
    with hub_errors(name):
        return str(persistently(lambda: hub_api().resolve_revision(repo_id, revision=revision)).resolved)


def open_hub(repo_id: str, commit: str, part: str = "") -> TensorSource:
    """Open a repository at a commit, or a part of it; from the local cache when offline."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        label = _label(repo_id, commit, part)
        with hub_errors(label):
            snapshot = snapshot_download(repo_id, revision=commit, local_files_only=True)
        folder, weights = split_part(part)
        return LocalSource(Path(snapshot) / folder, label, weights)
    return HubSource(repo_id, commit, part)


def _label(repo_id: str, commit: str, part: str) -> str:
    name = f"{repo_id}@{commit[:7]}"
    return f"{name}/{part}" if part else name


class HubSource(_Source):
    """A model repository at one commit.

    Weight files are read by HTTP ranges from where the Hub keeps them. Where `expect` says what will be
    read, large ranges are fetched ahead; otherwise the last `WINDOW_BYTES` (or the current tensor, if
    larger) stay in memory, so that a second look at a tensor costs no second request. Small files are
    fetched whole, once. A file that is complete in the local cache is read there. Of a repository that holds
    several models, `part` names the folder or the file of weights that counts (`references.HubModel`).
    """

    def __init__(self, repo_id: str, commit: str, part: str = "") -> None:
        self.repo_id, self.commit = repo_id, commit
        self.label = _label(repo_id, commit, part)
        folder, self.weights = split_part(part)
        self._prefix = f"{folder}/" if folder else ""
        self._fetcher = FileFetcher(repo_id, commit, self.label, self._prefix)
        self._cached: dict[str, LocalSource | None] = {}
        self._small: dict[str, bytes] = {}
        self._heads: dict[str, bytes] = {}
        self._headers: dict[str, Wanted] = {}
        self._window: tuple[str, int, bytearray] = ("", 0, bytearray())
        self._ahead: ReadAhead | None = None
        self._tensor = ""

    @property
    def origin(self) -> str:
        folder = self._prefix.removesuffix("/")
        place = f"{self.repo_id!r}, revision={self.commit!r}"
        return f"{place}, subfolder={folder!r}" if folder else place

    @cached_property
    def _siblings(self) -> dict[str, Any]:
        with hub_errors(self.label):
            info = persistently(
                lambda: hub_api().model_info(
                    self.repo_id, revision=self.commit, files_metadata=True, timeout=TIMEOUT_SECONDS
                )
            )
        files = sorted(info.siblings or [], key=lambda file: file.rfilename)
        start = len(self._prefix)
        return {file.rfilename[start:]: file for file in files if file.rfilename.startswith(self._prefix)}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        return {path: file.size for path, file in self._siblings.items() if "/" not in path}

    def sha256(self, path: str) -> str | None:
        """Return the sha256 that the Hub states for a large file, or None."""
        lfs = self._siblings[path].lfs
        return lfs.sha256 if lfs else None

    def content_hashes(self, path: str) -> str:
        """Return the hash that the Hub states for a file, as `sidefiles.content_hashes` writes it."""
        sha256 = self.sha256(path)
        return f"sha256:{sha256}" if sha256 else f"git:{self._siblings[path].blob_id}"

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

        expected = weight_map(self.label, self.sizes, read, self.weights, self.origin)
        # Headers of many files in about the time of one; what is wrong with them is told below.
        files = [path for path in expected if self.sizes[path] >= 8]
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            list(pool.map(lambda path: read(path, 0, 8), files))
        index = read_index(self.label, self.sizes, read, self.weights, self.origin)
        for path in [shard.file for shard in index.shards if shard.file in heads]:
            self._keep_header(path, bytes(heads[path]))
        return index

    def _keep_header(self, path: str, head: bytes) -> None:
        """Keep what hashing the file needs of its header, and of a small file what came along with it."""
        start, size, sha256 = 8 + int.from_bytes(head[:8], "little"), self.sizes[path], self.sha256(path)
        assert sha256 is not None, "a file is remote if the Hub states its sha256"
        self._headers[path] = Wanted(sha256, hashlib.sha256(head[:start]), start, size)
        if size <= _KEPT_HEAD_BYTES:
            self._heads[path] = head

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        if (local := self._in_cache(path)) is not None:
            local.read_into(path, start, buffer)
        elif self.sha256(path) is None:
            buffer[:] = self._whole(path)[start : start + len(buffer)]
        elif self._ahead is None or not self._ahead.read_into(path, start, buffer):
            held, first, content = self._window
            if held == path and first <= start and start + len(buffer) <= first + len(content):
                buffer[:] = memoryview(content)[start - first :][: len(buffer)]
            else:
                self._fetch(path, start, buffer)

    def read_stored(self, name: str, start: int, stop: int, out: Any = None) -> Stored:
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
        """Fetch the tensors `names` ahead, in this order; see `TensorSource`."""
        self._forget()
        infos = [self.index.tensors[name] for name in names]
        ranges = [Segment(i.file, i.start_byte, i.stop_byte) for i in infos if self._is_remote(i.file)]
        if ranges:
            self._ahead = ReadAhead(ranges, self._fetch, self._headers, budget_bytes, self.label)

    def release(self, name: str, stop: int) -> None:
        info = self.index.tensors[name]
        if self._ahead is not None and info.num_elements:
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
        return self._in_cache(path) is None and self.sha256(path) is not None

    def _in_cache(self, path: str) -> LocalSource | None:
        if path not in self._cached:
            found = self._cached_file(path)
            self._cached[path] = (
                LocalSource(Path(found).parent, self.label) if isinstance(found, str) else None
            )
        return self._cached[path]

    def _cached_file(self, path: str) -> object:
        from huggingface_hub import try_to_load_from_cache

        try:
            return try_to_load_from_cache(self.repo_id, self._prefix + path, revision=self.commit)
        except ValueError as error:  # of a repository, or of a file that would lie outside of the cache
            raise SourceError(
                "no file of this name can be in the local cache",
                where=f"{self.label}, {path}",
                expected="org/model, and names of files that lead nowhere else on any system",
                hint="Check the name; only the repository's owner can rename a file.",
            ) from error

    def _whole(self, path: str) -> bytes:
        if path not in self._small:
            self._small[path] = self._fetcher.whole(path, self._siblings[path].blob_id)
        return self._small[path]

    def _hold(self, path: str, start: int, stop: int) -> None:
        """Have a range in the window, and what follows it."""
        held, first, content = self._window
        if held != path or start < first or stop > first + len(content):
            self._window = ("", 0, bytearray())  # free it before fetching the next
            content = bytearray(min(max(stop, start + WINDOW_BYTES), self.sizes[path]) - start)
            self._fetch(path, start, memoryview(content))
            self._window = (path, start, content)

    def _fetch(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a remote file, large ones by several requests at a time."""
        known = self._heads.get(path, b"")[start : start + len(buffer)]
        buffer[: len(known)] = known
        starts = range(len(known), len(buffer), WINDOW_BYTES)

        def part(position: int) -> None:
            self._fetcher.into(path, start + position, buffer[position : position + WINDOW_BYTES])

        if len(starts) == 1:
            part(starts[0])
        elif starts:
            with ThreadPoolExecutor(min(len(starts), _PARALLEL_REQUESTS)) as pool:
                list(pool.map(part, starts))
