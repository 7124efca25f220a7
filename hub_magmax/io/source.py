"""Checkpoints as sources of tensors: a folder, or memory.

A source answers two questions: which files it has, and which bytes lie in a range of one of
them. Everything else (headers, tensors) is built on that here, the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hub_magmax.checkpoint import CheckpointIndex, TensorInfo, read_index
from hub_magmax.errors import CheckpointError, SourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorSource(Protocol):
    """A checkpoint whose tensors can be read in pieces.

    Attributes:
        label: What it is called in messages.
        sizes: Bytes of every file, by path relative to the checkpoint, sorted.
    """

    label: str

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def index(self) -> CheckpointIndex: ...

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)` of a file, all of them or an error."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat, in its stored dtype."""
        ...

    def close(self) -> None: ...


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a safetensors dtype such as "BF16"."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
        "BOOL": torch.bool, "C64": torch.complex64,
    }[name]  # fmt: skip


class _Source:
    """What all sources share: an index read once, and tensors as ranges of bytes."""

    label: str

    @property
    def sizes(self) -> Mapping[str, int]:
        raise NotImplementedError

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on, or raise SourceError."""
        raise NotImplementedError

    @cached_property
    def index(self) -> CheckpointIndex:
        return read_index(self.label, self.sizes, self.read_bytes)

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        import torch

        info = self.index.tensors[name]
        dtype = torch_dtype(info.dtype)
        tensor = torch.empty(stop - start, dtype=dtype)
        if stop > start:
            # The tensor's own memory is the read buffer: no copy, no zeroing.
            buffer = memoryview(tensor.view(torch.uint8).numpy().data)
            self.read_into(info.file, info.start_byte + start * dtype.itemsize, buffer)
        return tensor

    def close(self) -> None:
        pass


class LocalSource(_Source):
    """A checkpoint folder on this machine."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder, self.label = folder, label or str(folder)
        self._descriptors: dict[str, int] = {}
        if not folder.is_dir():
            raise SourceError(
                "there is no such folder" if not folder.exists() else "this is a file, not a folder",
                where=self.label,
                expected="a checkpoint folder, as written by `save_pretrained`",
                hint="Check the path; relative paths start at the recipe's own folder.",
            )

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {path.name: path.stat().st_size for path in files}

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(self.folder / path, os.O_RDONLY)
            done = 0
            while done < len(buffer):  # one call moves at most 2 GiB
                count = os.preadv(self._descriptors[path], [buffer[done:]], start + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise SourceError(f"cannot be read ({error.strerror})", where=f"{self.label}, {path}") from error
        if done < len(buffer):
            raise CheckpointError(
                f"ends at byte {start + done:,}; {start + len(buffer):,} were there when the header was read",
                where=f"{self.label}, {path}",
                hint="Something changed the file during the merge; start again.",
            )

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class MemorySource(_Source):
    """A checkpoint held in memory: files by name, or tensors, which are laid out as one file."""

    def __init__(self, files: Mapping[str, bytes], label: str = "memory") -> None:
        self.files, self.label = dict(files), label

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], label: str = "memory") -> MemorySource:
        from safetensors.torch import save

        return cls({"model.safetensors": save(dict(tensors), metadata={"format": "pt"})}, label)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {path: len(content) for path, content in sorted(self.files.items())}

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        content = self.files[path][start : start + len(buffer)]
        if len(content) != len(buffer):
            raise CheckpointError(f"ends at byte {len(self.files[path]):,}", where=f"{self.label}, {path}")
        buffer[:] = content


def tensor_place(source: TensorSource, info: TensorInfo, element: int) -> str:
    """Return where an element of a tensor lies, for a message."""
    item_bytes = info.num_bytes // max(info.num_elements, 1)
    return (
        f"{source.label}, {info.file}, tensor {info.name!r}, byte {info.start_byte + element * item_bytes:,}"
    )
