"""Requests to the Hub that end with the right bytes, or with an error that says what to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from hub_magmax.checkpoints.side_files import content_hashes, same_content
from hub_magmax.errors import SourceError
from hub_magmax.text import TOKEN_VARIABLES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0

#: Pauses before a failed request is sent again.
_WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)

#: Longest pause that a server can ask for.
_MAX_WAIT_SECONDS = 300.0

#: Answers that may be others a moment later.
_PASSING_STATUSES = (408, 429, 500, 502, 503, 504)

#: Bytes after which a line counts as working, so that the attempts are counted anew.
_PROGRESS_BYTES = 2**20

#: Bytes before the range that are read and thrown away where a server ignores ranges.
_MAX_SKIPPED_BYTES = 64 * 2**20


def hub_api() -> HfApi:
    """Return the Hub client, which identifies itself as hub_magmax and follows `HF_*` variables.

    Raises:
        SourceError: If the token in use cannot be sent.
    """
    from huggingface_hub import HfApi

    from hub_magmax import __version__

    _check_token()
    return HfApi(library_name="hub_magmax", library_version=__version__)


def _check_token() -> None:
    """Raise SourceError, which does not repeat it, where the token in use cannot be part of a request."""
    from huggingface_hub import get_token

    token = get_token()
    if token is None or (token.isascii() and token.isprintable()):
        return
    names = [name for name in TOKEN_VARIABLES if os.environ.get(name, "").strip()]
    raise SourceError(
        "the access token holds characters that no token has",
        where=f"environment variable {names[0]}" if names else "the token that is stored by `hf auth login`",
        expected="letters, digits and _ only",
        hint=f"Set {names[0]} to a token as the Hub shows it, or unset it."
        if names
        else "Run `hf auth login` again, with a token as the Hub shows it.",
    )


#: What huggingface_hub raises while reading, most special first, with what was wrong and what to do.
_REFUSALS = (
    ("GatedRepoError", "access is gated", "Ask for access on its page, then `hf auth login`."),
    (
        "RepositoryNotFoundError",
        "there is no such repository, or this token may not see it",
        "Check the spelling; for a private repository run `hf auth login` or set HF_TOKEN.",
    ),
    ("RevisionNotFoundError", "there is no such revision", "Name a branch, tag, commit or refs/pr/N."),
    (
        "RevisionResolutionError",
        "the Hub cannot be reached, and the local cache does not know this revision",
        "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE.",
    ),
    (
        "LocalEntryNotFoundError",
        "not in the local cache, and the Hub cannot be reached",
        "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE.",
    ),
    (
        "OfflineModeIsEnabled",
        "not in the local cache, and HF_HUB_OFFLINE is set",
        "Unset HF_HUB_OFFLINE, or download the model first.",
    ),
    ("EntryNotFoundError", "a file is missing at this commit", "Pin another revision."),
    ("HFValidationError", "not a valid repository id", "Write org/model."),
    (
        "HfHubHTTPError",
        "the Hub answered with an error",
        "Check the name (org/model, or ./name for a folder), or try again later.",
    ),
)


#: The same where the status says more than the kind of error.
_OTHERWISE: dict[tuple[str, int | None], tuple[str, str]] = {
    ("HfHubHTTPError", 401): (
        "the Hub does not accept this token",
        "Run `hf auth login` again, or set HF_TOKEN to a token that is valid.",
    ),
    ("HfHubHTTPError", 403): (
        "this token may not read it",
        "Ask its owner for access, or use a token that may read it: `hf auth login`, or HF_TOKEN.",
    ),
}


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while reading into a SourceError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.RevisionResolutionError, OSError)
    try:
        yield
    except known as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        for name, *usual in _REFUSALS:
            if isinstance(error, getattr(errors, name)):
                what, hint = _OTHERWISE.get((name, status), usual)
                raise SourceError(
                    f"{what} (status {status})" if status else what, where=where, hint=hint
                ) from error
        raise
    except httpx.HTTPError as error:
        raise SourceError(
            f"the connection failed ({type(error).__name__})",
            where=where,
            hint="Check the connection and HF_ENDPOINT, then run the same command again.",
        ) from error
    except ValueError as error:  # what json and its readers raise
        raise SourceError(
            "the Hub sent an answer that cannot be read, or was changed on the way",
            where=where,
            hint="Run the same command again; if it stays, check HF_ENDPOINT and proxies.",
        ) from error


def persistently(call: Callable[[], T]) -> T:
    """Return what `call` gives, calling it again while connection or Hub fail in ways that pass.

    Only for calls that may be carried out twice. Waits some seconds in between, or as long as the Hub says.
    """
    for wait in _WAITS_SECONDS:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(max(wait, _asked_wait(getattr(error, "response", None))))
    return call()


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a moment later."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    if isinstance(error, errors.HfHubHTTPError):
        return getattr(error.response, "status_code", None) in _PASSING_STATUSES
    if isinstance(error, errors.RevisionResolutionError):
        return error.__cause__ is not None and is_passing(error.__cause__)
    # A body that was cut or changed is no JSON.
    return isinstance(error, json.JSONDecodeError | UnicodeDecodeError | ChangedError | httpx.TransportError)


class ChangedError(ValueError):
    """A body was changed on its way."""


def _asked_wait(response: Any) -> float:
    """Return the seconds for which an answer asks to wait; 0 where it does not."""
    try:
        return min(float(response.headers.get("Retry-After", 0)), _MAX_WAIT_SECONDS)
    except (AttributeError, ValueError):
        return 0.0


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

    from hub_magmax import __version__

    own = location is None or urlsplit(location).netloc == urlsplit(constants.ENDPOINT).netloc
    # A signed address needs no token, and must not see it.
    return dict(
        build_hf_headers(token=None if own else False, library_name="hub_magmax", library_version=__version__)
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
