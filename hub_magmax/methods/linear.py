"""Methods that add task vectors."""

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hub_magmax.kernels.ops import AGREEING_SUM
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule, affine_rule

if TYPE_CHECKING:
    from hub_magmax.methods.chunks import Chunks


_MODEL_SOUPS = Paper(
    "2203.05482",
    "modelsoups",
    "Wortsman, Mitchell",
    2022,
    "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
    "inference time",
)
_TASK_ARITHMETIC = Paper(
    "2212.04089", "taskarithmetic", "Ilharco, Gabriel", 2022, "Editing Models with Task Arithmetic"
)


@merge_method("average", source=_MODEL_SOUPS, scaling=1.0, form="linear", uses=preferred)
def average(num_tasks: int, *, preference: tuple[float, ...]) -> tuple[float, ...]:
    """Average the task vectors, each weighted by its preference.

    Uniform preference gives the plain average (model soup, Wortsman et al. 2022).
    """
    return preference


@merge_method("task_arithmetic", source=_TASK_ARITHMETIC, scaling=0.3, form="linear", uses=preferred)
def task_arithmetic(num_tasks: int, *, multipliers: tuple[float, ...]) -> tuple[float, ...]:
    """Add the task vectors, each multiplied by its preference times the number of tasks.

    Uniform preference multiplies every vector by one, which is the plain sum of Ilharco et al.; a negative
    coefficient is their negation of a task.
    """
    return multipliers


@merge_method("weighted_sum", source=_MODEL_SOUPS, form="rule", uses=preferred, in_comparison=())
def weighted_sum(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    total: Annotated[float, Field(allow_inf_nan=False)] = 1.0,
) -> Rule:
    """Add whole models, each multiplied by its preference times `total`, which 1 makes `average`.

    The merged model is total · Σ w_t θ_t, so uniform preference gives each model the weight total / T;
    another total than 1 scales the base model with them. That is mergekit's `linear` without normalisation.
    """
    return affine_rule([total - 1, *(total * weight for weight in preference)])


@merge_method("agreement", source="hub_magmax", scaling=0.6, form="rule", uses=preferred)
def agreement(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    flattening: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.25,
) -> Rule:
    """Average with flattened weights, and lower each element by how much the tasks disagree about it.

    The weights are the preference to the power `flattening`, divided by their sum; a task without
    preference stays without weight. An element is the weighted mean s = Σ v_t τ_t times the share of what
    the tasks add that is not cancelled, |s| / Σ v_t |τ_t|, and zero where all are zero. Uniform preference
    gives uniform weights; a preference for one task alone returns its vector. Ours: what lost to it, and
    by how much, is in docs/experiments.md.
    """
    import numpy as np

    flat = [weight**flattening if weight > 0 else 0.0 for weight in preference]
    weights = np.array([weight / math.fsum(flat) for weight in flat], np.float32)
    return Rule(AGREEING_SUM, per_task=(weights,))
