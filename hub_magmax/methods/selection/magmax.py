"""MAGMAX's rule: the largest magnitude wins."""

from __future__ import annotations

from jaxtyping import UInt8

from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.methods.chunks import Rows, check_task_count


def largest_magnitude(rows: Rows) -> UInt8[torch.Tensor, "*shape"]:
    """Return MAGMAX's winners: the task of largest magnitude, the later one where they are equal.

    Args:
        rows: One task vector per task.

    Raises:
        RecipeError: If there are more than 255 tasks.

    Source: MAGMAX (arXiv:2407.06322).
    """
    check_task_count(len(rows), limit=255)
    best = rows[0].abs()
    # Winners as floats until the end: torch's compiler vectorises a choice of floats, not of bytes.
    winners = torch.zeros_like(best)
    for task, row in enumerate(rows):
        magnitude = row.abs()
        larger = magnitude >= best
        winners = torch.where(larger, float(task), winners)
        best = torch.where(larger, magnitude, best)
    return winners.to(torch.uint8)
