"""Arcee Fusion: elements of a task vector that stand out by size, in rows whose softmax changed."""

from typing import TYPE_CHECKING

from hub_magmax.methods.registry import merge_method, preferred

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Elements of rows that are worked on at a time.
_AT_ONCE = 2**18
#: Added to probabilities, as in mergekit.
_EPSILON = 1e-8


@merge_method(
    "arcee_fusion",
    source="Arcee, mergekit",
    form="tensor",
    held_bytes=24,
    uses=preferred,
    in_comparison=(),
    is_portable=False,
)
def arcee_fusion(task_vectors: "Tensor", *, base: "Tensor", preference: tuple[float, ...]) -> "Tensor":
    """Keep the important elements of each task vector, and average by preference what is kept.

    The importance of an element is |τ| times the divergence Σ p log(p / q) of its row: p and q are the
    softmax along the last axis of the task's values and of the base model's, each plus 1e-8. Kept is what is
    at least the median plus 1.5 times the distance from the first quartile to the third, of the tensor; the
    quartiles are the elements of rank ⌊(n − 1) / 4⌋ and so on, of all n elements, where mergekit draws a
    million of larger tensors. One task is mergekit's form, whatever its preference; with more, uniform
    preference averages what each keeps.
    """
    import torch

    merged = torch.zeros_like(base)
    for vector, weight in zip(task_vectors, preference, strict=True):
        if weight:
            importance = _importance(vector, base)
            is_kept = importance >= _threshold(importance)
            merged += torch.where(is_kept.view(vector.shape), vector, 0.0) * weight
    return merged


def _importance(vector: "Tensor", base: "Tensor") -> "Tensor":
    """Return the importance of each element, flat, in float64."""
    import torch

    found = torch.empty(vector.numel(), dtype=torch.float64)
    width = vector.shape[-1] if vector.ndim else 1
    for rows, below, out in _some_rows(
        vector.reshape(-1, width), base.reshape(-1, width), found.view(-1, width)
    ):
        moved, start = rows.double(), below.double()
        after = torch.softmax(start + moved, dim=-1) + _EPSILON
        before = torch.softmax(start, dim=-1) + _EPSILON
        divergence = (after * torch.log(after / before)).sum(dim=-1, keepdim=True)
        out.copy_(moved.abs() * divergence)
    return found


def _some_rows(*matrices: "Tensor") -> "Iterator[tuple[Tensor, ...]]":
    """Yield the same rows of matrices of one shape, some at a time."""
    num_rows = max(1, _AT_ONCE // matrices[0].shape[1])
    yield from zip(*(matrix.split(num_rows) for matrix in matrices), strict=True)


def _threshold(importance: "Tensor") -> float:
    """Return the least importance that is kept."""
    import numpy as np

    places = [(len(importance) - 1) * quarter // 4 for quarter in (1, 2, 3)]
    first, median, third = np.partition(importance.numpy(), places)[places].tolist()
    threshold: float = median + 1.5 * (third - first)
    return threshold
