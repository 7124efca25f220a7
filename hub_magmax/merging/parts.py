"""Bounds of the parts of a tensor that are read at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hub_magmax.kernels.stored import Stored


def in_runs(size: int, length: int, every: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the first `length` elements of every `every`, of `size` in all."""
    return ((start, min(start + length, size)) for start in range(0, size, every))


def alone(parts: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield each part by itself."""
    return ([part] for part in parts)


def together(parts: Iterable[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield neighbours together, up to `most` elements: to begin reading takes longer than to read a run."""
    group: list[tuple[int, int]] = []
    length = 0
    for start, stop in parts:
        length += stop - start
        if group and length > most:
            yield group
            group, length = [], stop - start
        group.append((start, stop))
    if group:
        yield group


def picked(values: Stored | list[Stored], parts: Sequence[tuple[int, int]]) -> Stored | list[Stored]:
    """Return parts of rows side by side, in memory of their own."""
    places = np.concatenate([np.arange(start, stop) for start, stop in parts])
    if isinstance(values, Stored):
        return Stored(values.bits.take(places, axis=1), values.dtype)  # rows one after the other
    return [Stored(row.bits[places], row.dtype) for row in values]
