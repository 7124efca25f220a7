"""What is done with every chunk of a tensor, from stored values to stored values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hub_magmax import kernels

#: What a pass returns: merged values in the output's dtype, elements per task (float32, exact
#: below 2^24; empty unless tasks are selected), and a sum that is finite only if all task vectors and
#: all merged values are.
Merged = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """What is done with every chunk of a tensor.

    Attributes:
        combine: Takes one row per task (float32, elements) and the rule's inputs; returns the
            merged task vector, or the winners (uint8) if `selects`.
        selects: What `combine` returns.
        dtype: Of the output.
    """

    combine: Callable[..., Tensor]
    selects: bool
    dtype: torch.dtype

    def __call__(
        self,
        base: Tensor,
        checkpoints: Sequence[Tensor],
        per_element: Sequence[Tensor],
        per_task: Sequence[Tensor],
        scaling: Tensor,
        num_valid: Tensor,
    ) -> Merged:
        """Merge one chunk.

        Args:
            base, checkpoints: Values as stored, all of the same length.
            per_element, per_task: What the tensor's rule gives `combine`.
            scaling: Scaling coefficient; float64, no dimensions.
            num_valid: Elements from the start that count; the rest is padding. int64, no dimensions.
        """
        rows = kernels.task_rows(base, checkpoints)
        found = self.combine(rows, *per_element, *per_task)
        counts = torch.empty(0)
        if self.selects:
            valid = torch.arange(len(base)) < num_valid
            # Winners as floats: the compiler vectorises their comparison, which it does not for bytes.
            winners = torch.where(valid, found.float(), -1.0)
            counts = torch.stack([torch.where(winners == t, 1.0, 0.0).sum() for t in range(len(rows))])
            found = kernels.select_rows(rows, winners)
        merged = kernels.apply_update(base, found, scaling, self.dtype)
        probe = torch.stack([row.sum() for row in (*rows, merged.float())]).sum()
        return merged, counts, probe
