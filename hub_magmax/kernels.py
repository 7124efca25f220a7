"""The elementwise passes behind the methods.

Every operation here is correctly rounded and looks at one element (and all tasks) at a time, so
a result is the same to the bit for any chunk size and number of threads. Fused multiply-add
(torch's `alpha=`, `addcmul`) is avoided: it rounds differently in a vector body and its tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64, Shaped, UInt8
from torch import Tensor

from hub_magmax.randomness import CounterGenerator
from hub_magmax.selection import Chunks, Rows

#: One number per task.
Weights = Sequence[float] | Float32[Tensor, " tasks"]

#: The first histogram tells the 16 high bits of |τ| apart, the second one the others.
_LOW_BITS = 15
#: Tensors of up to this many numbers (tasks times elements) are held and sorted instead of counted.
_HELD_NUMBERS = 1 << 20


def task_rows(
    base: Float[Tensor, " chunk"], checkpoints: Sequence[Float[Tensor, " chunk"]]
) -> list[Float32[Tensor, " chunk"]]:
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
    base: Float[Tensor, " chunk"], checkpoints: Sequence[Float[Tensor, " chunk"]]
) -> Float32[Tensor, "tasks chunk"]:
    """Return the rows of `task_rows` as one tensor."""
    return torch.stack(task_rows(base, checkpoints))


def apply_update(
    base: Float[Tensor, " chunk"],
    merged: Float32[Tensor, " chunk"],
    scaling: float | Float64[Tensor, ""],
    dtype: torch.dtype,
) -> Float[Tensor, " chunk"]:
    """Return base + scaling · merged, cast once to `dtype` (round to nearest even).

    Computed in float32, or in float64 where the base model or the output is. Elements whose
    update is zero keep the base model's bits, the sign of a zero included.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, dtype) else torch.float32
    update = merged.to(wide) * scaling
    start = base.to(wide)
    updated = torch.where(update == 0, start, start + update)
    if wide == torch.float64 and dtype.itemsize < torch.float32.itemsize:
        # torch casts by way of float32, which would round twice.
        return _odd_float32(updated).to(dtype)
    return updated.to(dtype)


def _odd_float32(values: Float64[Tensor, " chunk"]) -> Float32[Tensor, " chunk"]:
    """Cast so that a second rounding to fewer bits is right: of two neighbours take the odd one."""
    near = values.to(torch.float32)
    too_far = (near.double().abs() > values.abs()).int()
    inexact = (near.double() != values).int()
    # Bits of floats of one sign sort like their magnitudes: one less is the next towards zero.
    return ((near.view(torch.int32) - too_far) | inexact).view(torch.float32)


def weighted_sum(rows: Rows, weights: Weights) -> Float32[Tensor, "*shape"]:
    """Return Σ w_t τ_t, added in the order of the tasks; a weight of zero leaves its task out.

    A weight of one among zeros returns that task vector bit for bit.
    """
    # Adding to a negative zero changes nothing; adding to a positive one would lose signs of zeros.
    total = torch.full_like(rows[0], -0.0)
    for row, weight in zip(rows, _as_tensor(weights), strict=True):
        total = torch.where(weight != 0, total + row * weight, total)
    return total


def _as_tensor(weights: Weights) -> Float32[Tensor, " tasks"]:
    return torch.as_tensor(weights, dtype=torch.float32)


def select_rows(
    rows: Rows, winners: Float32[Tensor, " chunk"] | UInt8[Tensor, " chunk"]
) -> Float32[Tensor, " chunk"]:
    """Return each element from the row of its winner."""
    selected = rows[0]
    for task, row in enumerate(rows):
        selected = torch.where(winners == task, row, selected)
    return selected


def given(rows: Rows, found: Shaped[Tensor, " chunk"]) -> Shaped[Tensor, " chunk"]:
    """Return what a survey of the tensor has found already."""
    return found


def magnitude_thresholds(chunks: Chunks, keep: int) -> Float32[Tensor, " tasks"]:
    """Return each task's `keep`-th largest magnitude in a tensor, exactly.

    The bits of a non-negative float32 sort like the number, so two histograms find it: one of
    the high bits, then one of the low bits among those that share the high bits. Memory does
    not grow with the tensor's size.

    Args:
        chunks: The tensor's task vectors; read once if small, else twice.
        keep: From 0 to the number of elements; 0 gives infinity.
    """
    assert 0 <= keep <= chunks.num_elements
    if keep == 0:
        return torch.full((chunks.num_tasks,), math.inf)
    if chunks.num_tasks * chunks.num_elements <= _HELD_NUMBERS:
        magnitudes = torch.cat([block.abs() for _, block in chunks], dim=1)
        return magnitudes.kthvalue(chunks.num_elements - keep + 1, dim=1).values
    return _count_thresholds(chunks, keep)


def _count_thresholds(chunks: Chunks, keep: int) -> Float32[Tensor, " tasks"]:
    """Find the thresholds of a tensor of any size from two histograms per task."""
    tasks = range(chunks.num_tasks)
    high = [torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64) for _ in tasks]
    for _, block in chunks:
        for task in tasks:
            high[task] += _histogram(_bits(block[task]) >> _LOW_BITS, len(high[task]))
    found = [_from_the_top(counts, keep) for counts in high]
    low = [torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for _ in tasks]
    for _, block in chunks:
        for task in tasks:
            bits = _bits(block[task])
            inside = bits[(bits >> _LOW_BITS) == found[task][0]]
            low[task] += _histogram(inside & ((1 << _LOW_BITS) - 1), len(low[task]))
    thresholds = [
        (place << _LOW_BITS) | _from_the_top(counts, rest)[0]
        for counts, (place, rest) in zip(low, found, strict=True)
    ]
    return torch.tensor(thresholds, dtype=torch.int32).view(torch.float32)


def _bits(values: Float32[Tensor, " chunk"]) -> Int32[Tensor, " chunk"]:
    return values.abs().view(torch.int32)


def _histogram(bins: Int32[Tensor, " chunk"], num_bins: int) -> Int64[Tensor, " bins"]:
    return torch.bincount(bins.long(), minlength=num_bins)


def _from_the_top(counts: Int64[Tensor, " bins"], rank: int) -> tuple[int, int]:
    """Return the bin of the `rank`-th largest value, and its rank within that bin."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def ties_merge(
    rows: Rows, thresholds: Float32[Tensor, " tasks"], weights: Weights
) -> Float32[Tensor, " chunk"]:
    """Trim, elect a sign, and average the tasks that agree with it.

    Args:
        rows: One chunk of each task vector.
        thresholds: Elements below their task's threshold count as zero.
        weights: Weight of each task in the election and in the average.

    Returns:
        Σ w_t τ_t / Σ w_t over the tasks whose trimmed element has the sign of Σ w_t τ_t; zero
        where that sum is zero.

    Source: TIES (arXiv:2306.01708), section 4, with weights.
    """
    shares = _as_tensor(weights)
    trimmed = [torch.where(row.abs() >= least, row, 0.0) for row, least in zip(rows, thresholds, strict=True)]
    elected = weighted_sum(trimmed, shares).sign()
    total = torch.zeros_like(elected)
    mass = torch.zeros_like(elected)
    for row, weight in zip(trimmed, shares, strict=True):
        agrees = (row.sign() == elected) & (elected != 0)
        total = total + torch.where(agrees, row * weight, 0.0)
        mass = mass + torch.where(agrees, weight, 0.0)
    return torch.where(mass > 0, total / mass, 0.0)


def random_mix(
    start: int, count: int, weights: Sequence[float], generator: CounterGenerator
) -> UInt8[Tensor, " count"]:
    """Return a task for each element, drawn with `weights` as probabilities.

    Args:
        start: Index of the first element in its tensor.
        count: Elements to draw for.
        weights: Non-negative, sum to 1; a weight of zero is never drawn.
        generator: The tensor's.
    """
    wanted = [task for task, weight in enumerate(weights) if weight > 0]
    edges = torch.tensor([weights[task] for task in wanted], dtype=torch.float64).cumsum(0)
    draws = generator.uniform(start, count, stream=0)
    # The last edge is left out: sums of floats may end just below 1.
    places = torch.bucketize(draws, edges[:-1], right=True)
    return torch.tensor(wanted, dtype=torch.uint8)[places]
