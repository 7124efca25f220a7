"""Arcee Fusion: elements of a task vector that stand out by size, in rows whose softmax changed."""

from typing import TYPE_CHECKING

from hub_magmax.kernels.lazy_imports import np, torch
from hub_magmax.methods.registry import merge_method, preferred

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float64, UInt64
    from torch import Tensor

#: Elements of rows that are worked on at a time.
_AT_ONCE = 2**18
#: Added to probabilities, as in mergekit.
_EPSILON = 1e-8
#: Bits of quartiles that a pass over a tensor finds; the sign of a number of 64 bits.
_DIGIT, _SIGN = 16, -(2**63)


@merge_method(
    "arcee_fusion",
    source="Arcee, mergekit",
    form="tensor",
    held_bytes=4,
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
    merged = torch.zeros_like(base)
    for vector, weight in zip(task_vectors, preference, strict=True):
        if weight:
            width = vector.shape[-1] if vector.ndim else 1
            rows, below, out = (values.reshape(-1, width) for values in (vector, base, merged))
            divergences = _divergences(rows, below)
            least = _threshold(rows, divergences)
            for some, divergence, kept in _some_rows(rows, divergences, out.view(-1, width)):
                kept.add_(torch.where(_importance(some, divergence) >= least, some, 0.0) * weight)
    return merged


def _divergences(rows: "Tensor", below: "Tensor") -> "Tensor":
    """Return the divergence of each row, in float64, in a column."""
    found = torch.empty(len(rows), 1, dtype=torch.float64)
    for some, before, out in _some_rows(rows, below, found):
        start = before.double()
        after = torch.softmax(start + some.double(), dim=-1) + _EPSILON
        unmoved = torch.softmax(start, dim=-1) + _EPSILON
        out.copy_((after * torch.log(after / unmoved)).sum(dim=-1, keepdim=True))
    return found


def _importance(rows: "Tensor", divergences: "Tensor") -> "Tensor":
    return rows.double().abs() * divergences


def _some_rows(matrix: "Tensor", *others: "Tensor") -> "Iterator[tuple[Tensor, ...]]":
    """Yield the same rows of matrices, some at a time."""
    num_rows = max(1, _AT_ONCE // matrix.shape[1])
    yield from zip(*(each.split(num_rows) for each in (matrix, *others)), strict=True)


def _threshold(rows: "Tensor", divergences: "Tensor") -> float:
    """Return the least importance that is kept, by quartiles that are found bit by bit.

    Importances are computed anew for every sixteen bits of the quartiles, so that none are held.
    """
    places = [(rows.numel() - 1) * quarter // 4 for quarter in (1, 2, 3)]
    found = [0, 0, 0]
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = {leading: np.zeros(1 << _DIGIT, np.int64) for leading in found}
        for some, divergence in _some_rows(rows, divergences):
            digits = _sortable(_importance(some, divergence)) >> np.uint64(shift)
            upper, last = digits >> np.uint64(_DIGIT), digits & np.uint64((1 << _DIGIT) - 1)
            for one, own in counts.items():
                np.add(own, np.bincount(last[upper == one].view(np.int64), minlength=len(own)), out=own)
        ends = {leading: own.cumsum() for leading, own in counts.items()}
        for quartile, leading in enumerate(found):
            digit = int(np.searchsorted(ends[leading], places[quartile], side="right"))
            places[quartile] -= int(ends[leading][digit - 1]) if digit else 0
            found[quartile] = leading << _DIGIT | digit
    first, median, third = _from_sortable(np.array(found, np.uint64)).tolist()
    threshold: float = median + 1.5 * (third - first)
    return threshold


def _sortable(values: "Tensor") -> "UInt64[np.ndarray, ' elements']":
    """Return integers without a sign that sort like numbers."""
    bits = values.numpy().reshape(-1).view(np.int64)
    return (bits ^ (bits >> 63 | _SIGN)).view(np.uint64)


def _from_sortable(values: "UInt64[np.ndarray, ' elements']") -> "Float64[np.ndarray, ' elements']":
    """Return the numbers that `_sortable` was given."""
    bits = values.view(np.int64)
    return (bits ^ (~bits >> 63 | _SIGN)).view(np.float64)
