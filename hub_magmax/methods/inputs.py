"""Second moments of a layer's inputs: as task vectors tell them, `C = Σ cₜ τₜᵀ τₜ`, or as data does."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float32, Float64

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.methods.data_statistics import TensorStatistics
from hub_magmax.methods.spectra import ABSENT, directions, divided


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


def least_squares(
    task_vectors: Float32[Tensor, "tasks rows columns"],
    preference: Sequence[float],
    moments: Sequence[TensorStatistics],
    off_diagonal: float,
    ridge: float,
) -> Float64[Tensor, "rows columns"]:
    """Return `(Σ wₜ τₜ Cₜ)(Σ wₜ Cₜ)⁻¹`, one task's moments after the other.

    Args:
        task_vectors: Of the tasks.
        preference: Weights wₜ, which sum to 1.
        moments: Of the inputs of each task; of them Cₜ is made.
        off_diagonal: What elements beside the diagonal are multiplied by.
        ridge: Added to every diagonal, times the mean of the diagonal of the sum.

    Raises:
        RecipeError: If rounding has left the sum of the moments without a solution.
    """
    columns = task_vectors.shape[2]
    products = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    total, mean = products.new_zeros((columns, columns)), torch.zeros_like(products)
    for vector, weight, own in zip(task_vectors, preference, moments, strict=True):
        wide, found = vector.double(), own.matrix(columns).to(total)
        diagonal = found.diagonal().clone()
        found *= off_diagonal
        found.diagonal().copy_(diagonal)
        total.add_(found, alpha=weight)
        products.addmm_(wide, found, alpha=weight)
        mean.add_(wide, alpha=weight)
        del wide, found  # before the next task's are made, and before the solution
    added = ridge * float(total.diagonal().mean())
    if not added and not bool(total.diagonal().all()):  # inputs that are always zero
        return _where_there_are_inputs(total, products, mean)
    total.diagonal().add_(added)
    products.add_(mean, alpha=added)
    return _solved(total, products)


def _where_there_are_inputs(
    total: Float64[Tensor, "columns columns"],
    products: Float64[Tensor, "rows columns"],
    mean: Float64[Tensor, "rows columns"],
) -> Float64[Tensor, "rows columns"]:
    """Return the solution of the inputs that are not zero in all tasks, and the mean of the others."""
    (kept,) = total.diagonal().nonzero(as_tuple=True)
    if len(kept):
        mean[:, kept] = _solved(total[kept][:, kept], products[:, kept])
    return mean


def _solved(
    total: Float64[Tensor, "some some"], products: Float64[Tensor, "rows some"]
) -> Float64[Tensor, "rows some"]:
    found = divided(products, total)
    if found is None:
        raise RecipeError(
            "the inputs of this layer do not decide the merge: their moments have no inverse",
            key=("method", "ridge"),
            expected="more examples than inputs, off_diagonal below 1, or a ridge above rounding",
            hint="Raise method.ridge, such as 1e-4, or lower method.off_diagonal.",
        )
    return found
