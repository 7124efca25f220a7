"""Numbers of a diagnosis: sums over the elements of a layer, and overlaps of directions in a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hub_magmax.planning.findings.faults import Geometry, Matrix, ratio


@dataclass(frozen=True)
class Group:
    """Sums over the elements of one or more tensors, as what was looked at of each tells.

    Attributes:
        name: A layer, or what the tensors have in common.
        num_elements, num_looked_at: Of the tensors.
        products: Inner products of the base model (first) and the task vectors.
        agreeing, shared: By pair of tasks, elements that both changed in the same direction, and at all.
        changed: By task, elements that differ from the base model's.
        wins: By task, elements on which its change is the largest; the later of equal ones.
        lacking: By task, elements by which its wins fall short of its quota of those that changed.
    """

    name: str
    num_elements: int
    num_looked_at: int
    products: Matrix
    agreeing: Matrix
    shared: Matrix
    changed: tuple[float, ...]
    wins: tuple[float, ...]
    lacking: tuple[float, ...]

    @cached_property
    def geometry(self) -> Geometry:
        """Inner products as numbers."""
        return Geometry(self.num_looked_at, np.array(self.products))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Norms of the task vectors."""
        return self.geometry.lengths

    @cached_property
    def cosines(self) -> np.ndarray:
        """Between every two task vectors; 0 where one of them is zero."""
        return self.geometry.cosines

    @cached_property
    def sign_agreement(self) -> np.ndarray:
        """Share of the elements that both tasks changed which they changed in the same direction."""
        return ratio(np.array(self.agreeing), np.array(self.shared))

    @cached_property
    def win_shares(self) -> np.ndarray:
        """Share of the changed elements that each task wins under MAGMAX."""
        wins = np.array(self.wins)
        return ratio(wins, np.full(len(wins), wins.sum()))

    @cached_property
    def length_ratios(self) -> np.ndarray:
        """Ratio of two task vectors' lengths: row over column; 0 where the column's is zero."""
        lengths = self.lengths
        return ratio(np.tile(lengths[:, None], len(lengths)), np.tile(lengths, (len(lengths), 1)))

    @cached_property
    def lacking_shares(self) -> np.ndarray:
        """Share of its quota that each task lacks among the elements it wins."""
        lacking = np.array(self.lacking)
        return ratio(lacking, np.array(self.wins) + lacking)

    def numbers(self) -> dict[str, Any]:
        """Return lengths, shares and cosines, by task and by pair of tasks, as plain values."""
        keys = ("cosines", "sign_agreement", "length_ratios", "win_shares", "lacking_shares")
        return {key: getattr(self, key).round(6).tolist() for key in keys}


def total(name: str, groups: Sequence[Group]) -> Group:
    """Return the sums over several groups, at least one."""

    def summed(attribute: str) -> np.ndarray:
        return np.asarray(sum(np.array(getattr(group, attribute), dtype=np.float64) for group in groups))

    return make_group(
        name,
        sum(group.num_elements for group in groups),
        sum(group.num_looked_at for group in groups),
        *(summed(key) for key in ("products", "agreeing", "shared", "changed", "wins", "lacking")),
    )


def make_group(name: str, num_elements: int, num_looked_at: int, *sums: np.ndarray) -> Group:
    """Return a group from arrays, in the order of its fields."""
    plain: list[Any] = [
        tuple(map(tuple, part.tolist())) if part.ndim == 2 else tuple(part.tolist()) for part in sums
    ]
    return Group(name, num_elements, num_looked_at, *plain)


@dataclass(frozen=True)
class Overlap:
    """Overlap of the strongest directions of the tasks' changes to one matrix.

    Attributes:
        shares: By pair of tasks, the mean squared cosine of the angles between their directions.
        chance: The same of unrelated directions.
    """

    matrix: str
    shares: Matrix
    chance: float
