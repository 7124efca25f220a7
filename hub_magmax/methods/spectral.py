"""Methods that merge the singular directions of whole matrices."""

from typing import Annotated

from pydantic import Field

from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.methods.matrices import held_with, relative
from hub_magmax.methods.registry import Paper, matrix_method
from hub_magmax.methods.spectra import Directions, directions, nearest_orthonormal, weighted_sum

_TSV = Paper(
    "2412.00081",
    "tasksingularvectors",
    "Gargiulo, Antonio Andrea",
    2024,
    "Task Singular Vectors: Reducing Task Interference in Model Merging",
)
_ISO = Paper(
    "2502.04959",
    "isotropicmerging",
    "Marczak, Daniel",
    2025,
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
)
_CART = Paper("2412.12153", "cart", "Choi, Jiho", 2024, "Revisiting Weight Averaging for Model Merging")

#: A share of the directions of a matrix.
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@matrix_method("tsv", source=_TSV, held_bytes=held_with(2))
def tsv(task_vectors: "Tensor", *, preference: tuple[float, ...], sides: tuple[int, int]) -> "Tensor":
    """Add the strongest singular directions of each task, turned to be at right angles to each other.

    Of a matrix of rank r task t gives its ⌊r · preference⌋ strongest directions, with their singular values
    times its preference as a share of the largest one. Uniform preference is TSV-M as published (Gargiulo et
    al. 2024): r/T directions of each task, as they are. All preference on one task returns its vector. A
    matrix with fewer directions than tasks is averaged.
    """
    from hub_magmax.methods.selection.quotas import floored_shares

    num_tasks = len(task_vectors)
    if num_tasks == 1:
        return task_vectors[0]
    if min(sides) < num_tasks:
        return weighted_sum(task_vectors, preference).float()
    lefts, rights, strengths = [], [], []
    shares = floored_shares(preference, min(sides))
    for vector, share, weight in zip(task_vectors, shares, relative(preference), strict=True):
        found = directions(vector.double(), share)
        lefts.append(found.left)
        rights.append(found.right)
        strengths.append(found.strengths * weight)
    left, right = nearest_orthonormal(lefts), nearest_orthonormal(rights)
    return Directions(left, torch.cat(strengths), right).product.float()


@matrix_method("iso_c", source=_ISO, held_bytes=held_with(2))
def iso_c(task_vectors: "Tensor", *, preference: tuple[float, ...], sides: tuple[int, int]) -> "Tensor":
    """Add the task vectors, and make all singular values of the sum equal to their mean.

    Each vector counts by its preference as a share of the largest one. Uniform preference is Iso-C as
    published (Marczak et al. 2025). All preference on one task makes its singular values equal.
    """
    found = directions(weighted_sum(task_vectors, relative(preference)))
    strength = found.strengths.sum() / min(sides)
    return ((found.left * strength) @ found.right.T).float()


@matrix_method("iso_cts", source=_ISO, held_bytes=held_with(5))
def iso_cts(
    task_vectors: "Tensor", *, preference: tuple[float, ...], sides: tuple[int, int], common: Share = 0.8
) -> "Tensor":
    """Join directions of the sum with those that each task has besides, all equally strong.

    Of a matrix of rank r the strongest `common` · r directions are those of the sum, in which a vector counts
    by its preference as a share of the largest one. The rest is shared out by preference: each task gives
    its strongest directions outside of those, as many for every task under uniform preference, which is
    Iso-CTS as published (Marczak et al. 2025). All preference on one task is `iso_c`.
    """
    from hub_magmax.methods.selection.quotas import floored_shares, quotas

    rank, num_tasks, weights = min(sides), len(task_vectors), relative(preference)
    left_over = rank - floored_shares((common, 1 - common), rank)[0]
    num_own = min(round(left_over / num_tasks), rank // num_tasks) * num_tasks
    shared = directions(weighted_sum(task_vectors, weights), rank - num_own)
    lefts, rights, total = [shared.left], [shared.right], shared.strengths.sum()
    for vector, count, weight in zip(task_vectors, quotas(preference, num_own), weights, strict=True):
        outside = vector.double()
        size = float(outside.norm())
        outside -= shared.left @ (shared.left.T @ outside)
        own = directions(outside, count, size=size)
        lefts.append(own.left)
        rights.append(own.right)
        total = total + weight * own.strengths.sum()
    left, right = nearest_orthonormal(lefts), nearest_orthonormal(rights)
    return ((left * (total / rank)) @ right.T).float()


@matrix_method("cart", source=_CART, held_bytes=held_with(4.5))
def cart(
    task_vectors: "Tensor",
    *,
    preference: tuple[float, ...],
    sides: tuple[int, int],
    rank: Share = 0.12,
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0,
) -> "Tensor":
    """Add to the mean what each task has besides it, in its strongest singular directions.

    The mean is weighted by preference. Of what task t has besides it, the share `rank` of the directions
    stays, at least one; all of it is added, times `spread` and the preference as a share of the largest one.
    Uniform preference is CART as published (Choi et al. 2024). All preference on one task returns its vector.
    """
    from hub_magmax.methods.selection.quotas import floored_shares

    if len(task_vectors) == 1:
        return task_vectors[0]
    merged = weighted_sum(task_vectors, preference)
    mean = merged.clone()
    count = max(1, floored_shares((rank, 1 - rank), min(sides))[0])
    for vector, weight in zip(task_vectors, relative(preference), strict=True):
        besides = vector.double()
        size = float(besides.norm())
        found = directions(besides.sub_(mean), count, size=size)
        merged.addmm_(found.left * found.strengths, found.right.T, alpha=spread * weight)
    return merged.float()
