"""Second moments of a layer's inputs as task vectors tell them, `C = Σ cₜ τₜᵀ τₜ`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float32, Float64

from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.methods.spectra import ABSENT, directions

if TYPE_CHECKING:
    from torch import Tensor


def input_directions(
    task_vectors: Float32[Tensor, "tasks rows columns"], importance: Sequence[float]
) -> tuple[Float64[Tensor, "columns some"], Float64[Tensor, " some"]]:
    """Return eigenvectors of C and their eigenvalues, the largest first, without absent ones.

    Args:
        task_vectors: Of the tasks.
        importance: Of each, not negative.
    """
    num_tasks, rows, columns = task_vectors.shape
    if num_tasks * rows < columns:
        scaled = [vector.double() * c**0.5 for vector, c in zip(task_vectors, importance, strict=True)]
        found = directions(torch.cat(scaled))
        return found.right, found.strengths.square()
    moments = torch.zeros((columns, columns), dtype=torch.float64, device=task_vectors.device)
    for vector, c in zip(task_vectors, importance, strict=True):
        wide = vector.double()
        moments.addmm_(wide.T, wide, alpha=c)
    squares, vectors = torch.linalg.eigh(moments)
    count = int((squares > ABSENT**2 * squares[-1]).sum())
    return vectors[:, columns - count :].flip(1), squares[columns - count :].flip(0)


def products_with_inputs(
    task_vectors: Float32[Tensor, "tasks rows columns"],
    importance: Sequence[float],
    right: Float64[Tensor, "columns some"],
) -> Float64[Tensor, "rows some"]:
    """Return `Σ cₜ τₜ τₜᵀ τₜ` times some directions."""
    _, rows, columns = task_vectors.shape
    total = torch.zeros((rows, right.shape[1]), dtype=torch.float64, device=right.device)
    for vector, c in zip(task_vectors, importance, strict=True):
        wide = vector.double()
        outputs = wide @ right
        if rows < columns:
            total.addmm_(wide @ wide.T, outputs, alpha=c)
        else:
            total.addmm_(wide, wide.T @ outputs, alpha=c)
    return total
