"""Methods whose merged vector does to the inputs of each task what the task's own vector does.

The second moments of a layer's inputs are those of the tasks' data. Without data the task vectors tell them:
what a layer was trained on spans the rows of its task vector, and `Gₜ = τₜᵀ τₜ` stands for them.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.methods.data_statistics import TensorStatistics
from hub_magmax.methods.inputs import input_directions, least_squares, products_with_inputs
from hub_magmax.methods.matrices import decomposition_bytes, relative
from hub_magmax.methods.registry import Paper, matrix_method
from hub_magmax.methods.spectra import weighted_sum

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
_PLUSPLUS = Paper(
    "2508.03121",
    "regmeanplusplus",
    "Nguyen, The-Hai",
    2025,
    "{RegMean++}: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
)
_REGMEAN = Paper(
    "2212.09849",
    "regmean",
    "Jin, Xisen",
    2023,
    "Dataless Knowledge Fusion by Merging Weights of Language Models",
)

#: What the elements of moments beside the diagonal are multiplied by.
OffDiagonal = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
#: What is added to the diagonal, as a part of its mean.
Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _held(rows: int, columns: int, num_tasks: int) -> float:
    """Return the bytes that a solution holds: the inputs' second moments are decomposed."""
    return 24 * rows * columns + decomposition_bytes(columns, columns)


@matrix_method("wudi", source=_WUDI, held_bytes=_held)
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
    from hub_magmax.methods.selection.quotas import floored_shares

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


@matrix_method("actmat", source=_ACTMAT, held_bytes=_held)
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
    if len(task_vectors) == 1:
        return task_vectors[0]
    right, squares = input_directions(task_vectors, preference)
    found = products_with_inputs(task_vectors, preference, right)
    if len(squares):
        found = found / (squares + ridge * squares[0])
    return (found @ right.T).float()


def _held_of_data(rows: int, columns: int, num_tasks: int) -> float:
    """Return the bytes that a solution holds: two squares in float64, and twelve bytes more, measured."""
    return 24 * rows * columns + 28 * columns * columns


@matrix_method("regmean", source=_REGMEAN, held_bytes=_held_of_data)
def regmean(
    task_vectors: "Tensor",
    *,
    preference: tuple[float, ...],
    gram: "Sequence[TensorStatistics]",
    off_diagonal: OffDiagonal = 0.9,
    ridge: Ridge = 1e-6,
) -> "Tensor":
    """Change what each task's own layer makes of its own inputs as little as possible, by least squares.

    That is (Σ w_t τ_t C_t)(Σ w_t C_t)⁻¹ with the preference as w_t, and as C_t the mean of x xᵀ over the
    inputs of the layer on the data of task t, its elements beside the diagonal times `off_diagonal`, and the
    diagonal of `ridge` times its mean. Uniform preference is RegMean (Jin et al. 2023), which has no ridge.
    Inputs that are zero in all tasks are averaged. All preference on one task returns its vector.

    Raises:
        RecipeError: If rounding has left the sum without a solution.
    """
    return _by_moments(task_vectors, preference, gram, off_diagonal, ridge)


@matrix_method("regmean_plusplus", source=_PLUSPLUS, held_bytes=_held_of_data)
def regmean_plusplus(
    task_vectors: "Tensor",
    *,
    preference: tuple[float, ...],
    merged_gram: "Sequence[TensorStatistics]",
    off_diagonal: OffDiagonal = 0.9,
    ridge: Ridge = 1e-6,
) -> "Tensor":
    """Merge as `regmean` does, for the inputs that each layer has behind blocks that are merged already.

    The inputs of a layer are those of the task's own block on the data of the task, behind the merged blocks.
    The preference is the weight of each task, and the statistics are of one preference. Uniform preference is
    RegMean++ (Nguyen et al. 2025). All preference on one task returns its vector.

    Raises:
        RecipeError: If rounding has left the sum without a solution.
    """
    return _by_moments(task_vectors, preference, merged_gram, off_diagonal, ridge)


def _by_moments(
    task_vectors: "Tensor",
    preference: tuple[float, ...],
    moments: "Sequence[TensorStatistics]",
    off_diagonal: float,
    ridge: float,
) -> "Tensor":
    if len(task_vectors) == 1:
        return task_vectors[0]
    return least_squares(task_vectors, preference, moments, off_diagonal, ridge).float()
