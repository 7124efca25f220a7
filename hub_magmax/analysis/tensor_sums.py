"""Sums over the elements of some tensors of one shape, of the base model and of every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hub_magmax.kernels import ops
from hub_magmax.methods.selection import quotas
from hub_magmax.planning.findings.swapped import PRINT_ELEMENTS
from hub_magmax.planning.plan import TensorJob


class TensorSums:
    """Sums by tensor, gathered block by block.

    Attributes:
        jobs: The tensors, all of one shape.
        looked_at: Elements of each that were counted.
        same: By tensor and task, whether all values that were compared are the base model's.
        prints: By tensor, the first elements in the base model and in each checkpoint.
        products: By tensor, inner products of the base model and the task vectors.
        agreeing, shared: By tensor and pair of tasks, elements that both changed alike, and at all.
        wins: By tensor and task, elements on which its change is the largest; the later of equal ones.
    """

    def __init__(self, jobs: Sequence[TensorJob], num_tasks: int) -> None:
        count = len(jobs)
        self.jobs = jobs
        self.looked_at = 0
        self.same = np.ones((count, num_tasks), bool)
        self.prints = np.empty((count, num_tasks + 1, 0), np.float32)
        self.products = np.zeros((count, num_tasks + 1, num_tasks + 1))
        self.agreeing, self.shared = np.zeros((2, count, num_tasks, num_tasks))
        self.wins = np.zeros((count, num_tasks))

    @property
    def changed(self) -> np.ndarray:
        """By tensor and task, elements that differ from the base model's."""
        return np.diagonal(self.shared, axis1=1, axis2=2)

    def lacking(self, weights: Sequence[tuple[float, ...]]) -> np.ndarray:
        """By tensor and task, elements that its wins fall short of its quota by the weights of the tensor.

        Where nothing changed, nothing is to be won and nothing to be lacked.
        """
        won = self.wins.sum(axis=1)
        counts = zip(weights, won.tolist(), strict=True)
        wanted = np.array([_quotas(own, round(count)) for own, count in counts], np.float64)
        return np.maximum(wanted - self.wins, 0)

    def compare(self, base: Tensor, checkpoints: Sequence[Tensor]) -> None:
        """Note which tensors, "tensors elements", are not the base model's."""
        for task, checkpoint in enumerate(checkpoints):
            self.same[:, task] &= (checkpoint == base).all(dim=1).numpy()

    def count(self, base: Tensor, checkpoints: Sequence[Tensor]) -> bool:
        """Add a block of every tensor, "tensors elements"; return whether all values are finite."""
        flat = ops.task_vectors(base.flatten(), [checkpoint.flatten() for checkpoint in checkpoints])
        vectors = flat.view(-1, *base.shape)
        if not torch.isfinite(vectors.sum()):
            return False  # nothing was added
        self.compare(base, checkpoints)
        whole = torch.cat([base.float()[None], vectors])
        if not self.looked_at:
            prints = whole[:, :, :PRINT_ELEMENTS].clone()
            prints[1:] += prints[0]
            self.prints = prints.transpose(0, 1).numpy()
        self.looked_at += base.shape[1]
        self.products += _products(whole)
        signs = vectors.sign()
        together, shared = _products(signs), _products(signs.abs())
        self.agreeing += (together + shared) / 2
        self.shared += shared
        self.wins += _wins(vectors)
        return True


def _products(rows: Tensor) -> np.ndarray:
    """Return by tensor the inner products of rows, "tasks tensors elements"."""
    by_tensor = rows.transpose(0, 1)
    return (by_tensor @ by_tensor.transpose(1, 2)).double().numpy()


def _wins(vectors: Tensor) -> np.ndarray:
    """Count by tensor and task the elements, of "tasks tensors elements", on which it changed most."""
    num_tasks, num_tensors, _ = vectors.shape
    largest, winner = vectors.abs().flip(0).max(0)
    places = num_tasks - 1 - winner + num_tasks * torch.arange(num_tensors)[:, None]
    counts = torch.bincount(places[largest > 0], minlength=num_tasks * num_tensors)
    return counts.view(num_tensors, num_tasks).numpy()


#: Small tensors of one shape have the same quotas, and fractions are slow.
_quotas = lru_cache(1024)(quotas)
