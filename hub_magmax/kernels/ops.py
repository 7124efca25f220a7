"""Elementwise operations that turn the task vectors of an element into its merged value, in torch.

Every step is correctly rounded and looks at one element (and all tasks) at a time, so a result is the same
to the bit for any chunk size and number of threads. Fused multiply-add (torch's `alpha=`, `addcmul`) is
avoided: it rounds differently in a vector body and its tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float32, Shaped, UInt8

from hub_magmax.kernels.competition import balanced_mean
from hub_magmax.kernels.elections import (
    banded_sum,
    banded_ties,
    banded_ties_sum,
    clipped_sum,
    dropped_sum,
    dropped_ties,
    dropped_ties_sum,
    rescaled_ties,
    scaled_sum,
    scaled_ties,
    scaled_ties_sum,
    selected_ties,
    stitched,
    ties_merge,
    ties_sum,
)
from hub_magmax.kernels.lazy_imports import Array, Rows, torch
from hub_magmax.kernels.sums import Weights, added, weighted_sum


@dataclass(frozen=True)
class Inputs:
    """Numbers that an operation takes beside the task vectors.

    Attributes:
        per_element: Arrays as long as the chunk, along their first axis.
        per_task: Arrays that are the same for all chunks.
    """

    per_element: tuple[Array, ...] = ()
    per_task: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Op:
    """An elementwise operation; its reference defines the bytes that every backend returns.

    Attributes:
        reference: Takes a chunk of each task vector (float32 torch tensors, one row per task), then
            `Inputs.per_element`, then `Inputs.per_task`, as torch tensors. Returns the merged task vector
            (float32) or, if `selects`, the number of each element's winner (uint8, from zero). With
            `takes_base` the base model's values (float32) come before all of these.
        selects: Every element comes from exactly one task; the merge then counts winners.
        name: Identifies an operation of this module, for instance in stored rules; "" for all others.
        takes_base: It needs the base model's values, besides the task vectors.
        is_wide: Some of its steps are in float64, which not all devices have.
    """

    reference: Callable[..., torch.Tensor]
    selects: bool = False
    name: str = ""
    takes_base: bool = False
    is_wide: bool = False

    def find(self, rows: Rows, inputs: Inputs, base: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the reference returns; without values of a base model they count as zeros."""
        numbers = (*inputs.per_element, *inputs.per_task)
        below = () if not self.takes_base else (torch.zeros_like(rows[0]) if base is None else base.float(),)
        return self.reference(*below, rows, *map(torch.as_tensor, numbers))

    def __call__(
        self, rows: Rows, inputs: Inputs, base: torch.Tensor | None = None
    ) -> Float32[torch.Tensor, "*shape"]:
        """Return the merged task vector of a chunk."""
        found = self.find(rows, inputs, base)
        return select_rows(rows, found) if self.selects else found


def affine_sum(
    base: Float32[torch.Tensor, " chunk"], rows: Rows, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return w_0 θ_0 + Σ w_t τ_t, added in this order; a weight of zero leaves its vector out.

    Args:
        base: The base model's values, θ_0.
        rows: One chunk of each task vector.
        weights: The base model's first.
    """
    return weighted_sum([base, *rows], weights)


def affine_sum_of_each(
    base: Float32[torch.Tensor, " chunk"], rows: Rows, weights: Float32[torch.Tensor, "chunk vectors"]
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `affine_sum` under weights of each element."""
    return added([base, *rows], weights.T)


def agreeing_sum(rows: Rows, weights: Weights) -> Float32[torch.Tensor, "*shape"]:
    """Return s · |s| / Σ w_t |τ_t| with s = Σ w_t τ_t: what all tasks agree about is kept whole.

    Zero where every weighted element is zero. A single weight of one returns its row, bit for bit.
    """
    total = weighted_sum(rows, weights)
    size = weighted_sum([row.abs() for row in rows], weights)
    return torch.where(size > 0, total * (total.abs() / size), total)


def select_rows(
    rows: Rows, winners: Float32[torch.Tensor, " chunk"] | UInt8[torch.Tensor, " chunk"]
) -> Float32[torch.Tensor, " chunk"]:
    """Return each element from the row of its winner."""
    selected = rows[0]
    for task, row in enumerate(rows):
        selected = torch.where(winners == task, row, selected)
    return selected


def largest_magnitude(rows: Rows) -> UInt8[torch.Tensor, "*shape"]:
    """Return the task of largest magnitude, the later one where they are equal; at most 255 tasks.

    Source: MAGMAX (arXiv:2407.06322).
    """
    best = rows[0].abs()
    # Winners as floats until the end: torch's compiler vectorises a choice of floats, not of bytes.
    winners = torch.zeros_like(best)
    for task, row in enumerate(rows):
        magnitude = row.abs()
        larger = magnitude >= best
        winners = torch.where(larger, float(task), winners)
        best = torch.where(larger, magnitude, best)
    return winners.to(torch.uint8)


def precomputed(rows: Rows, found: Shaped[torch.Tensor, " chunk"]) -> Shaped[torch.Tensor, " chunk"]:
    """Return the values that a survey of the tensor has found already."""
    return found


WEIGHTED_SUM = Op(weighted_sum, name="weighted_sum")
AFFINE_SUM = Op(affine_sum, name="affine_sum", takes_base=True)
AFFINE_SUM_OF_EACH = Op(affine_sum_of_each, name="affine_sum_of_each", takes_base=True)
AGREEING_SUM = Op(agreeing_sum, name="agreeing_sum")
TIES = Op(ties_merge, name="ties")
TIES_SUM = Op(ties_sum, name="ties_sum")
BAND = Op(banded_sum, name="band")
BAND_TIES = Op(banded_ties, name="band_ties")
BAND_TIES_SUM = Op(banded_ties_sum, name="band_ties_sum")
RESCALED_TIES = Op(rescaled_ties, name="rescaled_ties")
DROPPED = Op(dropped_sum, name="dropped")
DROPPED_TIES = Op(dropped_ties, name="dropped_ties")
DROPPED_TIES_SUM = Op(dropped_ties_sum, name="dropped_ties_sum")
SCALED = Op(scaled_sum, name="scaled")
SCALED_TIES = Op(scaled_ties, name="scaled_ties")
SCALED_TIES_SUM = Op(scaled_ties_sum, name="scaled_ties_sum")
SELECTED_TIES = Op(selected_ties, name="selected_ties")
STITCHED = Op(stitched, name="stitched")
BALANCED = Op(balanced_mean, name="balanced", is_wide=True)
CLIPPED = Op(clipped_sum, name="clipped")
LARGEST = Op(largest_magnitude, selects=True, name="largest")
#: Takes merged values of each element (float32), or its winner (uint8).
PRECOMPUTED = Op(precomputed, name="precomputed")
CHOSEN = Op(precomputed, selects=True, name="chosen")

#: All of them, by name.
OPS = {
    op.name: op
    for op in (
        WEIGHTED_SUM,
        AFFINE_SUM,
        AFFINE_SUM_OF_EACH,
        AGREEING_SUM,
        TIES,
        TIES_SUM,
        BAND,
        BAND_TIES,
        BAND_TIES_SUM,
        RESCALED_TIES,
        DROPPED,
        DROPPED_TIES,
        DROPPED_TIES_SUM,
        SCALED,
        SCALED_TIES,
        SCALED_TIES_SUM,
        SELECTED_TIES,
        STITCHED,
        BALANCED,
        CLIPPED,
        LARGEST,
        PRECOMPUTED,
        CHOSEN,
    )
}


def task_rows(
    base: Float[torch.Tensor, " chunk"], checkpoints: Sequence[Float[torch.Tensor, " chunk"]]
) -> list[Float32[torch.Tensor, " chunk"]]:
    """Subtract the base model from each checkpoint, in float32: one row per task.

    Where a float64 tensor takes part, its difference is formed in float64 and then rounded.
    """
    base32 = base.float()
    return [
        (checkpoint.double() - base.double()).float()
        if torch.float64 in (base.dtype, checkpoint.dtype)
        else checkpoint.float() - base32
        for checkpoint in checkpoints
    ]


def task_vectors(
    base: Float[torch.Tensor, " chunk"], checkpoints: Sequence[Float[torch.Tensor, " chunk"]]
) -> Float32[torch.Tensor, "tasks chunk"]:
    """Return the rows of `task_rows` as one tensor."""
    return torch.stack(task_rows(base, checkpoints))
