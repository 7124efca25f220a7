"""Methods that drop elements of a task vector at random, by their rank in a row (DELLA)."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import SCALED, SCALED_TIES, SCALED_TIES_SUM, Op
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rescaling import ratios, restored
from hub_magmax.methods.rules import Rule
from hub_magmax.methods.sparse import Densities, NewConsensus
from hub_magmax.options import PerTask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float64

    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.methods.chunks import Chunks

_DELLA = Paper(
    "2406.11617",
    "della",
    "Deep, Pala Tej",
    2024,
    "{DELLA}-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
)

#: How far the probabilities of a row reach to both sides of the density, for each task.
Epsilons = Annotated[tuple[float, ...], PerTask(Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)])]
#: What kept elements are divided by: their own probability, the share of the tensor's norm that is left, or
#: 1.
Rescale = Literal["probability", "norm", "none"]


@merge_method("della", source=_DELLA, scaling=1.0, form="rule", uses=preferred)
def della(
    chunks: "Chunks",
    *,
    multipliers: tuple[float, ...],
    generator: "CounterGenerator",
    shape: tuple[int, ...],
    density: Densities = (0.9,),
    epsilon: Epsilons = (0.07,),
    rescale: Rescale = "probability",
    consensus: NewConsensus = "mean",
) -> Rule:
    """Drop small elements of each row more often than large ones, rescale, and average as `ties` does.

    In each row of each task vector an element is kept with a probability that grows with the rank of its
    magnitude, from density - epsilon for the smallest to density + epsilon for the largest, and is divided by
    it. The preference weights both the election of the sign and the average; uniform preference gives DELLA
    as published (Deep et al. 2024). With the consensus `sum` the task vectors are multiplied as by
    `task_arithmetic`, and what has the elected sign then is added. With the rescaling `norm`, which is
    mergekit's, all that a task keeps is multiplied by one number, so that the sum of the tensor's magnitudes
    stays what it was.
    """
    rows = _Rows(chunks, shape, density, epsilon, rescale, generator)
    weights = rows.multiplied(multipliers)
    if consensus == "sum":
        return rows.rule(SCALED_TIES_SUM, weights)
    return rows.rule(SCALED_TIES, np.array(multipliers, np.float32), weights)


@merge_method("della_linear", source=_DELLA, scaling=0.3, form="rule", uses=preferred, in_comparison=())
def della_linear(
    chunks: "Chunks",
    *,
    multipliers: tuple[float, ...],
    generator: "CounterGenerator",
    shape: tuple[int, ...],
    density: Densities = (0.9,),
    epsilon: Epsilons = (0.07,),
    rescale: Rescale = "probability",
) -> Rule:
    """Drop small elements of each row more often than large ones, rescale, and add as `task_arithmetic` does.

    Elements are kept as by `della`. On average over seeds this is `task_arithmetic` with the same preference,
    which a density of 1 gives bit for bit. Uniform preference multiplies every vector by one.
    """
    rows = _Rows(chunks, shape, density, epsilon, rescale, generator)
    return rows.rule(SCALED, rows.multiplied(multipliers))


class _Rows:
    """The rows of one tensor, and the draws by which elements of each are kept."""

    def __init__(
        self,
        chunks: "Chunks",
        shape: tuple[int, ...],
        density: tuple[float, ...],
        epsilon: tuple[float, ...],
        rescale: str,
        generator: "CounterGenerator",
    ) -> None:
        from hub_magmax.kernels.row_ranks import RankTable
        from hub_magmax.methods import draws

        self._chunks, self._generator, self._rescale = chunks, generator, rescale
        # A vector is one row; of a tensor of more dimensions each output has one.
        self._length = math.prod(shape[1:] if len(shape) > 1 else shape)
        table = draws.rank_table(self._length, density, epsilon, is_rescaled=rescale == "probability")
        self._table, self._streams = RankTable(*table), draws.streams_of(chunks.num_tasks)

    def rule(self, op: "Op", *per_task: "np.ndarray") -> Rule:
        """Return the rule of an operation on what is kept."""
        return Rule(op, per_task=per_task, per_chunk=self._of_chunk, multiple_of=self._length)

    def multiplied(self, numbers: tuple[float, ...]) -> "np.ndarray":
        """Return numbers by task, times what the norm of each task's vector is multiplied by."""
        factors = self._norm_factors() if self._rescale == "norm" else np.ones(len(numbers))
        return restored(numbers, factors)

    def _of_chunk(self, start: int, chunk: "RawChunk") -> "tuple[np.ndarray]":
        backend, generator = self._chunks.backend, self._generator
        return (backend.factors_by_rank(start, chunk, generator, self._streams, self._table).T,)

    def _norm_factors(self) -> "Float64[np.ndarray, ' tasks']":
        """Return by task the sum of all magnitudes over that of the kept ones; 1 where nothing is kept."""
        (sums,) = self._chunks.map(self._row_sums, multiple_of=self._length)
        return ratios(*sums)

    def _row_sums(self, part: "Iterator[tuple[int, RawChunk]]") -> "Float64[np.ndarray, '2 tasks rows']":
        """Return the sums of the magnitudes of each row, and of those that are kept, in a fixed order."""
        # In memory of their own: small arrays that are kept among large ones that are not scatter memory.
        found = np.zeros((2, self._chunks.num_tasks, self._chunks.num_elements // self._length))
        for start, chunk in part:
            (factors,) = self._of_chunk(start, chunk)
            sums = self._chunks.backend.magnitude_sums(chunk, factors.T, self._length)
            place = start // self._length
            found[..., place : place + sums.shape[2]] = sums
        return found
