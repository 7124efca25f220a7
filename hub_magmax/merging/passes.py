"""What is done with every chunk of a tensor, operation by operation, from stored values to stored values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub_magmax.checkpoints.stored import Stored, torch_dtype
from hub_magmax.kernels import reference
from hub_magmax.kernels.lazy_imports import Array, torch

if TYPE_CHECKING:
    import numpy as np

#: What a pass returns: merged values in the output's dtype, elements per task (int64; empty unless tasks
#: are selected), and a number that is finite only if all task vectors and all merged values are.
Merged = tuple[Stored, "np.ndarray", float]

#: What stays in the caches, operation by operation.
PIECE_ELEMENTS = 2**16


@dataclass(frozen=True)
class Pass:
    """What is done with every chunk of a tensor.

    Attributes:
        combine: Takes one row per task (float32, elements) and the rule's inputs; returns the
            merged task vector, or the winners (uint8) if `selects`.
        selects: What `combine` returns.
        dtype: Of the output, as safetensors calls it.
    """

    combine: Callable[..., torch.Tensor]
    selects: bool
    dtype: str

    def __call__(
        self,
        base: torch.Tensor,
        checkpoints: Sequence[torch.Tensor],
        per_element: Sequence[Array],
        per_task: Sequence[Array],
        scaling: torch.Tensor,
    ) -> Merged:
        """Merge one chunk.

        Args:
            base, checkpoints: Values as stored, all of the same length.
            per_element, per_task: What the tensor's rule gives `combine`.
            scaling: Scaling coefficient; float64, no dimensions.
        """
        parts = []
        found, facts = ([torch.as_tensor(values) for values in given] for given in (per_element, per_task))
        for start in range(0, max(1, len(base)), PIECE_ELEMENTS):
            piece = slice(start, start + PIECE_ELEMENTS)
            stored = base[piece], [checkpoint[piece] for checkpoint in checkpoints]
            parts.append(self._piece(*stored, [v[piece] for v in found], facts, scaling))
        merged, counts, probes = zip(*parts, strict=True)
        whole = Stored.of(torch.cat(merged))
        return whole, torch.stack(counts).sum(dim=0).numpy(), float(torch.stack(probes).sum())

    def _piece(
        self,
        base: torch.Tensor,
        checkpoints: Sequence[torch.Tensor],
        per_element: Sequence[torch.Tensor],
        per_task: Sequence[torch.Tensor],
        scaling: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = reference.task_rows(base, checkpoints)
        found = self.combine(rows, *per_element, *per_task)
        counts = torch.empty(0, dtype=torch.int64)
        if self.selects:
            counts = torch.bincount(found, minlength=len(rows))
            found = reference.select_rows(rows, found)
        merged = reference.apply_update(base, found, scaling, torch_dtype(self.dtype))
        probe = torch.stack([row.sum() for row in (*rows, merged.float())]).sum()
        return merged, counts, probe
