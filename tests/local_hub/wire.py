"""What travels between a client and the local Hub: requests, responses, ranges, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hub_magmax.errors import SourceError

BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


class RefusalError(SourceError):
    """The Hub says no.

    Args:
        status: HTTP status.
        message: One sentence for a person, sent as `X-Error-Message`.
        code: What clients tell errors apart by, sent as `X-Error-Code`; empty for none.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def response(self) -> Response:
        """Return the answer that carries this refusal."""
        headers = {"X-Error-Message": self.what, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_response({"error": self.what}, status=self.status, headers=headers)


@dataclass(frozen=True)
class FileSlice:
    """Part of a file on disk, never held in memory as a whole."""

    path: Path
    start: int
    num_bytes: int

    def __len__(self) -> int:
        return self.num_bytes

    def cut(self, start: int, num_bytes: int) -> FileSlice:
        """Return the part of this slice that starts `start` bytes into it."""
        return FileSlice(self.path, self.start + start, num_bytes)

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Read the slice in order, `block_bytes` at a time."""
        left = self.num_bytes
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left and (block := file.read(min(block_bytes, left))):
                left -= len(block)
                yield block


@dataclass(frozen=True)
class Response:
    """An answer; the server adds `Content-Length`."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | FileSlice = b""

    def cut(self, num_bytes: int) -> bytes | FileSlice:
        """Return the first `num_bytes` of the content."""
        if isinstance(self.content, bytes):
            return self.content[:num_bytes]
        return self.content.cut(0, min(num_bytes, len(self.content)))

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Return the content in order, `block_bytes` at a time."""
        if isinstance(self.content, FileSlice):
            yield from self.content.blocks(block_bytes)
            return
        for start in range(0, len(self.content), block_bytes):
            yield self.content[start : start + block_bytes]


class Body:
    """The bytes a client sends, read once and in order, of known length or in chunks.

    Args:
        stream: The connection.
        num_bytes: The announced length; None when the client sends chunks.
        on_bytes: Called with the size of every piece that arrived; may raise.
    """

    def __init__(
        self, stream: BufferedIOBase, num_bytes: int | None, on_bytes: Callable[[int], None]
    ) -> None:
        self.num_bytes = num_bytes
        self._stream, self._on_bytes = stream, on_bytes
        self._chunked = num_bytes is None
        self._left = num_bytes or 0
        self._ended = num_bytes == 0

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Read what is left, in pieces of at most `block_bytes`."""
        while block := self._read(block_bytes):
            yield block

    def lines(self) -> Iterator[bytes]:
        """Read what is left, split after line feeds, holding one line at a time."""
        pending = bytearray()
        for block in self.blocks():
            pending += block
            if b"\n" in block:
                *lines, rest = bytes(pending).split(b"\n")
                yield from lines
                pending = bytearray(rest)
        if pending:
            yield bytes(pending)

    def json(self) -> Any:
        """Read what is left as one JSON value; nothing at all is an empty object."""
        try:
            return json.loads(b"".join(self.blocks()) or b"{}")
        except ValueError as error:
            raise RefusalError(400, f"Malformed JSON in the request: {error}") from error

    def drain(self) -> None:
        """Read and forget what is left, so that the connection can serve another request."""
        for _ in self.blocks():
            pass

    def _read(self, num_bytes: int) -> bytes:
        if self._chunked and not self._left and not self._ended:
            self._next_chunk()
        if self._ended or not self._left:
            return b""
        block = self._stream.read1(min(num_bytes, self._left))
        if not block:
            raise ConnectionError("the client went away before it had sent its whole request")
        self._left -= len(block)
        if self._chunked and not self._left:
            self._stream.readline()
        self._on_bytes(len(block))
        return bytes(block)

    def _next_chunk(self) -> None:
        self._left = int(self._stream.readline().split(b";")[0] or b"0", 16)
        if not self._left:
            self._ended = True
            while self._stream.readline().strip():
                pass


@dataclass(frozen=True)
class Request:
    """A question; header names are in lower case."""

    method: str
    target: str
    """The path as it was sent, percent-encoded, without the query."""
    query: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, str]
    body: Body

    @property
    def path(self) -> str:
        """The path with percent-encoding undone."""
        return unquote(self.target)

    @property
    def host(self) -> str:
        return self.headers.get("host", "")

    @property
    def range(self) -> str:
        return self.headers.get("range", "")

    @property
    def bearer(self) -> str:
        """The token sent with the request; empty for none."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""

    def flag(self, name: str) -> bool:
        """Say whether a parameter of the query is set to something true."""
        return self.query.get(name, ("",))[-1].lower() in ("1", "true")

    def without_range(self) -> Request:
        """Return the same request for the whole file."""
        headers = {name: value for name, value in self.headers.items() if name != "range"}
        return Request(self.method, self.target, self.query, headers, self.body)


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `value` as JSON; what JSON cannot hold (a date of a card) as text."""
    content = json.dumps(value, default=str).encode()
    return Response(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, content)


def file_response(request: Request, path: Path, num_bytes: int, headers: Mapping[str, str]) -> Response:
    """Return a file, or the one range of it that was asked for.

    A range in a form that servers may ignore (several ranges, another unit) gives the whole file.

    Raises:
        RefusalError: 416, if the range starts after the last byte.
    """
    headers = {"Accept-Ranges": "bytes", **headers}
    asked = bounds(request.range, num_bytes)
    if asked is None:
        return Response(200, headers, FileSlice(path, 0, num_bytes))
    start, stop = asked
    if start >= stop:
        unsatisfied = {**headers, "Content-Range": f"bytes */{num_bytes}"}
        raise RefusalError(416, "The requested range is not satisfiable", headers=unsatisfied)
    content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{num_bytes}"}
    return Response(206, {**headers, **content_range}, FileSlice(path, start, stop - start))


def bounds(range_header: str, num_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and the one after the last; None when there is no range to honour.

    The first may lie behind the end: then there is nothing to return.
    """
    match = _RANGE.match(range_header.replace(" ", ""))
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return max(0, num_bytes - int(last)), num_bytes
    if last and int(last) < int(first):
        return None
    return int(first), min(num_bytes, int(last) + 1) if last else num_bytes
