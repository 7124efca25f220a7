"""The weighted sum of task vectors, of which most operations are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxtyping import Float32

from hub_magmax.kernels.lazy_imports import Array, Rows, torch

#: One number per task.
Weights = Sequence[float] | Array


def as_tensor(weights: Weights) -> Float32[torch.Tensor, " tasks"]:
    """Return numbers by task as float32."""
    return torch.as_tensor(weights, dtype=torch.float32)


def weighted_sum(rows: Rows, weights: Weights) -> Float32[torch.Tensor, "*shape"]:
    """Return Σ w_t τ_t, added in the order of the tasks; a weight of zero leaves its task out.

    A weight of one among zeros returns that task vector bit for bit.
    """
    return added(rows, as_tensor(weights))


def added(rows: Rows, weights: Iterable[torch.Tensor]) -> Float32[torch.Tensor, "*shape"]:
    """Return the same for weights that are tensors: numbers, or with one for each element."""
    # Adding to a negative zero changes nothing; adding to a positive one would lose signs of zeros.
    total = torch.full_like(rows[0], -0.0)
    for row, weight in zip(rows, weights, strict=True):
        total = torch.where(weight != 0, total + row * weight, total)
    return total
