"""Merged task vectors as products of a bound rank, the best there are, and what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float64

from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.methods.factors import Coordinates, Factors, in_coordinates
from hub_magmax.methods.matrices import merged_in
from hub_magmax.methods.registry import MergeMethod
from hub_magmax.methods.spectra import directions

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.kernels.backend import Backend
    from hub_magmax.kernels.randomness import CounterGenerator


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


def merge_factors(
    method: MergeMethod,
    factors: Sequence[Factors],
    sides: tuple[int, int],
    preference: tuple[float, ...],
    options: Mapping[str, Any],
    generator: CounterGenerator,
    backend: Backend,
    where: str,
) -> tuple[Coordinates, Tensor]:
    """Merge the task vectors of one matrix, which are products, by a method of whole matrices.

    Args:
        method: One that takes `sides`.
        factors: Of every task.
        sides: Rows and columns of the matrix.
        preference, options, generator: As `MergeMethod.rule` takes them; the shape is that of the sides.
        backend: Runs the method.
        where: Names method and tensor in messages.

    Returns:
        Coordinates of the factors, and the merged task vector in them, float32 and not scaled.

    Raises:
        RecipeError: If a plug-in's method fails, or returns anything but finite numbers of this shape.
    """
    unread, num_tasks = method.unread(preference), len(factors)
    tasks = [task for task in range(num_tasks) if task not in unread]
    given = method.arguments(num_tasks, sides, preference, generator, options)
    call = partial(method.function, **method.of_matrix(given, tasks, sides))
    found = in_coordinates([factors[task] for task in tasks])
    merged = merged_in(found, call, backend, where, is_checked=not method.is_built_in)
    return found, found.small[0] if merged is None else merged
