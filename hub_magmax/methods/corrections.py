"""Linear correction of a merged model's representation, in closed form (ReACT), folded into its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Float, Float64

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.dtypes import rounded_once
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.methods.spectra import divided

SOURCE = "arXiv:2511.10943"

#: Rows of a head that are multiplied at a time. It is fixed, as the last bits of a product depend on it.
_ROWS = 1024

#: Directions in which two sets of representations have less in common than this part of the most say nothing
#: about a rotation: float64 rounds what is left of them.
_LEAST = 1e-10


class Products(NamedTuple):
    """Sums of products of representations on the examples of one task, a row for each output dimension.

    Attributes:
        cross: Z_ind Z_mtlᵀ, of the task's own model with the merged one.
        gram: Z_mtl Z_mtlᵀ, of the merged model with itself.
    """

    cross: Float64[Tensor, "size size"]
    gram: Float64[Tensor, "size size"]


def correction(
    tasks: Sequence[Products], preference: Sequence[float], ridge: float
) -> Float64[Tensor, "size size"]:
    """Return W_p = (Σ p_t Ŵ_t C_t)(Σ p_t C_t)⁻¹, by which representations of the merged model are multiplied.

    C_t = Z_mtl Z_mtlᵀ + β I, and Ŵ_t = (Z_ind Z_mtlᵀ + β O_t) C_t⁻¹ maps the merged model's representations
    of task t to those of the task's own model; β draws it towards the rotation O_t. So Ŵ_t C_t needs no
    inverse.

    Args:
        tasks: Of each task.
        preference: Weights p_t, not negative, with sum 1.
        ridge: β, above 0.

    Raises:
        RecipeError: If rounding has left the sum without an inverse.

    Source: ReACT (arXiv:2511.10943).
    """
    target, total = torch.zeros_like(tasks[0].cross), torch.zeros_like(tasks[0].gram)
    for products, weight in zip(tasks, preference, strict=True):
        if weight:
            target.add_(products.cross + ridge * rotation(products.cross), alpha=weight)
            total.add_(products.gram, alpha=weight)
    total.diagonal().add_(ridge)
    found = divided(target, total)
    if found is None:
        raise RecipeError(
            "the representations do not decide the correction: the sum of their products has no inverse",
            key=("correction", "ridge"),
            expected="a ridge above rounding",
            hint=f"Raise correction.ridge, such as to {float(total.diagonal().mean()) * 1e-6:.1g}.",
        )
    return found


def rotation(cross: Float64[Tensor, "size size"]) -> Float64[Tensor, "size size"]:
    """Return the orthogonal matrix O nearest to `cross`: the Procrustes solution U Vᵀ of its decomposition.

    Where the representations leave directions open, many are as near. Of these it is the one nearest to the
    identity, so that what no example shows is not turned; the paper does not say which.
    """
    left, sizes, right = torch.linalg.svd(cross)
    rank = int((sizes > _LEAST * sizes[0]).sum())
    open_left, open_right = left[:, rank:], right[rank:]
    turned, _, back = torch.linalg.svd(open_left.T @ open_right.T)
    found: Tensor = left[:, :rank] @ right[:rank] + open_left @ (turned @ back) @ open_right
    return found


def times(
    head: Float[Tensor, "rows size"], matrix: Float64[Tensor, "size size"]
) -> Iterator[Float[Tensor, "some size"]]:
    """Yield a head's weight times a matrix, some rows after the others.

    It is computed in float64 and rounded once to the head's dtype.
    """
    return (rounded_once(rows.double() @ matrix, head.dtype) for rows in head.split(_ROWS))
