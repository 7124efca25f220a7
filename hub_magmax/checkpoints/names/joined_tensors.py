"""Tensors that a source stores under another name, as a part of one, or as several: how they are read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.source import TensorFile, TensorSource
from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.recipe.renaming import LockedJoint


@dataclass(frozen=True)
class Joining:
    """Where the elements of parts lie in the tensor that holds them.

    The whole is `rows` (stacked) × `lines` × `sum(widths)` elements, and a part is one row's lines of its
    own width.

    Attributes:
        rows, lines: Numbers of both; a row of one line holds each part in one piece.
        widths: Elements of each part in a line, in order.
    """

    rows: int
    lines: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First element of each part in a line."""
        return tuple(accumulate(self.widths, initial=0))[:-1]


def joining_of(
    joint: LockedJoint, whole: tuple[int, ...], parts: Sequence[tuple[int, ...]]
) -> Joining | None:
    """Return where the parts lie, given the shapes of the whole and of one row's; None if they do not."""
    rows, row = (whole[0], whole[1:]) if joint.is_stacked and whole else (1, whole)
    if joint.is_stacked and len(parts) == 1:  # a row is the part itself
        return Joining(rows, 1, (math.prod(row),)) if parts[0] == row else None
    axis = joint.axis - joint.is_stacked
    if not 0 <= axis < len(row) or 0 in row or not _are_beside(row, axis, parts):
        return None
    behind = math.prod(row[axis + 1 :])
    return Joining(rows, math.prod(row[:axis]), tuple(shape[axis] * behind for shape in parts))


def _are_beside(row: tuple[int, ...], axis: int, parts: Sequence[tuple[int, ...]]) -> bool:
    """Say whether parts side by side along an axis have the shape of a row."""
    if {len(shape) for shape in parts} != {len(row)}:
        return False
    width = sum(shape[axis] for shape in parts)
    return {(*shape[:axis], width, *shape[axis + 1 :]) for shape in parts} == {row}


@dataclass(frozen=True)
class Place:
    """A tensor of the base model that the source has under another name.

    Attributes:
        info: Its entry under the base model's name.
        own: The source's name.
    """

    info: TensorInfo
    own: str

    @property
    def stored(self) -> tuple[str, ...]:
        """The source's tensors that it is made of."""
        return (self.own,)

    @property
    def expected(self) -> tuple[str, ...]:
        """Those that are read from front to back, in order."""
        return (self.own,)

    def infos(self, source: TensorSource) -> Iterator[TensorInfo]:
        """Yield what of the source's tensors is read."""
        yield from (source.index.tensors[name] for name in self.stored)

    def read(self, source: TensorSource, start: int, stop: int, out: np.ndarray | None) -> Stored:
        return source.read_stored(self.own, start, stop, out)

    def file(self, source: TensorSource) -> TensorFile | None:
        return source.tensor_file(self.own)

    def release(self, source: TensorSource, stop: int) -> None:
        source.release(self.own, stop)


@dataclass(frozen=True)
class Part(Place):
    """A tensor that is a part of one of the source's."""

    joining: Joining
    row: int
    column: int

    @property
    def expected(self) -> tuple[str, ...]:
        return ()  # several parts of one tensor are read, in any order

    def infos(self, source: TensorSource) -> Iterator[TensorInfo]:
        yield self.info

    def start(self, line: int) -> int:
        """Return the first element of a line."""
        joining = self.joining
        return (self.row * joining.lines + line) * joining.width + joining.starts[self.column]

    def read(self, source: TensorSource, start: int, stop: int, out: np.ndarray | None) -> Stored:
        width = self.joining.widths[self.column]
        first, last = start // width, -(-stop // width)
        if last - first <= 1:
            begin = self.start(first) + start - first * width
            return source.read_stored(self.own, begin, begin + stop - start, out)
        offset = self.joining.starts[self.column]
        begin = self.start(first) - offset
        around = source.read_stored(self.own, begin, begin + (last - first) * self.joining.width)
        lines = around.bits.reshape(last - first, -1)[:, offset : offset + width]
        return _into(out, lines.reshape(-1)[start - first * width : stop - first * width], around.dtype)

    def file(self, source: TensorSource) -> TensorFile | None:
        file = source.tensor_file(self.own)
        if file is None or self.joining.lines > 1:
            return None
        item_bytes = bits_dtype(self.info.dtype).itemsize
        return TensorFile(file.reading, file.start_byte + self.start(0) * item_bytes, file.path)

    def release(self, source: TensorSource, stop: int) -> None:
        return


@dataclass(frozen=True)
class Whole(Place):
    """A tensor that holds several of the source's."""

    joining: Joining
    parts: tuple[tuple[str, ...], ...]

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for row in self.parts for name in row)

    @property
    def expected(self) -> tuple[str, ...]:
        return self.stored if self.joining.lines == 1 else ()

    def read(self, source: TensorSource, start: int, stop: int, out: np.ndarray | None) -> Stored:
        bits = np.empty(stop - start, bits_dtype(self.info.dtype)) if out is None else out
        position = start
        while position < stop:
            piece = self._piece(source, position, stop)
            bits[position - start :][: len(piece)] = piece
            position += len(piece)
        return Stored(bits, self.info.dtype)

    def _piece(self, source: TensorSource, start: int, stop: int) -> np.ndarray:
        """Return elements from `start` on that lie in one part, or in whole lines of one row."""
        joining = self.joining
        line, at = divmod(start, joining.width)
        row, line = divmod(line, joining.lines)
        if at or joining.lines == 1 or stop - start < joining.width:
            column = bisect_right(joining.starts, at) - 1
            within = at - joining.starts[column]
            begin = line * joining.widths[column] + within
            count = min(joining.widths[column] - within, stop - start)
            return source.read_stored(self.parts[row][column], begin, begin + count).bits
        count = min((stop - start) // joining.width, joining.lines - line)
        found = [
            source.read_stored(name, line * width, (line + count) * width).bits.reshape(count, width)
            for name, width in zip(self.parts[row], joining.widths, strict=True)
        ]
        return np.concatenate(found, axis=1).reshape(-1)

    def file(self, source: TensorSource) -> TensorFile | None:
        return None

    def release(self, source: TensorSource, stop: int) -> None:
        done = stop // (self.joining.lines * self.joining.width)
        for names in self.parts[:done] if done == len(self.parts) else self.parts[done - 1 : done]:
            for name, width in zip(names, self.joining.widths, strict=True):
                source.release(name, self.joining.lines * width)


def _into(out: np.ndarray | None, bits: np.ndarray, dtype: str) -> Stored:
    if out is None:
        return Stored(bits, dtype)
    out[:] = bits
    return Stored(out, dtype)


def part_of(
    whole: TensorInfo, name: str, shape: tuple[int, ...], joining: Joining, row: int, column: int
) -> Part:
    """Return a part of one of the source's tensors; its entry begins at its first byte, as long as it is."""
    item_bytes = bits_dtype(whole.dtype).itemsize
    place = Part(whole, whole.name, joining, row, column)
    start = whole.start_byte + place.start(0) * item_bytes
    stop = start + joining.lines * joining.widths[column] * item_bytes
    return replace(place, info=replace(whole, name=name, shape=shape, start_byte=start, stop_byte=stop))


def whole_of(
    first: TensorInfo, name: str, shape: tuple[int, ...], joining: Joining, parts: tuple[tuple[str, ...], ...]
) -> Whole:
    """Return a tensor that holds several of the source's; its entry begins with the first of them."""
    num_bytes = math.prod(shape) * bits_dtype(first.dtype).itemsize
    info = replace(first, name=name, shape=shape, stop_byte=first.start_byte + num_bytes)
    return Whole(info, first.name, joining, parts)
