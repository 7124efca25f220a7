"""Methods that add task vectors."""

from typing import TYPE_CHECKING

from hub_magmax.methods.registry import TensorRule, merge_method

if TYPE_CHECKING:
    from hub_magmax.selection import Chunks


@merge_method("average", source="arXiv:2203.05482", scaling=1.0, form="rule")
def average(chunks: "Chunks", *, preference: tuple[float, ...]) -> TensorRule:
    """Average the task vectors, each weighted by its preference.

    Uniform preference gives the plain average (model soup, Wortsman et al. 2022).
    """
    return _weighted(preference)


@merge_method("task_arithmetic", source="arXiv:2212.04089", scaling=0.3, form="rule")
def task_arithmetic(chunks: "Chunks", *, preference: tuple[float, ...]) -> TensorRule:
    """Add the task vectors, each multiplied by its preference times the number of tasks.

    Uniform preference multiplies every vector by one, which is the plain sum of Ilharco et al.
    """
    return _weighted(tuple(weight * len(preference) for weight in preference))


def _weighted(weights: tuple[float, ...]) -> TensorRule:
    import torch

    from hub_magmax import kernels

    return TensorRule(kernels.weighted_sum, per_task=(torch.tensor(weights, dtype=torch.float32),))
