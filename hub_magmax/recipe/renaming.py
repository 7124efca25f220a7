"""Renaming of a source as a lock stores it: patterns of its names and of those that they stand for.

In a pattern `#` stands for a whole number between dots, and both sides have the same numbers in the same
order; `*` stands for the row of a stacked tensor, such as the number of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: A number between dots, and the signs that stand for one.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
NUMBER, ROW = "#", "*"
_SLOT = re.compile(r"(?<![^.])#(?![^.])")


@dataclass(frozen=True)
class LockedJoint:
    """A tensor that holds several others, on one side of a renaming.

    Attributes:
        whole: Pattern of the name of the tensor that holds all.
        parts: Patterns of the names of those that lie side by side in it, in order.
        axis: Axis of the whole along which they do.
        is_stacked: Whether the whole has a first axis that the parts lack, with a row for every `*`.
        is_own: Whether the whole is the source's, and the parts the base model's; or the other way round.
    """

    whole: str
    parts: tuple[str, ...]
    axis: int
    is_stacked: bool
    is_own: bool


@dataclass(frozen=True)
class Renaming:
    """Names of a source's tensors that are others in the base model.

    Attributes:
        names: Patterns in pairs: the source's own, and the base model's.
        joints: Tensors that are one on one side and several on the other.
    """

    names: tuple[tuple[str, str], ...] = ()
    joints: tuple[LockedJoint, ...] = ()


def collapsed(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the pattern of a name, and its numbers in order."""
    return _NUMBER.sub(NUMBER, name), tuple(_NUMBER.findall(name))


def filled(pattern: str, numbers: Sequence[str], row: int | None = None) -> str:
    """Return the name that a pattern stands for, given its numbers in order and the row.

    Raises:
        StopIteration: If there are fewer numbers than `#`.
    """
    given = iter(numbers)
    name = _SLOT.sub(lambda match: next(given), pattern)
    return name if row is None else name.replace(ROW, str(row))
