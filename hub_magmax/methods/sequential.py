"""Methods that merge whole matrices task after task."""

from typing import Annotated

from pydantic import Field

from hub_magmax.kernels.lazy_imports import Tensor
from hub_magmax.methods.matrices import held_with
from hub_magmax.methods.registry import Paper, matrix_method
from hub_magmax.methods.spectra import directions

_OPCM = Paper(
    "2501.09522",
    "opcm",
    "Tang, Anke",
    2025,
    "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
)


@matrix_method("opcm", source=_OPCM, held_bytes=held_with(6))
def opcm(
    task_vectors: "Tensor",
    *,
    multipliers: tuple[float, ...],
    sides: tuple[int, int],
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5,
) -> "Tensor":
    """Add the task vectors one after the other, each without what earlier ones do in their main directions.

    Of a new vector is removed what it has in the strongest singular directions of the sum so far, those that
    hold at most `share` of its singular values, and along each of its other directions. Vectors count by
    preference times the number of tasks, or by coefficients. In the end the sum is scaled to the mean norm of
    the vectors. Uniform preference is OPCM (Tang et al. 2025), which scales once for the whole model. All
    preference on one task returns its vector.
    """
    if len(task_vectors) == 1 and multipliers[0] > 0:
        return task_vectors[0]
    total, norms = multipliers[0] * task_vectors[0].double(), float(task_vectors[0].double().norm())
    norms *= abs(multipliers[0])
    for vector, multiplier in zip(task_vectors[1:], multipliers[1:], strict=True):
        new = vector.double()
        norms += abs(multiplier) * float(new.norm())
        left, strengths, right = directions(total)
        inside = left.T @ new @ right
        num_main = int((strengths.cumsum(0) <= share * strengths.sum()).sum())
        main = inside[:num_main, :num_main].clone()
        along = inside.diagonal()[num_main:].clone()
        new -= left[:, :num_main] @ main @ right[:, :num_main].T
        new -= (left[:, num_main:] * along) @ right[:, num_main:].T
        total += multiplier * new
    size = float(total.norm())
    mean = norms / sum(map(abs, multipliers))
    return (total * (mean / size if size else 0.0)).float()
