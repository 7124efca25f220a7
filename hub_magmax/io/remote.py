"""Checkpoints on the Hub, read by ranges from a pinned commit: no file is ever downloaded whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.io.source import LocalSource, TensorSource, _Source

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Bytes fetched at least in one request: small neighbouring tensors come along.
WINDOW_BYTES = 16 * 2**20

#: The same for headers, most of which are smaller; no tensors come along.
HEADER_WINDOW_BYTES = 2**16

#: Bytes fetched at most in one request, so that a broken connection costs little.
REQUEST_BYTES = 64 * 2**20

_TIMEOUT_SECONDS = 60.0


def hub_api() -> HfApi:
    """Return the Hub client, which identifies itself as hub_magmax and follows `HF_*` variables."""
    from huggingface_hub import HfApi

    from hub_magmax import __version__

    return HfApi(library_name="hub_magmax", library_version=__version__)


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


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while reading into a SourceError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.RevisionResolutionError, OSError)
    try:
        yield
    except known as error:
        for name, what, hint in _REFUSALS:
            if isinstance(error, getattr(errors, name)):
                status = getattr(getattr(error, "response", None), "status_code", None)
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


def resolve_commit(repo_id: str, revision: str | None) -> str:
    """Return the 40-digit commit that `revision` (None: the default branch) names now.

    Works offline from the local cache.
    """
    name = f"{repo_id}@{revision}" if revision else repo_id
    with hub_errors(name):
        return str(hub_api().resolve_revision(repo_id, revision=revision).resolved)


def open_hub(repo_id: str, commit: str) -> TensorSource:
    """Open a repository at a commit; from the local cache when offline."""
    from huggingface_hub import constants, snapshot_download

    label = f"{repo_id}@{commit[:7]}"
    if constants.HF_HUB_OFFLINE:
        with hub_errors(label):
            folder = snapshot_download(repo_id, revision=commit, local_files_only=True)
        return LocalSource(Path(folder), label)
    return HubSource(repo_id, commit)


class HubSource(_Source):
    """A model repository at one commit.

    Weight files are read by HTTP ranges from where the Hub keeps them; one request resolves a
    file, and ranges follow until the signed address expires. A file that is complete in the
    local cache is read there. The last `WINDOW_BYTES` (or the current tensor, if larger) stay
    in memory, so that a second look at a tensor costs no second request.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.label = f"{repo_id}@{commit[:7]}"
        self._locations: dict[str, str] = {}
        self._cached: dict[str, LocalSource | None] = {}
        self._window: tuple[str, int, bytearray] = ("", 0, bytearray())

    @cached_property
    def _siblings(self) -> dict[str, Any]:
        with hub_errors(self.label):
            info = hub_api().model_info(
                self.repo_id, revision=self.commit, files_metadata=True, timeout=_TIMEOUT_SECONDS
            )
        return {file.rfilename: file for file in sorted(info.siblings or [], key=lambda f: f.rfilename)}

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

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        if (local := self._in_cache(path)) is not None:
            local.read_into(path, start, buffer)
            return
        # Headers and side files: a window that most of them fit in, and no more.
        buffer[:] = self._from_window(path, start, start + len(buffer), HEADER_WINDOW_BYTES)

    def read(self, name: str, start: int, stop: int) -> Any:
        info = self.index.tensors[name]
        if self._in_cache(info.file) is None:
            # The whole tensor at once, so that later chunks and passes find it here.
            self._from_window(info.file, info.start_byte, info.stop_byte, WINDOW_BYTES)
        return super().read(name, start, stop)

    def _in_cache(self, path: str) -> LocalSource | None:
        if path not in self._cached:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(self.repo_id, path, revision=self.commit)
            self._cached[path] = (
                LocalSource(Path(found).parent, self.label) if isinstance(found, str) else None
            )
        return self._cached[path]

    def _from_window(self, path: str, start: int, stop: int, window_bytes: int) -> memoryview:
        held, first, content = self._window
        if held != path or start < first or stop > first + len(content):
            self._window = ("", 0, bytearray())  # free it before fetching the next
            last = min(max(stop, start + window_bytes), self.sizes[path])
            first, content = start, bytearray()
            for position in range(start, last, REQUEST_BYTES):
                content += self._fetch(path, position, min(position + REQUEST_BYTES, last))
            self._window = (path, first, content)
        return memoryview(content)[start - first : stop - first]

    def _fetch(self, path: str, start: int, stop: int) -> bytes:
        """Return a range of a file, following the file's signed address anew when it has expired."""
        where = f"{self.label}, {path}"
        for fresh in (False, True):
            if fresh or path not in self._locations:
                self._locations[path] = self._locate(path, where)
            response = self._get(self._locations[path], start, stop, where)
            if response.status_code in (401, 403) and not fresh:
                continue
            return _checked_body(response, start, stop, where)
        raise AssertionError("unreachable")

    def _locate(self, path: str, where: str) -> str:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with hub_errors(where):
            url = hf_hub_url(self.repo_id, path, revision=self.commit)
            found = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS, retry_on_errors=True)
        return str(found.location)

    def _get(self, url: str, start: int, stop: int, where: str) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, http_backoff

        from hub_magmax import __version__

        same_host = urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc
        headers = build_hf_headers(
            token=None if same_host else False,  # a signed address needs no token, and must not see it
            library_name="hub_magmax",
            library_version=__version__,
        )
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with hub_errors(where):
            return http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS)


def _checked_body(response: Any, start: int, stop: int, where: str) -> bytes:
    """Return exactly the bytes asked for; a server may ignore the range, or stop early."""
    body: bytes = response.content
    if response.status_code == 206:
        said = response.headers.get("Content-Range", "")
        if said.split("/")[0] == f"bytes {start}-{stop - 1}" and len(body) == stop - start:
            return body
    elif response.status_code == 200 and len(body) >= stop:
        return body[start:stop]
    raise CheckpointError(
        f"asked for bytes {start:,} to {stop:,}, and the server sent {len(body):,} bytes with status "
        f"{response.status_code}",
        where=where,
        hint="Run the same command again; if it stays, the server or a proxy breaks HTTP ranges.",
    )
