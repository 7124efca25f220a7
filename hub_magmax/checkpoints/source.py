"""Checkpoints as sources of tensors: the protocol, its base for files, and a source in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from threading import local
from typing import Any, NamedTuple, Protocol

import numpy as np

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.listing import Listing
from hub_magmax.checkpoints.weight_files import read_index
from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.lazy_imports import Tensor
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.methods.factors import Factors


class TensorFile(NamedTuple):
    """A tensor's bytes in a file on this machine, for compiled loops.

    Attributes:
        reading: Lends the file's descriptor. What was read meanwhile counts if it ends without an error.
        start_byte: Of the tensor in the file.
        path: Of the file on this machine: one checkpoint can be read from several folders.
    """

    reading: Callable[[], AbstractContextManager[int]]
    start_byte: int
    path: str


class Folder(NamedTuple):
    """Contents of one folder of a checkpoint, by paths from the checkpoint's top, sorted.

    Attributes:
        sizes: Bytes of every file that lies in it.
        folders: Its own sub-folders.
    """

    sizes: Mapping[str, int]
    folders: tuple[str, ...]

    @classmethod
    def among(cls, paths: Mapping[str, int], folder: str) -> Folder:
        """Return a folder's contents from the sizes of all files."""
        start = f"{folder}/" if folder else ""
        below = {path: size for path, size in sorted(paths.items()) if path.startswith(start)}
        nested = (path[: path.index("/", len(start))] for path in below if "/" in path[len(start) :])
        files = {path: size for path, size in below.items() if "/" not in path[len(start) :]}
        return cls(files, tuple(dict.fromkeys(nested)))


class TensorSource(Protocol):
    """A checkpoint whose tensors can be read in pieces; a subclass can leave out the methods with defaults.

    Attributes:
        label: Its name in messages.
        sizes: Bytes of every file at its top, by name, sorted.
        index: Its tensors and weight files.
        is_shared: Several merges read each tensor in turn, so that `release` frees nothing.
    """

    label: str
    is_shared: bool = False

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def index(self) -> CheckpointIndex: ...

    def contents(self, path: str) -> Folder:
        """Return the contents of a folder below the top, or of the top (an empty path); nothing is followed.

        A folder that is not there is empty.
        """
        return Folder.among(self.sizes, path)

    def size_of(self, path: str) -> int | None:
        """Return the bytes of a file at the top or below it, or None if there is none."""
        if "/" not in path:
            return self.sizes.get(path)
        return self.contents(path.rpartition("/")[0]).sizes.get(path)

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)` of a file, all of them or an error."""
        ...

    def stated_hashes(self, path: str) -> str | None:
        """Return the hashes that the place states for a file, as `side_files.content_hashes` writes them."""
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements `[start, stop)` of a tensor, flat, in its stored dtype."""
        return self.read_stored(name, start, stop).tensor

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        """Return the same elements in their stored form.

        Args:
            name: Of the tensor.
            start, stop: First element, and the one after the last.
            out: Array to fill with bits, without gaps, and return; a source whose values are computed
                returns an array of its own all the same.
        """
        ...

    def stored_name(self, name: str) -> str:
        """Return what a tensor is called in the checkpoint's files."""
        return name

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        """Yield what is read of files to read a tensor: stored tensors, each with the source that has it."""
        yield self, self.index.tensors[name]

    def tensor_file(self, name: str) -> TensorFile | None:
        """Return a tensor's place in a file on this machine, or None if it has none."""
        return None

    def keeps(self, name: str) -> bool:
        """Say whether a tensor is known to be that of the base model, without a look at its values."""
        return False

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        """Note that these tensors are going to be read, in this order and each from front to back.

        A remote source fetches them ahead, holding about `budget_bytes`; a folder asks the operating
        system to. Bytes of a tensor are kept until `release`, or until the next tensor is read, so that
        they can be read again.

        Args:
            names: Of the tensors.
            budget_bytes: Limit of bytes held that are not read yet.
            in_part: Only some elements of each are going to be read. A source that can fetch these alone
                fetches nothing ahead.
        """
        return

    def release(self, name: str, stop: int) -> None:
        """Note that nothing before the element `stop` of a tensor is going to be read again.

        Of a source that is shared the bytes are kept until the next tensor is read.
        """
        return

    def merged_with(self, base: TensorSource) -> TensorSource:
        """Return the checkpoint as merges read it: its difference from the base model is its task vector."""
        return self

    def factors(self, name: str, base: TensorSource) -> Factors | None:
        """Return a tensor's difference from a base model's as a product, where it is known as one."""
        return None

    def close(self) -> None:
        """Free files and memory; the source can be read again."""
        return


#: Page offsets of memory and file closer than this make `rep movsb` slow on AMD (glibc bug 30994).
_NEAR_BYTES = 64
_PAGE_BYTES = 4096


class RowMemory(local):
    """Memory for rows of values read from files, reused by every call; each thread has its own.

    Fresh memory for every chunk costs as much as reading into it: the system gives and takes it page by page.

    On AMD processors the system copies five times as slowly if the page offset of the memory is up to 31
    bytes above that of the file (2 GB/s instead of 8, measured; glibc bug 30994 is the same). The lengths of
    headers decide these offsets, so all rows can be slow at once. Rows begin at offsets that avoid it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def rows(self, dtype: np.dtype[Any], length: int, start_bytes: Sequence[int]) -> np.ndarray:
        """Return memory for values at these offsets of their files: contiguous rows, not filled."""
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


class FileSource(TensorSource, ABC):
    """A checkpoint made of files: subclasses list them (`sizes`) and read byte ranges of them.

    Attributes:
        weights: The file of weights, or the index, that counts if there are several.
    """

    weights = ""

    @abstractmethod
    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on, or raise SourceError."""

    @property
    def origin(self) -> str:
        """Arguments of `from_pretrained` that load the checkpoint, as Python writes them."""
        return repr(self.label)

    @property
    def address(self) -> str:
        """Name of its folder in a recipe, to which `/` and the name of a part can be added."""
        return self.label.removesuffix(f"/{self.weights}") if self.weights else self.label

    @cached_property
    def index(self) -> CheckpointIndex:
        return read_index(self.listing)

    @property
    def listing(self) -> Listing:
        """Its files, for reading their headers."""
        return Listing(
            self.label, self.sizes, self.read_bytes, self.weights, self.origin, self.address, self.contents
        )

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def version(self, path: str) -> tuple[int, ...] | None:
        """Return numbers that differ between versions of a file as it is now, or None if there are none."""
        return None

    def is_current(self) -> bool:
        """Say whether the files that were opened are unchanged."""
        return True

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


class DerivedSource(TensorSource):
    """A checkpoint with some tensors computed, and the files of another source."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.label = source, source.label

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.source.sizes

    def contents(self, path: str) -> Folder:
        return self.source.contents(path)

    def size_of(self, path: str) -> int | None:
        return self.source.size_of(path)

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        return self.source.read_bytes(path, start, stop)

    def stated_hashes(self, path: str) -> str | None:
        return self.source.stated_hashes(path)

    def stored_name(self, name: str) -> str:
        return self.source.stored_name(name)

    def stored(self, name: str) -> Iterator[tuple[TensorSource, TensorInfo]]:
        return self.source.stored(name)

    def close(self) -> None:
        self.source.close()


class ComputedRows(DerivedSource):
    """A checkpoint with rows of some tensors in an order of their own, so that these are not read ahead.

    Args:
        source: The checkpoint.
        names: The tensors.
    """

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        super().__init__(source)
        self._names = tuple(name for name in names if name in source.index.tensors)

    def expect(self, names: Iterable[str], budget_bytes: int, *, in_part: bool = False) -> None:
        read = [name for name in names if name not in self._names]
        self.source.expect(read, budget_bytes, in_part=in_part)

    def release(self, name: str, stop: int) -> None:
        if name not in self._names:
            self.source.release(name, stop)

    def tensor_file(self, name: str) -> TensorFile | None:
        return None if name in self._names else self.source.tensor_file(name)

    def keeps(self, name: str) -> bool:
        return name not in self._names and self.source.keeps(name)


class MemorySource(FileSource):
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
    name, position = source.stored_name(info.name), info.start_byte + element * item_bytes
    return f"{source.label}, {info.file}, tensor {name!r}, byte {position:,}"
