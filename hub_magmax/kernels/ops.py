"""Elementwise operations that turn the task vectors of an element into its merged value, in torch.

Every step is correctly rounded and looks at one element (and all tasks) at a time, so a result is the same
to the bit for any chunk size and number of threads. Fused multiply-add (torch's `alpha=`, `addcmul`) is
avoided: it rounds differently in a vector body and its tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float32, Shaped, UInt8

from hub_magmax.kernels.lazy_imports import Array, Rows, torch

#: One number per task.
Weights = Sequence[float] | Array


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
    """

    reference: Callable[..., torch.Tensor]
    selects: bool = False
    name: str = ""
    takes_base: bool = False

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


def weighted_sum(rows: Rows, weights: Weights) -> Float32[torch.Tensor, "*shape"]:
    """Return Σ w_t τ_t, added in the order of the tasks; a weight of zero leaves its task out.

    A weight of one among zeros returns that task vector bit for bit.
    """
    return _added(rows, _as_tensor(weights))


def _added(rows: Rows, weights: Iterable[torch.Tensor]) -> Float32[torch.Tensor, "*shape"]:
    # Adding to a negative zero changes nothing; adding to a positive one would lose signs of zeros.
    total = torch.full_like(rows[0], -0.0)
    for row, weight in zip(rows, weights, strict=True):
        total = torch.where(weight != 0, total + row * weight, total)
    return total


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
    return _added([base, *rows], weights.T)


def agreeing_sum(rows: Rows, weights: Weights) -> Float32[torch.Tensor, "*shape"]:
    """Return s · |s| / Σ w_t |τ_t| with s = Σ w_t τ_t: what all tasks agree about is kept whole.

    Zero where every weighted element is zero. A single weight of one returns its row, bit for bit.
    """
    total = weighted_sum(rows, weights)
    size = weighted_sum([row.abs() for row in rows], weights)
    return torch.where(size > 0, total * (total.abs() / size), total)


def _as_tensor(weights: Weights) -> Float32[torch.Tensor, " tasks"]:
    return torch.as_tensor(weights, dtype=torch.float32)


def select_rows(
    rows: Rows, winners: Float32[torch.Tensor, " chunk"] | UInt8[torch.Tensor, " chunk"]
) -> Float32[torch.Tensor, " chunk"]:
    """Return each element from the row of its winner."""
    selected = rows[0]
    for task, row in enumerate(rows):
        selected = torch.where(winners == task, row, selected)
    return selected


def ties_merge(rows: Rows, thresholds: Weights, weights: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Trim, elect a sign, and average the tasks that agree with it.

    Args:
        rows: One chunk of each task vector.
        thresholds: Elements below their task's threshold count as zero.
        weights: Weight of each task in the election and in the average.

    Source: TIES (arXiv:2306.01708), section 4, with weights.
    """
    return elected_mean(_trimmed(rows, thresholds), weights, weights)


def ties_sum(rows: Rows, thresholds: Weights, multipliers: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Trim as `ties_merge`, and return the `elected_sum`."""
    return elected_sum(_trimmed(rows, thresholds), multipliers, multipliers)


def _trimmed(rows: Rows, thresholds: Weights) -> list[torch.Tensor]:
    pairs = zip(rows, _as_tensor(thresholds), strict=True)
    return [torch.where(row.abs() >= least, row, 0.0) for row, least in pairs]


def elected_mean(rows: Rows, weights: Weights, shares: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t τ_t / Σ s_t over the tasks whose element has the sign of Σ w_t τ_t over all.

    Zero where that sum is zero.

    Args:
        rows: One chunk of each task vector.
        weights: The w_t.
        shares: The s_t; equal to the weights for a mean.
    """
    elected = weighted_sum(rows, weights).sign()
    total = torch.zeros_like(elected)
    mass = torch.zeros_like(elected)
    for row, weight, share in zip(rows, _as_tensor(weights), _as_tensor(shares), strict=True):
        agrees = (row.sign() == elected) & (elected != 0)
        total = total + torch.where(agrees, row * weight, 0.0)
        mass = mass + torch.where(agrees, share, 0.0)
    return torch.where(mass > 0, total / mass, 0.0)


def elected_sum(rows: Rows, multipliers: Weights, rescaled: Weights) -> Float32[torch.Tensor, " chunk"]:
    """Return the sum of all r_t τ_t that have the sign of Σ m_t τ_t over all; zero where that sum is zero.

    A task of a negative multiplier is turned round before the election.

    Args:
        rows: One chunk of each task vector.
        multipliers: The m_t.
        rescaled: The r_t, of the same signs; equal to the multipliers where nothing was dropped.
    """
    elected = weighted_sum(rows, multipliers).sign()
    total = torch.zeros_like(elected)
    for row, multiplier in zip(rows, _as_tensor(rescaled), strict=True):
        product = row * multiplier
        total = total + torch.where((product.sign() == elected) & (elected != 0), product, 0.0)
    return total


def banded_sum(
    rows: Rows, least: Weights, most: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ w_t τ_t over the elements whose magnitude is from `least` to `most` of their task."""
    bounds = zip(rows, _as_tensor(least), _as_tensor(most), strict=True)
    kept = [torch.where((row.abs() >= low) & (row.abs() <= high), row, 0.0) for row, low, high in bounds]
    return weighted_sum(kept, weights)


def dropped_sum(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return Σ m_t τ_t over the tasks that keep the element; the m_t hold the rescaling."""
    return weighted_sum(_masked(rows, kept), multipliers)


def dropped_ties(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], shares: Weights, weights: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_mean` over the tasks that keep the element; the shares hold the rescaling.

    Elements that were rescaled each by itself, and rounded, would no longer cancel where the masses of both
    signs are equal.
    """
    return elected_mean(_masked(rows, kept), weights, shares)


def dropped_ties_sum(
    rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"], rescaled: Weights, multipliers: Weights
) -> Float32[torch.Tensor, " chunk"]:
    """Return the `elected_sum` over the tasks that keep the element."""
    return elected_sum(_masked(rows, kept), multipliers, rescaled)


def _masked(rows: Rows, kept: UInt8[torch.Tensor, "chunk bytes"]) -> list[torch.Tensor]:
    is_kept = [(kept[:, task // 8] & (1 << task % 8)).bool() for task in range(len(rows))]
    return [torch.where(keep, row, 0.0) for keep, row in zip(is_kept, rows, strict=True)]


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
DROPPED = Op(dropped_sum, name="dropped")
DROPPED_TIES = Op(dropped_ties, name="dropped_ties")
DROPPED_TIES_SUM = Op(dropped_ties_sum, name="dropped_ties_sum")
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
        DROPPED,
        DROPPED_TIES,
        DROPPED_TIES_SUM,
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
