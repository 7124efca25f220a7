"""Tensors of a checkpoint in the place of another: a search that is linear in the number of tensors.

A tensor that resembles its own in the base model is settled at once. Only the others are looked for among
the tensors of the same shape: at most `MOST_SOUGHT` of a shape and task, spread evenly over them. So a swap
can be missed where more than that have nothing in common with their own, and then only those that were looked
for are counted. What is compared is a sketch of a tensor's first elements: correlations near the limit of the
rule are off by about .01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from hub_magmax.planning.findings.faults import Swap, limit_of

#: Elements of each tensor by which it is recognised in another place, and fewer than which tell nothing.
PRINT_ELEMENTS, MIN_PRINT = 1024, 16

#: Numbers of a sketch, into which longer prints are projected: 1 KB for a tensor of the base model.
SKETCH_NUMBERS = 256

#: Tensors of one shape and task that are looked for at most.
MOST_SOUGHT = 1024

#: Correlation with the base model's tensor of the same name from which a tensor is in its place.
_IN_PLACE = 0.5

#: Tensors of the base model that are compared at a time.
_BLOCK = 4096

Shape = tuple[int, ...]


@cache
def _projection() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((PRINT_ELEMENTS, SKETCH_NUMBERS), np.float32)


@dataclass
class _Spread:
    """A sample of sketches by name: all of up to `MOST_SOUGHT`, of more every second, fourth or eighth."""

    names: list[str] = field(default_factory=list)
    sketches: list[np.ndarray] = field(default_factory=list)
    seen: int = 0
    every: int = 1

    def add(self, name: str, sketch: np.ndarray) -> None:
        if self.seen % self.every == 0:
            self.names.append(name)
            self.sketches.append(sketch)
        self.seen += 1
        if len(self.names) > MOST_SOUGHT:
            self.names, self.sketches = self.names[::2], self.sketches[::2]
            self.every *= 2


class SwapSearch:
    """The tensors of a base model, as sketches, and those of its tasks that are not in their place.

    Args:
        tasks: In order.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._names: dict[Shape, list[str]] = {}
        self._sketches: dict[Shape, list[np.ndarray]] = {}
        self._sought: dict[Shape, tuple[_Spread, ...]] = {}

    def add(self, names: Sequence[str], shape: Shape, rows: np.ndarray) -> None:
        """Note tensors of one shape.

        Args:
            names: Of the tensors.
            shape: That they have.
            rows: By tensor, the first elements in the base model, then in each checkpoint.
        """
        if rows.shape[2] < MIN_PRINT:
            return
        prints = _standardised(rows[:, :, :PRINT_ELEMENTS])
        self._names.setdefault(shape, []).extend(names)
        self._sketches.setdefault(shape, []).append(self._sketched(prints[:, 0]))
        sought = self._sought.setdefault(shape, tuple(_Spread() for _ in self._tasks))
        likeness = np.einsum("ne,nte->nt", prints[:, 0], prints[:, 1:])
        for tensor, task in np.argwhere((likeness < _IN_PLACE) & prints[:, 1:].any(axis=2)):
            sketch = self._sketched(prints[tensor, task + 1][None])[0]
            sought[task].add(names[tensor], sketch)

    def found(self) -> tuple[Swap, ...]:
        """Return tensors that do not resemble their own in the base model, but another of the same shape."""
        swaps = []
        for shape, spreads in self._sought.items():
            if len(self._names[shape]) == 1 or not any(spread.names for spread in spreads):
                continue
            base = np.concatenate(self._sketches[shape])
            for task, spread in zip(self._tasks, spreads, strict=True):
                if spread.names:
                    swaps += self._swaps(task, spread, base, self._names[shape])
        return tuple(swaps)

    def _sketched(self, prints: np.ndarray) -> np.ndarray:
        """Return rows whose products are about those of `prints`: random projections of long ones."""
        size = prints.shape[1]
        if size <= SKETCH_NUMBERS:
            return prints.copy()
        projected = prints @ _projection()[:size]
        lengths = np.linalg.norm(projected, axis=1, keepdims=True)
        return np.asarray(projected / np.maximum(lengths, np.float32(1e-30)))

    @staticmethod
    def _swaps(task: str, spread: _Spread, base: np.ndarray, names: Sequence[str]) -> list[Swap]:
        sought = np.stack(spread.sketches)
        best = np.full(len(sought), -1.0, np.float32)
        place = np.zeros(len(sought), int)
        for start in range(0, len(base), _BLOCK):
            likeness = sought @ base[start : start + _BLOCK].T
            nearest = likeness.argmax(axis=1)
            value = likeness[np.arange(len(sought)), nearest]
            place = np.where(value > best, start + nearest, place)
            best = np.maximum(best, value)
        return [
            Swap(task, spread.names[row], names[int(place[row])])
            for row in np.flatnonzero(best > limit_of("swapped"))
        ]


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Return rows, along the last axis, with mean zero and length one; constant ones become zero."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=-1, keepdims=True)
    constant = lengths <= 1e-5 * np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.where(constant, np.float32(0), centred / np.maximum(lengths, np.float32(1e-30)))
