"""Files of a Hub repository, fetched in byte ranges."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from hub_magmax.checkpoints.side_files import content_hashes, same_content
from hub_magmax.errors import SourceError
from hub_magmax.hub import (
    _PASSING_STATUSES,
    _WAITS_SECONDS,
    LIBRARY_NAME,
    TIMEOUT_SECONDS,
    ChangedError,
    _asked_wait,
    hub_errors,
    persistently,
)

#: Bytes after which a line counts as working, so that the attempts are counted anew.
_PROGRESS_BYTES = 2**20

#: Bytes before the range that are read and thrown away where a server ignores ranges.
_MAX_SKIPPED_BYTES = 64 * 2**20


class FileFetcher:
    """Ranges of the files of a repository at one commit; may be used by several threads.

    A large file is resolved to a signed address once, by a request that the Hub counts, and ranges
    follow from there, until the address expires and is asked for anew. `prefix` comes before every path.
    """

    def __init__(self, repo_id: str, commit: str, label: str, prefix: str = "") -> None:
        self.repo_id, self.commit, self.label, self._prefix = repo_id, commit, label, prefix
        self._locations: dict[str, str] = {}
        self._lock = Lock()

    def whole(self, path: str, blob_id: str) -> bytes:
        """Return the content of a small file, which the Hub itself sends and git calls `blob_id`."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        def get() -> bytes:
            answer = get_session().get(
                self._address(path), headers=_headers(None), timeout=TIMEOUT_SECONDS, follow_redirects=True
            )
            hf_raise_for_status(answer)
            if same_content(content_hashes(answer.content), f"git:{blob_id}") is False:
                raise ChangedError
            return bytes(answer.content)

        with hub_errors(f"{self.label}, {path}"):
            return persistently(get)

    def into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a large file from `start` on.

        Whatever arrives counts: after a broken connection only the rest is asked for.

        Raises:
            SourceError: If the Hub cannot be reached, refuses, or does not send what was asked for.
        """
        done, failures, counted_from = 0, 0, 0
        location = self._locate(path)
        while True:
            got = _receive(location, start + done, buffer[done:])
            done += got.count
            if done == len(buffer):
                return
            if done - counted_from >= _PROGRESS_BYTES:
                counted_from, failures = done, 0
            if got.is_final or failures == len(_WAITS_SECONDS):
                raise _gave_up(got, start, len(buffer), f"{self.label}, {path}")
            expired = got.status in (401, 403)
            if expired:
                location = self._locate(path, stale=location)
            time.sleep(max(0.0 if expired and not failures else _WAITS_SECONDS[failures], got.wait_seconds))
            failures += 1

    def _locate(self, path: str, stale: str | None = None) -> str:
        """Return where the Hub keeps a file, asking anew if what was told before is `stale`."""
        from huggingface_hub import get_hf_file_metadata

        with self._lock:
            if self._locations.get(path, stale) == stale:
                with hub_errors(f"{self.label}, {path}"):
                    found = persistently(
                        lambda: get_hf_file_metadata(self._address(path), timeout=TIMEOUT_SECONDS)
                    )
                self._locations[path] = str(found.location)
            return self._locations[path]

    def _address(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, self._prefix + path, revision=self.commit)


@dataclass(frozen=True)
class _Received:
    """What one request brought: `count` bytes, and why there are no more."""

    count: int
    status: int = 0
    problem: str = "the connection failed"
    wait_seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether asking again would bring the same answer."""
        return 400 <= self.status < 500 and self.status not in (401, 403, *_PASSING_STATUSES)


def _receive(location: str, start: int, buffer: memoryview) -> _Received:
    """Ask once for the bytes from `start` on; fill `buffer` as far as they come."""
    from huggingface_hub.utils import get_session, httpx

    headers = _headers(location) | {"Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{start + len(buffer) - 1}"
    done = 0
    try:
        with get_session().stream(
            "GET", location, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as answer:
            refusal, skipped = _bytes_before(answer, start, start + len(buffer))
            if refusal:
                return _Received(0, answer.status_code, refusal, _asked_wait(answer))
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


def _bytes_before(answer: Any, start: int, stop: int) -> tuple[str, int]:
    """Return what is wrong with an answer, if anything, and how many bytes come before the range."""
    if answer.status_code == 206:
        said = answer.headers.get("Content-Range", "no Content-Range")
        right = said.split("/")[0] == f"bytes {start}-{stop - 1}"
        return "" if right else f"the server sent {said} in place of them", 0
    if answer.status_code != 200:
        return f"the storage host answered with status {answer.status_code}", 0
    if start > _MAX_SKIPPED_BYTES:
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
