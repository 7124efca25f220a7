"""Singular directions of matrices, by the eigenvalues of their smaller Gram matrix.

That is faster than a decomposition of the matrix, and squares ratios of singular values: in float64 a ratio
of 1e-6 is still resolved. Directions below it count as absent: task vectors are differences in float32,
whose rounding makes directions of about that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float32, Float64

from hub_magmax.kernels.lazy_imports import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.methods.factors import Coordinates

#: A direction is absent whose singular value is not above this part of the largest one.
ABSENT = 1e-6


class Directions(NamedTuple):
    """Singular directions, the strongest first; the matrix is `left · diag(strengths) · rightᵀ`."""

    left: Float64[Tensor, "rows some"]
    strengths: Float64[Tensor, " some"]
    right: Float64[Tensor, "columns some"]

    @property
    def product(self) -> Float64[Tensor, "rows columns"]:
        return (self.left * self.strengths) @ self.right.T


def weighted_sum(
    task_vectors: Float32[Tensor, "tasks rows columns"], weights: Sequence[float]
) -> Float64[Tensor, "rows columns"]:
    """Return the sum of the task vectors times their weights, in float64 and in their order."""
    total = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for vector, weight in zip(task_vectors, weights, strict=True):
        total.add_(vector, alpha=weight)
    return total


def directions(
    matrix: Float64[Tensor, "rows columns"], count: int | None = None, *, size: float = 0.0
) -> Directions:
    """Return the strongest singular directions of a matrix.

    Args:
        matrix: Finite.
        count: How many at most; all by default. Absent ones are never among them.
        size: Of the largest singular value of what the matrix is a part of, where it may be the rounding of
            that and no more.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, strengths, right = directions(matrix.T, count, size=size)
        return Directions(right, strengths, left)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    most = rows if count is None else min(count, rows)
    strengths = squares.clamp(min=0).sqrt().flip(0)
    least = ABSENT * max(float(strengths[0]), size)
    strengths = strengths[: min(most, int((strengths > least).sum()))]
    left = vectors[:, rows - len(strengths) :].flip(1)
    return Directions(left, strengths, matrix.T @ left / strengths)


class LowRank(NamedTuple):
    """A product in place of a matrix, its singular values shared by both factors.

    Attributes:
        norm: Frobenius norm of the matrix.
        lost: Of the difference.
    """

    left: Float64[Tensor, "rows rank"]
    right: Float64[Tensor, "rank columns"]
    norm: float
    lost: float


def low_rank(matrix: Float64[Tensor, "rows columns"], rank: int) -> LowRank:
    """Return the product of a rank that is nearest to a matrix (Eckart and Young 1936).

    Where the matrix has fewer directions, the others are zero. A loss of less than 1e-6 of the norm is
    rounding, and told as none.
    """
    norm = float(matrix.norm())
    found = directions(matrix, rank)
    halves = found.strengths.sqrt()
    missing = (0, rank - len(halves))
    left = torch.nn.functional.pad(found.left * halves, missing)
    right = torch.nn.functional.pad(found.right * halves, missing).T
    lost = float((matrix - left @ right).norm())
    return LowRank(left, right, norm, lost if lost > 1e-6 * norm else 0.0)


def low_rank_in(found: Coordinates, matrix: Tensor, rank: int) -> LowRank:
    """Return the product of a rank nearest to `found.left @ matrix @ found.right.T`."""
    small = low_rank(matrix.double(), min(rank, *matrix.shape))
    missing = rank - small.left.shape[1]
    left = torch.nn.functional.pad(found.left @ small.left, (0, missing))
    right = torch.nn.functional.pad(small.right @ found.right.T, (0, 0, 0, missing))
    return LowRank(left, right, small.norm, small.lost)


def nearest_orthonormal(parts: list[Float64[Tensor, "length some"]]) -> Float64[Tensor, "length all"]:
    """Return the nearest columns of length one at right angles: U Vᵀ of their decomposition U Σ Vᵀ.

    Where columns depend on each other nothing is added to what they span: columns that are equal
    come back equal, and together are one direction.

    Args:
        parts: The columns side by side; emptied, for its memory.
    """
    columns = torch.cat(parts, 1)
    parts.clear()
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = squares > ABSENT**2 * squares[-1:]
    vectors = vectors[:, kept]
    found: Tensor = columns @ ((vectors / squares[kept].sqrt()) @ vectors.T)
    return found


def divided(
    products: Float64[Tensor, "rows some"], total: Float64[Tensor, "some some"]
) -> Float64[Tensor, "rows some"] | None:
    """Return `products @ inverse(total)` of a positive definite sum; None if rounding has left it none."""
    factor, failed = torch.linalg.cholesky_ex(total)
    return None if int(failed) else torch.cholesky_solve(products.T, factor).T
