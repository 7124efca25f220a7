"""Files of selections: coded choices of tensors in blocks, with a digest of each tensor's merged values.

A file is in the safetensors format: an array of bytes for each merged tensor and, in `__metadata__` under
`hub_magmax_selection`, the format's version and the sha256 of each tensor's values in the output. The bytes
are blocks of `BLOCK_ELEMENTS` elements, the last one shorter: four bytes with the length of a code, little
end first, then the code of the choices (`coding.encode`) of those elements on which not all tasks agree.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from hub_magmax.checkpoints.headers import DAMAGED, parse_json, read_safetensors
from hub_magmax.checkpoints.index import SELECTION_SUFFIX, TensorInfo
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError, LockError
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.output.shard import ShardFile
from hub_magmax.merging.selections.coding import CodeError, decode, encode
from hub_magmax.text import listed, shown

#: Elements of a tensor that are coded together.
BLOCK_ELEMENTS = 2**16

_KEY, _VERSION = "hub_magmax_selection", 1
_LENGTH = struct.Struct("<I")

#: Bytes of a code at most: as many as elements, the list of values, and what deflate adds to random bytes.
_MOST_BYTES = 2 * BLOCK_ELEMENTS

#: Checkpoints that an error names.
_MOST_NAMED = 6


class Blocks:
    """Coded blocks of a file in the making, in the order in which they are finished.

    They lie in a file without a name, so that nothing is left of them however a process ends.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = tempfile.TemporaryFile(dir=folder), Lock()  # noqa: SIM115, closed by `close`
        self._size = 0

    def add(self, content: bytes) -> tuple[int, int]:
        """Keep bytes, and return their place and length."""
        with self._lock:
            place, self._size = self._size, self._size + len(content)
            self._file.seek(place)
            self._file.write(content)
        return place, len(content)

    def read(self, place: int, length: int) -> bytes:
        """Return bytes that were kept."""
        with self._lock:
            self._file.seek(place)
            return self._file.read(length)

    def close(self) -> None:
        """Free the memory and the disk that the blocks take."""
        self._file.close()


class CodedTensor:
    """The choices of one tensor, coded chunk by chunk from its first element on."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._places = blocks, list[tuple[int, int]]()
        self._digest = sha256()

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self._places)

    @property
    def sha256(self) -> str:
        """Of the values so far."""
        return self._digest.hexdigest()

    def add(
        self, found: UInt8[np.ndarray, " chunk"], is_open: Bool[np.ndarray, " chunk"], merged: Stored
    ) -> None:
        """Add a chunk, of a multiple of `BLOCK_ELEMENTS` elements unless it is the last one.

        Args:
            found: The choice of every element.
            is_open: Whether an element needs it.
            merged: Values of the output.
        """
        codes = []
        for start in range(0, len(found), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            code = encode(found[block][is_open[block]])
            codes += [_LENGTH.pack(len(code)), code]
        self._places.append(self._blocks.add(b"".join(codes)))
        self._digest.update(merged.content)

    def pieces(self) -> Iterator[bytes]:
        """Yield the coded bytes in order."""
        return (self._blocks.read(*place) for place in self._places)


def write_selection(file: ShardFile, tensors: Mapping[str, CodedTensor], metadata: Mapping[str, str]) -> None:
    """Write the header and the codes of a file.

    Args:
        file: To be written to, from its first byte on.
        tensors: In order, by name.
        metadata: Of the header, besides its own.
    """
    own = {"version": _VERSION, "sha256": {name: tensor.sha256 for name, tensor in tensors.items()}}
    entries: dict[str, Any] = {"__metadata__": {**metadata, _KEY: json.dumps(own, ensure_ascii=False)}}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.num_bytes]
        entries[name] = {"dtype": "U8", "shape": [tensor.num_bytes], "data_offsets": offsets}
        position += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header = struct.pack("<Q", len(text)) + text
    file.write(header, 0)
    position = len(header)
    for tensor in tensors.values():
        for piece in tensor.pieces():
            file.write(piece, position)
            position += len(piece)


class StoredChoices:
    """The choices of one tensor, decoded chunk by chunk from its first element on.

    Args:
        source: What holds the file.
        info: The place of the tensor's codes.
        sha256: Of the tensor's values in the output, as the file has it.
        suspects: Names of checkpoints of which only the headers were compared with the lock.
    """

    def __init__(
        self, source: TensorSource, info: TensorInfo, sha256: str, suspects: Sequence[str] = ()
    ) -> None:
        self._source, self._info, self._sha256, self._suspects = source, info, sha256, suspects
        self._position = info.start_byte

    def next(self, is_open: Bool[np.ndarray, " chunk"], num_tasks: int) -> UInt8[np.ndarray, " chunk"]:
        """Return the choices of the next elements, 0 where none is needed.

        Args:
            is_open: Of a multiple of `BLOCK_ELEMENTS` elements, or of all that are left.
            num_tasks: Of which one is chosen.

        Raises:
            LockError: If the codes do not fit the elements.
        """
        found = np.zeros(len(is_open), np.uint8)
        for start in range(0, len(is_open), BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if length > _MOST_BYTES:
                raise self._unfit()
            try:
                found[block][is_open[block]] = decode(self._read(length), int(is_open[block].sum()))
            except CodeError as error:
                raise self._unfit() from error
        if found.max(initial=0) >= num_tasks:
            raise self._unfit()
        return found

    def finish(self, digest: str) -> None:
        """Check that all codes were used, and that the values are those of the merge.

        Raises:
            LockError: If codes are left, or the values are others.
        """
        if self._position != self._info.stop_byte or digest != self._sha256:
            raise self._unfit()

    def _read(self, count: int) -> bytes:
        start, stop = self._position, self._position + count
        if stop > self._info.stop_byte:
            raise self._unfit()
        self._position = stop
        return self._source.read_bytes(self._info.file, start, stop)

    def _unfit(self) -> LockError:
        tensor = f"tensor {shown(self._info.name)}"
        if self._suspects:
            return LockError(
                "values are not those that the selection was made of, so a checkpoint changed since, or the "
                "selection is damaged",
                where=f"{listed(self._suspects, _MOST_NAMED)}, {tensor}",
                hint="Bring back the checkpoints as they were, or merge again; `hub-magmax verify "
                f"{self._source.label}` tells whether the selection is as it was.",
            )
        return LockError(
            "what is selected does not fit the checkpoints, which are as they were, so it is damaged",
            where=f"{self._source.label}, {self._info.file}, {tensor}",
            hint=DAMAGED,
        )


@dataclass(frozen=True)
class StoredSelection:
    """The choices of all tensors of a selection.

    Attributes:
        source: The folder, or the repository.
        tensors: The place of each tensor's codes, by name.
        digests: The sha256 of each tensor's values in the output, by name.
        locks: Digests of the locks that its files were made by; one, unless files were mixed.
    """

    source: TensorSource
    tensors: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    locks: frozenset[str]

    @classmethod
    def of(cls, source: TensorSource) -> StoredSelection:
        """Read the headers of all files of a selection.

        Raises:
            CheckpointError: If a file is malformed, or of another version.
        """
        tensors: dict[str, TensorInfo] = {}
        digests: dict[str, str] = {}
        locks: set[str] = set()
        for file, size in source.sizes.items():
            if file.endswith(SELECTION_SUFFIX):
                where = f"{source.label}, {file}"
                shard, found = read_safetensors(file, size, source.read_bytes, where)
                tensors |= found
                digests |= _digests(_described(shard.metadata, _KEY, where), found, where)
                locks.add(str(_described(shard.metadata, "hub_magmax", where).get("lock")))
        return cls(source, tensors, digests, frozenset(locks))

    def choices(self, tensor: str, suspects: Sequence[str] = ()) -> StoredChoices:
        """Return the choices of a tensor.

        Args:
            tensor: Its name.
            suspects: Checkpoints that are to be named where the values are others; see `StoredChoices`.

        Raises:
            CheckpointError: If there are none.
        """
        if tensor not in self.tensors:
            raise CheckpointError(
                f"the selection has no tensor {shown(tensor)}", where=self.source.label, hint=DAMAGED
            )
        return StoredChoices(self.source, self.tensors[tensor], self.digests[tensor], suspects)


def _described(metadata: Mapping[str, str], key: str, where: str) -> Mapping[str, Any]:
    """Return the mapping that a header's metadata hold as JSON under a key."""
    try:
        own = parse_json(metadata.get(key, "").encode(), where)
    except UnicodeEncodeError:  # half of a character
        own = None
    if not isinstance(own, dict):
        raise _refused(where)
    return own


def _refused(where: str) -> CheckpointError:
    return CheckpointError(
        "the header does not describe a selection of this version", where=where, hint=DAMAGED
    )


def _digests(own: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> dict[str, str]:
    """Return the sha256 of each tensor's values that a header states."""
    digests = own.get("sha256")
    if own.get("version") != _VERSION or not isinstance(digests, dict):
        raise _refused(where)
    is_stated = all(isinstance(digests.get(name), str) for name in tensors)
    if not is_stated or any(info.dtype != "U8" for info in tensors.values()):
        raise _refused(where)
    return {name: digests[name] for name in tensors}
