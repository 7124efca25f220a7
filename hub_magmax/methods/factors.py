"""Task vectors that are products of two factors, as LoRA adapters have them, in coordinates of their own.

With τₜ = Bₜ Aₜ, decompositions of the stacked factors, [B₁, ..., B_T] = P L and [A₁; ...; A_T]ᵀ = Q R, where
P and Q have orthonormal columns, give τₜ = P Kₜ Qᵀ. The sides of Kₜ are the sum of the ranks at most. A
method that turns with rows and columns merges these in place of the task vectors, and its result is P K Qᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from jaxtyping import Float32, Float64

from hub_magmax.kernels.lazy_imports import Tensor, torch


class Factors(NamedTuple):
    """A task vector of one matrix: `left @ right`."""

    left: Float32[Tensor, "rows rank"]
    right: Float32[Tensor, "rank columns"]

    @classmethod
    def nothing(cls, rows: int, columns: int) -> Factors:
        """Return the product of rank 0: a task vector of zeros."""
        return cls(torch.empty(rows, 0), torch.empty(0, columns))

    @classmethod
    def total(cls, products: Iterable[Factors]) -> Factors:
        """Return the sum of products, at least one, as one: their factors beside each other, in order."""
        lefts, rights = zip(*products, strict=True)
        return cls(torch.cat(lefts, 1), torch.cat(rights))

    def times(self, factor: float) -> Factors:
        """Return it multiplied by a number; by 1 it is the same."""
        return self if factor == 1 else Factors((self.left.double() * factor).float(), self.right)


class Coordinates(NamedTuple):
    """Task vectors of one matrix, each `left @ small[task] @ right.T`; left and right are orthonormal.

    Attributes:
        left: Directions of the rows, at most as many as the ranks are together, and as there are rows.
        small: What the methods merge.
        right: Directions of the columns.
    """

    left: Float64[Tensor, "rows some"]
    small: Float32[Tensor, "tasks some others"]
    right: Float64[Tensor, "columns others"]


def in_coordinates(factors: Sequence[Factors]) -> Coordinates:
    """Return the task vectors of one matrix as small ones, whose sides are the sum of the ranks at most.

    Args:
        factors: Of at least one task, on the CPU. One of rank 0 adds no direction.
    """
    left, lefts = torch.linalg.qr(torch.cat([one.left for one in factors], 1).double())
    right, rights = torch.linalg.qr(torch.cat([one.right for one in factors]).T.double())
    bounds = pairwise(accumulate((one.left.shape[1] for one in factors), initial=0))
    small = [lefts[:, start:stop] @ rights[:, start:stop].T for start, stop in bounds]
    return Coordinates(left, torch.stack(small).float(), right)
