"""Methods that merge the singular directions of whole matrices."""

from typing import TYPE_CHECKING

from hub_magmax.methods.matrices import decomposition_bytes, relative
from hub_magmax.methods.registry import Paper, merge_method, preferred

if TYPE_CHECKING:
    from torch import Tensor

_TSV = Paper(
    "2412.00081",
    "tasksingularvectors",
    "Gargiulo, Antonio Andrea",
    2024,
    "Task Singular Vectors: Reducing Task Interference in Model Merging",
)


def _held_by_tsv(rows: int, columns: int, num_tasks: int) -> float:
    """Return the bytes that `tsv` holds beside the task vectors: two matrices, and a decomposition."""
    return 16 * rows * columns + decomposition_bytes(rows, columns)


@merge_method(
    "tsv",
    source=_TSV,
    form="matrix",
    held_bytes=_held_by_tsv,
    uses=preferred,
    in_comparison=(),
    is_portable=False,
)
def tsv(task_vectors: "Tensor", *, preference: tuple[float, ...]) -> "Tensor":
    """Add the strongest singular directions of each task, turned to be at right angles to each other.

    Of a matrix of rank r task t gives its ⌊r · preference⌋ strongest directions, with their singular values
    times its preference as a share of the largest one. Uniform preference is TSV-M as published (Gargiulo et
    al. 2024): r/T directions of each task, as they are. All preference on one task returns its vector. A
    matrix with fewer directions than tasks is averaged.
    """
    import torch

    from hub_magmax.methods.selection.quotas import floored_shares
    from hub_magmax.methods.spectra import Directions, directions, nearest_orthonormal

    num_tasks, *sides = task_vectors.shape
    if num_tasks == 1:
        return task_vectors[0]
    if min(sides) < num_tasks:
        return _mean(task_vectors, preference)
    lefts, rights, strengths = [], [], []
    shares = floored_shares(preference, min(sides))
    for vector, share, weight in zip(task_vectors, shares, relative(preference), strict=True):
        found = directions(vector.double(), share)
        lefts.append(found.left)
        rights.append(found.right)
        strengths.append(found.strengths * weight)
    left, right = nearest_orthonormal(lefts), nearest_orthonormal(rights)
    return Directions(left, torch.cat(strengths), right).product.float()


def _mean(task_vectors: "Tensor", preference: tuple[float, ...]) -> "Tensor":
    import torch

    weights = torch.tensor(preference, dtype=torch.float64, device=task_vectors.device)
    return torch.einsum("t,t...->...", weights, task_vectors.double()).float()
