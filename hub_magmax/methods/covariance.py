"""Methods that take the inputs of a layer from the task vectors themselves, in place of data.

What a layer was trained on spans the rows of its task vector. So `Gₜ = τₜᵀ τₜ` stands for the second moments
of the inputs of task t, and the merged vector does to the inputs of each task what its own vector does.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hub_magmax.methods.matrices import decomposition_bytes, relative
from hub_magmax.methods.registry import Paper, merge_method, preferred

if TYPE_CHECKING:
    from torch import Tensor

_WUDI = Paper(
    "2503.08099",
    "wudi",
    "Cheng, Runxi",
    2025,
    "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
)
_ACTMAT = Paper(
    "2604.01329",
    "actmat",
    "Hameed, Marawan Gamal Abdel",
    2026,
    "Model Merging via Data-Free Covariance Estimation",
)


def _held(rows: int, columns: int, num_tasks: int) -> float:
    """Return the bytes that a solution holds: the inputs' second moments are decomposed."""
    return 24 * rows * columns + decomposition_bytes(columns, columns)


@merge_method(
    "wudi",
    source=_WUDI,
    form="matrix",
    held_bytes=_held,
    uses=preferred,
    in_comparison=(),
    is_portable=False,
)
def wudi(
    task_vectors: "Tensor",
    *,
    preference: tuple[float, ...],
    sides: tuple[int, int],
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | Literal["adaptive"] = "adaptive",
    time: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
) -> "Tensor":
    """Change each task as little as possible on its own inputs, in the strongest directions of these.

    Least is Σ v_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² (Cheng et al. 2025), with the preference as a share of the
    largest one as v_t; uniform preference is as published. In the strongest directions of the inputs the
    solution is exact, or, with a `time`, as far as gradient descent comes in that time; elsewhere it is the
    sum of the task vectors times v_t. `share` of the directions count, or as many as they are in effect:
    SWUDI and its adaptive form (arXiv:2606.07289). All preference on one task returns its vector.
    """
    import torch

    from hub_magmax.methods.inputs import input_directions, products_with_inputs
    from hub_magmax.methods.selection.quotas import floored_shares
    from hub_magmax.methods.spectra import weighted_sum

    if len(task_vectors) == 1:
        return task_vectors[0]
    weights = relative(preference)
    importance = [
        w / max(float(v.double().square().sum()), 1e-300) for v, w in zip(task_vectors, weights, strict=True)
    ]
    right, squares = input_directions(task_vectors, importance)
    if share == "adaptive":
        count = int(torch.ceil(squares.sqrt().sum() ** 2 / squares.sum())) if len(squares) else 0
    else:
        count = sides[1] - floored_shares((share, 1 - share), sides[1])[1]
    right, squares = right[:, :count], squares[:count]
    kept = torch.ones_like(squares) if time is None else -torch.expm1(-squares * time)
    merged = weighted_sum(task_vectors, weights)
    exact = products_with_inputs(task_vectors, importance, right) / squares
    merged += ((exact - merged @ right) * kept) @ right.T
    return merged.float()


@merge_method(
    "actmat",
    source=_ACTMAT,
    form="matrix",
    held_bytes=_held,
    uses=preferred,
    in_comparison=(),
    is_portable=False,
)
def actmat(
    task_vectors: "Tensor",
    *,
    preference: tuple[float, ...],
    sides: tuple[int, int],
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4,
) -> "Tensor":
    """Take the least-squares merge for inputs that have the second moments of the task vectors' rows.

    That is (Σ w_t τ_t G_t)(Σ w_t G_t + ε)⁻¹ with G_t = τ_tᵀ τ_t, the preference as w_t, and `ridge` times the
    largest eigenvalue of the sum as ε. Uniform preference is ACTMat (Hameed et al. 2026), which inverts
    without ε what float32 resolves. All preference on one task returns its vector.
    """
    from hub_magmax.methods.inputs import input_directions, products_with_inputs

    if len(task_vectors) == 1:
        return task_vectors[0]
    right, squares = input_directions(task_vectors, preference)
    found = products_with_inputs(task_vectors, preference, right)
    if len(squares):
        found = found / (squares + ridge * squares[0])
    return (found @ right.T).float()
