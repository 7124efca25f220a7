"""TIES: trim, elect signs, and average what agrees."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hub_magmax.methods.registry import TensorRule, merge_method, preferred

if TYPE_CHECKING:
    from hub_magmax.selection import Chunks


@merge_method("ties", source="arXiv:2306.01708", scaling=1.0, form="rule", uses=preferred)
def ties(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    density: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.2,
    scope: Literal["tensor", "model"] = "tensor",
) -> TensorRule:
    """Average, per element, the tasks that agree with the sign elected by weighted mass.

    Each task vector is first trimmed to the `density` of its largest magnitudes in the tensor or, with the
    scope `model`, in all merged tensors: `ceil(density · n)` elements and everything that ties with the
    smallest of them. The preference weights both the election and the average; uniform preference and the
    scope `model` give TIES as published (Yadav et al. 2023).
    """
    import torch

    from hub_magmax import kernels

    # As written: 0.07 of 100 is 7, though the nearest float to 0.07 lies above it.
    keep = math.ceil(Fraction(repr(density)) * chunks.num_elements)
    (thresholds,) = kernels.magnitude_thresholds(chunks, (keep,))
    weights = torch.tensor(preference, dtype=torch.float32)
    return TensorRule(kernels.ties_merge, per_task=(thresholds, weights))
