"""Correction of a merged model's representation, folded into the head of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hub_magmax.checkpoints.data_statistics import open_statistics
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.merging.output.tensor import TensorWriter
from hub_magmax.methods.corrections import correction, times
from hub_magmax.methods.data_statistics import REPRESENTATION
from hub_magmax.planning.plan import TensorJob
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor


def correction_of(recipe: Recipe, lock: Lock) -> Float64[Tensor, "size size"]:
    """Return the matrix that a locked correction multiplies the head by.

    Raises:
        CheckpointError, LockError: If its statistics are not sound, or not what was locked.
        RecipeError: If they do not decide it.
    """
    with open_statistics(recipe, lock, REPRESENTATION) as statistics:
        assert statistics is not None
        products = [statistics.products(task) for task in lock.tasks]
        return correction(products, lock.weights, lock.correction["ridge"])


class CorrectedWriter(TensorWriter):
    """Holds the merged values of a head, and writes their product with a matrix when all are there."""

    def __init__(self, job: TensorJob, *place: Any) -> None:
        super().__init__(*place)
        self._job, self._held = job, np.empty(job.num_elements, bits_dtype(job.dtype))
        self._stops: dict[int, int] = {}

    def write(self, start: int, values: Stored) -> None:
        stop = self._stops[start] = start + values.bits.size
        self._held[start:stop] = values.bits.reshape(-1)

    def read_again(self, start: int) -> bytearray:
        return bytearray(self._held[start : self._stops[start]].data)

    def finish(self, matrix: Float64[Tensor, "size size"]) -> None:
        """Write the product.

        Raises:
            NonFiniteError: If the output's dtype does not hold it.
        """
        merged, start = Stored(self._held, self._job.dtype).tensor.view(self._job.shape), 0
        for rows in map(Stored.of, times(merged, matrix)):
            if not rows.is_finite():
                raise NonFiniteError(
                    "the merged weight times its correction is not finite",
                    where=f"tensor {self._job.name!r}",
                    expected=f"numbers that {self._job.dtype} can hold",
                    hint="Choose a wider output.dtype, raise correction.ridge, or leave correction out.",
                )
            super().write(start, rows)
            start += rows.bits.size
