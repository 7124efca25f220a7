"""Files of a Hub repository at one commit: their listing, and byte ranges of their content."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from hub_magmax.checkpoints.side_files import content_hashes, same_content
from hub_magmax.errors import SourceError
from hub_magmax.hub import (
    LIBRARY_NAME,
    PASSING_STATUSES,
    TIMEOUT_SECONDS,
    ChangedError,
    hub_api,
    hub_errors,
    retry,
)

#: Bytes of one request at most.
WINDOW_BYTES = 16 * 2**20

#: Requests at a time for the parts of one large read.
PARALLEL_REQUESTS = 8

#: Bytes after which a connection counts as working, so that failures are counted anew.
_PROGRESS_BYTES = 2**20

#: Bytes before the range that are read and thrown away if a server ignores ranges.
MAX_SKIPPED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository at one commit.

    Attributes:
        repo_id, commit: Of the repository.
        label: Name of the checkpoint in messages.
        prefix: Path of the folder with a slash at its end; empty for the top.
    """

    repo_id: str
    commit: str
    label: str
    prefix: str = ""

    @cached_property
    def _siblings(self) -> dict[str, Any]:
        with hub_errors(self.label):
            info = retry(
                lambda: hub_api().model_info(
                    self.repo_id, revision=self.commit, files_metadata=True, timeout=TIMEOUT_SECONDS
                )
            )
        files = sorted(info.siblings or [], key=lambda file: file.rfilename)
        start = len(self.prefix)
        return {file.rfilename[start:]: file for file in files if file.rfilename.startswith(self.prefix)}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file at the top, by name."""
        return {path: size for path, size in self.all_sizes.items() if "/" not in path}

    @cached_property
    def all_sizes(self) -> Mapping[str, int]:
        """Bytes of every file, those of sub-folders too."""
        return {path: file.size for path, file in self._siblings.items()}

    def sha256(self, path: str) -> str | None:
        """Return the sha256 that the Hub states for a large file, or None."""
        lfs = self._siblings[path].lfs
        return lfs.sha256 if lfs else None

    def hashes(self, path: str) -> str:
        """Return the hash that the Hub states for a file, as `side_files.content_hashes` writes it."""
        sha256 = self.sha256(path)
        return f"sha256:{sha256}" if sha256 else f"git:{self._siblings[path].blob_id}"

    def in_cache(self, path: str) -> Path | None:
        """Return a file in the local cache, if all of it is there.

        Raises:
            SourceError: If no cache can hold a repository or file of this name.
        """
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(self.repo_id, self.prefix + path, revision=self.commit)
        except ValueError as error:  # of a repository, or of a file that would lie outside of the cache
            raise SourceError(
                "no file of this name can be in the local cache",
                where=f"{self.label}, {path}",
                expected="org/model, and names of files that lead nowhere else on any system",
                hint="Check the name; only the repository's owner can rename a file.",
            ) from error
        return Path(found) if isinstance(found, str) else None

    def address(self, path: str) -> str:
        """Return the address from which the Hub resolves a file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, self.prefix + path, revision=self.commit)


class FileFetcher:
    """Content of the files of a folder on the Hub; may be used by several threads.

    A large file is resolved to a signed address once, by a request that the Hub counts, and ranges
    follow from there, until the address expires and is asked for anew.

    Args:
        folder: The folder.
        max_skipped_bytes: Bytes before a range that are read and thrown away if a server ignores ranges.
    """

    def __init__(self, folder: HubFolder, max_skipped_bytes: int = MAX_SKIPPED_BYTES) -> None:
        self._folder, self._max_skipped_bytes = folder, max_skipped_bytes
        self._locations: dict[str, str] = {}
        self._lock = Lock()

    def whole(self, path: str) -> bytes:
        """Return the content of a small file, which the Hub itself sends; its hash is compared."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        def get() -> bytes:
            answer = get_session().get(
                self._folder.address(path),
                headers=_headers(None),
                timeout=TIMEOUT_SECONDS,
                follow_redirects=True,
            )
            hf_raise_for_status(answer)
            if same_content(content_hashes(answer.content), self._folder.hashes(path)) is False:
                raise ChangedError
            return bytes(answer.content)

        with hub_errors(f"{self._folder.label}, {path}"):
            return retry(get)

    def into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a large file from `start` on, by several requests at a time.

        Raises:
            SourceError: If the Hub cannot be reached, refuses, or does not send what was asked for.
        """
        starts = range(0, len(buffer), WINDOW_BYTES)

        def window(position: int) -> None:
            self._range(path, start + position, buffer[position : position + WINDOW_BYTES])

        if len(starts) == 1:
            window(0)
        elif starts:
            with ThreadPoolExecutor(min(len(starts), PARALLEL_REQUESTS)) as pool:
                list(pool.map(window, starts))

    def _range(self, path: str, start: int, buffer: memoryview) -> None:
        """Do the same by one request at a time; after a broken connection only the rest is asked for."""
        done = counted_from = 0

        def attempt() -> None:
            nonlocal done
            location = self._locate(path)
            got = _receive(location, start + done, buffer[done:], self._max_skipped_bytes)
            if got.status in (401, 403):  # the signed address has expired
                location = self._locate(path, stale=location)
                got = _receive(location, start + done, buffer[done:], self._max_skipped_bytes)
            done += got.count
            if done < len(buffer) and done - counted_from < _PROGRESS_BYTES:
                raise _IncompleteError(got)

        try:
            while done < len(buffer):
                counted_from = done
                retry(attempt, lambda error: isinstance(error, _IncompleteError) and not error.got.is_final)
        except _IncompleteError as error:
            where = f"{self._folder.label}, {path}"
            raise _gave_up(error.got, start, len(buffer), where) from None

    def _locate(self, path: str, stale: str | None = None) -> str:
        """Return where the Hub keeps a file, asking anew if the earlier answer is `stale`."""
        from huggingface_hub import get_hf_file_metadata

        with self._lock:
            if self._locations.get(path, stale) == stale:
                with hub_errors(f"{self._folder.label}, {path}"):
                    found = retry(
                        lambda: get_hf_file_metadata(self._folder.address(path), timeout=TIMEOUT_SECONDS)
                    )
                self._locations[path] = str(found.location)
            return self._locations[path]


@dataclass(frozen=True)
class _Received:
    """Result of one request: `count` bytes, and why there are no more."""

    count: int
    status: int = 0
    problem: str = "the connection failed"
    response: Any = None

    @property
    def is_final(self) -> bool:
        """Whether asking again would bring the same answer."""
        return 400 <= self.status < 500 and self.status not in (401, 403, *PASSING_STATUSES)


class _IncompleteError(Exception):
    """A request ended early."""

    def __init__(self, got: _Received) -> None:
        super().__init__(got.problem)
        self.got, self.response = got, got.response


def _receive(location: str, start: int, buffer: memoryview, max_skipped_bytes: int) -> _Received:
    """Ask once for the bytes from `start` on; fill `buffer` as far as they come."""
    from huggingface_hub.utils import get_session, httpx

    headers = _headers(location) | {"Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{start + len(buffer) - 1}"
    done = 0
    try:
        with get_session().stream(
            "GET", location, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as answer:
            refusal, skipped = _bytes_before(answer, start, start + len(buffer), max_skipped_bytes)
            if refusal:
                return _Received(0, answer.status_code, refusal, answer)
            for block in answer.iter_raw():
                part = block[skipped:][: len(buffer) - done]
                skipped = max(0, skipped - len(block))
                buffer[done : done + len(part)] = part
                done += len(part)
                if done == len(buffer):
                    break
            return _Received(done, answer.status_code, f"the server sent {done:,} bytes")
    except (httpx.TransportError, RuntimeError) as error:
        # RuntimeError: another thread closed the shared client after a failure of its own.
        return _Received(done, problem=f"the connection failed ({type(error).__name__})")


def _headers(location: str | None) -> dict[str, str]:
    """Return the headers of a request to the Hub, or to the storage host at `location`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    own = location is None or urlsplit(location).netloc == urlsplit(constants.ENDPOINT).netloc
    # A signed address needs no token, and must not see it.
    return dict(
        build_hf_headers(
            token=None if own else False, library_name=LIBRARY_NAME, library_version=version(LIBRARY_NAME)
        )
    )


def _bytes_before(answer: Any, start: int, stop: int, max_skipped_bytes: int) -> tuple[str, int]:
    """Return why an answer cannot be used (empty if it can), and how many bytes come before the range."""
    if answer.status_code == 206:
        said = answer.headers.get("Content-Range", "no Content-Range")
        right = said.split("/")[0] == f"bytes {start}-{stop - 1}"
        return "" if right else f"the server sent {said} in place of them", 0
    if answer.status_code != 200:
        return f"the storage host answered with status {answer.status_code}", 0
    if start > max_skipped_bytes:
        return "the server ignored the range and sends the whole file", 0
    return "", start


def _gave_up(got: _Received, start: int, num_bytes: int, where: str) -> SourceError:
    breaks_ranges = got.status in (200, 206)
    return SourceError(
        f"asked for bytes {start:,} to {start + num_bytes:,}, and {got.problem}, again and again",
        where=where,
        hint="Run the same command again; if it stays, the server or a proxy breaks HTTP ranges: "
        "`hf download` the model, and it is read from the local cache."
        if breaks_ranges
        else "Check the connection, then run the same command again.",
    )
