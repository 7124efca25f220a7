"""Averages in which an element counts as much as it matters to a task's data, by its Fisher information."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import AFFINE_SUM_OF_EACH
from hub_magmax.methods.data_statistics import TensorStatistics
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule

if TYPE_CHECKING:
    from hub_magmax.kernels.lazy_imports import Array
    from hub_magmax.methods.chunks import Chunks

_FISHER = Paper(
    "2111.09832", "fisher", "Matena, Michael", 2022, "Merging Models with {Fisher}-Weighted Averaging"
)

#: Elements whose shares are computed at a time.
_PIECE = 1 << 16


@merge_method("fisher", source=_FISHER, form="rule", uses=preferred, in_comparison=())
def fisher(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    fisher: Sequence[TensorStatistics],
    floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6,
) -> Rule:
    """Average each element by how much it matters to each task: by its diagonal Fisher information.

    That is Σ w_t F_t τ_t / Σ w_t F_t with the preference as w_t. F_t is divided by its root mean square over
    the model of task t, and is at least `floor`, so that what matters to nobody is averaged by preference.
    Uniform preference is Fisher merging (Matena & Raffel 2022), whose code divides by the norm too, and
    applies its floor to one model only. All preference on one task returns its vector.
    """
    weighed = [(task, weight) for task, weight in enumerate(preference) if weight]

    def shares(start: int, count: int) -> tuple["Array", ...]:
        found = np.zeros((count, 1 + len(preference)), np.float32)  # the base model's is zero
        for first in range(0, count, _PIECE):
            size = min(_PIECE, count - first)
            matters = np.empty((len(weighed), size))
            for row, (_, weight), own in zip(matters, weighed, fisher, strict=True):
                begin = start + first
                np.multiply(np.maximum(own.read(begin, begin + size) / own.scale, floor), weight, out=row)
            matters /= matters.sum(axis=0)
            for (task, _), row in zip(weighed, matters, strict=True):
                found[first : first + size, 1 + task] = row
        return (found,)

    return Rule(AFFINE_SUM_OF_EACH, per_element=shares)
