"""Shards, in which Xet says of which chunks of which xorbs files consist.

All of it is rows of 48 bytes: a hash of 32, and four little-endian numbers. Rows of files come first, rows
of xorbs second, and each part ends with a row whose hash is all ones.

Source: Xet protocol specification 1.1, "MDB shard file format specification".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.local_hub.wire import RefusalError

_ROW = struct.Struct("<32s4I")
_WORDS = struct.Struct("<4Q")
_TAG = b"HFRepoMetaData\0" + bytes.fromhex("55696745 6a7b8157 83a5bdd9 5ccdd14a a9")
_HEADER = struct.Struct("<32s2Q")
# Version, where both parts begin, where three indices begin and how long they are, a key, two times, reserved
# space, and where the footer itself begins.
_FOOTER = struct.Struct("<3Q6Q32x2Q72xQ")
_VERSION, _FOOTER_VERSION = 2, 1
_END = _ROW.pack(b"\xff" * 32, 0, 0, 0, 0)
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Term:
    """Part of a file: the chunks from `start` up to `stop` of a xorb, `num_bytes` when unpacked."""

    xorb: str
    num_bytes: int
    start: int
    stop: int


@dataclass(frozen=True)
class XetFile:
    """A file as Xet knows it; `hash` is Xet's own, `sha256` the content's."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def num_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)


@dataclass(frozen=True)
class XorbRows:
    """What a shard says of a xorb: the hashes of its chunks, and the rows themselves."""

    hash: str
    chunks: tuple[str, ...]
    rows: bytes


@dataclass(frozen=True)
class Shard:
    """A shard that was read."""

    files: tuple[XetFile, ...]
    xorbs: tuple[XorbRows, ...]


def text_of(digest: bytes) -> str:
    """Write a hash as Xet does: each 8 bytes as one little-endian number, in hexadecimal."""
    return "".join(f"{word:016x}" for word in _WORDS.unpack(digest))


def parse(content: bytes) -> Shard:
    """Read a shard as clients upload it.

    Raises:
        RefusalError: 400, if it is not one, or a file has no sha256.
    """
    try:
        tag, version, _ = _HEADER.unpack_from(content)
        if tag != _TAG or version != _VERSION:
            raise RefusalError(400, "This is not a shard of version 2")
        rows = _Rows(content, _HEADER.size)
        return Shard(tuple(_files(rows)), tuple(_xorbs(rows)))
    except struct.error as error:
        raise RefusalError(400, "The shard ends too early") from error


class _Rows:
    """Reads one row after the other."""

    def __init__(self, content: bytes, position: int) -> None:
        self.content, self.position = content, position

    def next(self) -> tuple[bytes, int, int, int, int]:
        row: tuple[bytes, int, int, int, int] = _ROW.unpack_from(self.content, self.position)
        self.position += _ROW.size
        return row

    def blocks(self) -> Iterator[tuple[bytes, int, int]]:
        """Return hash, flags and number of entries of each block's first row, until the part ends."""
        while (first := self.next())[0] != b"\xff" * 32:
            yield first[:3]


def _files(rows: _Rows) -> Iterator[XetFile]:
    for digest, flags, num_terms in rows.blocks():
        terms = []
        for _ in range(num_terms):
            xorb, _, num_bytes, start, stop = rows.next()
            terms.append(Term(text_of(xorb), num_bytes, start, stop))
        rows.position += num_terms * _ROW.size if flags & _VERIFIED else 0
        if not flags & _WITH_SHA256:
            raise RefusalError(400, "A file of a repository needs its sha256 in the shard")
        yield XetFile(text_of(digest), text_of(rows.next()[0]), tuple(terms))


def _xorbs(rows: _Rows) -> Iterator[XorbRows]:
    for digest, _, num_chunks in rows.blocks():
        start = rows.position - _ROW.size
        chunks = tuple(text_of(rows.next()[0]) for _ in range(num_chunks))
        yield XorbRows(text_of(digest), chunks, rows.content[start : rows.position])


def describe(xorb: XorbRows, *, made_seconds: int, expires_seconds: int) -> bytes:
    """Write the shard that tells a client which chunks a xorb holds, so that it need not send them."""
    head = _HEADER.pack(_TAG, _VERSION, _FOOTER.size) + _END
    body = head + xorb.rows + _END
    # hf_xet takes the number of rows from where the first index begins, so empty indices have a place too;
    # the specification calls these fields reserved, and with zeros there hf_xet 1.8 aborts.
    indices = 3 * (len(body), 0)
    starts = (_FOOTER_VERSION, _HEADER.size, len(head))
    return body + _FOOTER.pack(*starts, *indices, made_seconds, expires_seconds, len(body))
