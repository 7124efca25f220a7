"""Checkpoints as sources of tensors: a folder, or memory.

A source answers two questions: which files it has, and which bytes lie in a range of one of
them. Everything else (headers, tensors) is built on that here, the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from threading import local
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo, read_index
from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.stored import Stored, bits_dtype

if TYPE_CHECKING:
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

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return what `read` does, as a file has it.

        Args:
            name: Of the tensor.
            start, stop: First element, and the one after the last.
            out: What to fill with bits, without gaps, and return; a source whose values are not stored
                anywhere returns an array of its own all the same.
        """
        ...

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        """Note that these tensors are going to be read, in this order and each from front to back.

        A source that is far away fetches them ahead, holding about `budget_bytes`; one on this machine has
        the system do so. What was read of a tensor is kept until `release`, or until the next tensor is
        read, so that it can be read again.

        Args:
            names: Of the tensors.
            budget_bytes: How much may be held of what is not read yet.
            in_part: Only some elements of each are going to be read. Where these alone can be fetched,
                nothing is fetched ahead.
        """
        ...

    def release(self, name: str, stop: int) -> None:
        """Note that nothing before the element `stop` of a tensor is going to be read again."""
        ...

    def close(self) -> None: ...


#: Places in memory and in a file that are this near, seen from the start of a page, are slow to copy between.
_NEAR_BYTES = 64
_PAGE_BYTES = 4096


class RowMemory(local):
    """Memory for rows of values that are read from files, used again by every call; each thread has its own.

    Fresh memory for every chunk costs as much as reading into it: the system gives and takes it page by page.

    On processors of AMD the system copies five times as slowly where memory lies up to 31 bytes after the
    place in the file, both seen from the start of a page (2 GB/s instead of 8, measured; the C library has
    the same with `rep movsb`, its bug 30994). Headers of checkpoints are as long as they are, so this is met
    by accident, with all rows at once. Hence the rows begin where none of them is met by it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def rows(self, dtype: np.dtype[Any], length: int, start_bytes: Sequence[int]) -> np.ndarray:
        """Return memory for values that lie at these places in their files: contiguous rows, not filled."""
        row_bytes = length * dtype.itemsize
        num_bytes = len(start_bytes) * row_bytes
        if len(self._memory) < num_bytes + _PAGE_BYTES:
            self._memory = np.empty(num_bytes + _PAGE_BYTES, np.uint8)
        first = self._memory.ctypes.data
        apart = [first + row * row_bytes - start for row, start in enumerate(start_bytes)]
        shifts = range(-first % _NEAR_BYTES, _PAGE_BYTES, _NEAR_BYTES)
        good = (s for s in shifts if not any(0 < (s + a) % _PAGE_BYTES < _NEAR_BYTES for a in apart))
        shift = next(good, shifts[0])
        return self._memory[shift : shift + num_bytes].view(dtype).reshape(len(start_bytes), length)


class _Source:
    """What all sources share: an index read once, and tensors as ranges of bytes."""

    label: str

    #: The file of weights, or the index, that counts where there are several.
    weights = ""

    @property
    def sizes(self) -> Mapping[str, int]:
        raise NotImplementedError

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on, or raise SourceError."""
        raise NotImplementedError

    @property
    def origin(self) -> str:
        """What `from_pretrained` takes to load the checkpoint, as Python writes it."""
        return repr(self.label)

    @cached_property
    def index(self) -> CheckpointIndex:
        return read_index(self.label, self.sizes, self.read_bytes, self.weights, self.origin)

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.read_stored(name, start, stop).tensor

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        info = self.index.tensors[name]
        dtype = bits_dtype(info.dtype)
        start_byte = info.start_byte + start * dtype.itemsize
        bits = RowMemory().rows(dtype, stop - start, [start_byte])[0] if out is None else out
        assert bits.shape == (stop - start,) and bits.dtype == dtype
        if stop > start:
            # The array's own memory is the read buffer: no copy, no zeroing.
            self.read_into(info.file, start_byte, bits.view(np.uint8).data)
        return Stored(bits, info.dtype)

    # What lies in memory is there when it is wanted.

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        pass

    def release(self, name: str, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


class MemorySource(_Source):
    """A checkpoint held in memory: files by name, or tensors, which are laid out as one file."""

    def __init__(self, files: Mapping[str, bytes], label: str = "memory", weights: str = "") -> None:
        self.files, self.label, self.weights = dict(files), label, weights

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
