"""Methods that add task vectors."""

from typing import TYPE_CHECKING

from hub_magmax.methods.registry import merge_method

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@merge_method("average", source="arXiv:2203.05482", scaling=1.0, form="elementwise")
def average(
    task_vectors: 'Float[Tensor, "tasks *shape"]', *, preference: tuple[float, ...]
) -> 'Float[Tensor, "*shape"]':
    """Average the task vectors, each weighted by its preference.

    Uniform preference gives the plain average (model soup, Wortsman et al. 2022).
    """
    from hub_magmax import kernels

    return kernels.weighted_sum(task_vectors, preference)


@merge_method("task_arithmetic", source="arXiv:2212.04089", scaling=0.3, form="elementwise")
def task_arithmetic(
    task_vectors: 'Float[Tensor, "tasks *shape"]', *, preference: tuple[float, ...]
) -> 'Float[Tensor, "*shape"]':
    """Add the task vectors, each multiplied by its preference times the number of tasks.

    Uniform preference multiplies every vector by one, which is the plain sum of Ilharco et al.
    """
    from hub_magmax import kernels

    return kernels.weighted_sum(task_vectors, tuple(weight * len(preference) for weight in preference))
