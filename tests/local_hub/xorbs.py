"""Xorbs, the containers in which Xet sends pieces of files: chunk after chunk, and perhaps a footer.

A chunk is a header of 8 bytes and a packed body: version (0), packed size (3 bytes), packing, size (3 bytes);
numbers are little-endian. What the footer says can be computed from the chunks, so it is passed over.

Source: Xet protocol specification 1.1, "Xorb formation & serialization format".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.local_hub.wire import RefusalError

_HEADER_BYTES = 8
_FOOTER_TAG = b"XETBLOB"
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)


@dataclass(frozen=True)
class Chunk:
    """One chunk; its packed body begins at `start` of the xorb, and is `num_bytes` long when unpacked."""

    start: int
    packed_bytes: int
    packing: int
    num_bytes: int

    @property
    def header_start(self) -> int:
        return self.start - _HEADER_BYTES

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.packed_bytes


def layout(path: Path) -> tuple[Chunk, ...]:
    """Return the chunks of a xorb in order, reading headers only.

    Raises:
        RefusalError: 400, if these are no chunks, or not all of the last one.
    """
    num_bytes, position = path.stat().st_size, 0
    chunks: list[Chunk] = []
    with path.open("rb") as file:
        while position < num_bytes:
            file.seek(position)
            header = file.read(_HEADER_BYTES)
            if header.startswith(_FOOTER_TAG):
                _check_footer(file, num_bytes - position)
                break
            chunk = _chunk(header, position)
            if chunk.stop > num_bytes:
                raise RefusalError(400, f"The xorb ends within chunk {len(chunks)}")
            chunks.append(chunk)
            position = chunk.stop
    if not chunks:
        raise RefusalError(400, "The xorb holds no chunk")
    return tuple(chunks)


def _chunk(header: bytes, position: int) -> Chunk:
    if len(header) < _HEADER_BYTES or header[0] != 0 or header[4] > _GROUPED_LZ4:
        raise RefusalError(400, f"There is no chunk at byte {position} of the xorb")
    packed, unpacked = (int.from_bytes(header[start : start + 3], "little") for start in (1, 5))
    return Chunk(position + _HEADER_BYTES, packed, header[4], unpacked)


def _check_footer(file: BinaryIO, num_bytes: int) -> None:
    """Compare the footer's size with the one in its last 4 bytes, which they do not count in."""
    file.seek(-4, 2)
    if int.from_bytes(file.read(), "little") != num_bytes - 4:
        raise RefusalError(400, "The xorb ends within its footer")


def contents(path: Path, chunks: tuple[Chunk, ...]) -> Iterator[bytes]:
    """Return the unpacked content of chunks, one after the other.

    Raises:
        RefusalError: 400, if a body cannot be unpacked.
    """
    with path.open("rb") as file:
        for chunk in chunks:
            file.seek(chunk.start)
            yield _unpacked(file.read(chunk.packed_bytes), chunk)


def _unpacked(body: bytes, chunk: Chunk) -> bytes:
    if chunk.packing != _PLAIN:
        import pyarrow

        try:
            body = pyarrow.decompress(body, chunk.num_bytes, codec="lz4", asbytes=True)
        except OSError as error:
            raise RefusalError(400, f"A chunk of the xorb cannot be unpacked: {error}") from error
    if len(body) != chunk.num_bytes:
        raise RefusalError(400, "A chunk of the xorb has another size than it says")
    return _ungrouped(body) if chunk.packing == _GROUPED_LZ4 else body


def _ungrouped(grouped: bytes) -> bytes:
    """Put bytes back in their order that were sorted by their place in groups of four."""
    content, start = bytearray(len(grouped)), 0
    for place in range(4):
        num_bytes = len(range(place, len(grouped), 4))
        content[place::4] = grouped[start : start + num_bytes]
        start += num_bytes
    return bytes(content)
