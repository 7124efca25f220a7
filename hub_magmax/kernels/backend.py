"""The seam between the arithmetic of a merge and its implementations.

`Reference` (torch and numpy, operation by operation) is the oracle: all backends return its bytes. `Compiled`
has loops for the built-in operations and leaves all others to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Float32, Int64, UInt8

    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.kernels.ops import Inputs, Op
    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.kernels.row_ranks import RankTable
    from hub_magmax.kernels.stored import Stored
    from hub_magmax.kernels.structures import (
        BlockSums,
        Codes,
        Contest,
        Draw,
        Edges,
        Histograms,
        MostKeys,
        Names,
        Owners,
        PerTask,
        PerTaskRows,
        Places,
        RowSums,
        Spreads,
        SquareSums,
        Tasks,
        Vectors,
    )
    from hub_magmax.kernels.winners import RuleOf, Sight


#: Kinds of devices that a recipe may name, and the module whose `backend_on` takes such a name, with a number
#: or without (`cuda:1`, `cuda`), and returns the backend there; add a line here for a new kind.
DEVICES: Mapping[str, str] = {
    "cpu": "hub_magmax.kernels.device",
    "cuda": "hub_magmax.kernels.device",
    "mps": "hub_magmax.kernels.device",
}


class Merged(NamedTuple):
    """One merged chunk.

    Attributes:
        values: In the dtype of the output.
        counts: Elements per task, int64; empty unless the operation selects tasks.
        probe: Finite only if all task vectors and all merged values are.
    """

    values: Stored
    counts: Int64[np.ndarray, " tasks"]
    probe: float


@runtime_checkable
class Backend(Protocol):
    """Arithmetic on chunks; every backend returns the bytes of `Reference`, but for whole matrices.

    Attributes:
        reads_files: Chunks may be handed over unread, with the files that they lie in.
    """

    reads_files: bool

    def merge(self, op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float) -> Merged:
        """Merge one chunk: base model + `scaling` times what `op` makes of the task vectors.

        Args:
            op: A built-in operation, or a plug-in's.
            chunk: Stored values of the base model and of every task.
            inputs: Numbers that `op` takes, per element of the chunk and per task.
            dtype: Of the output, as safetensors calls it.
            scaling: Scaling coefficient.

        Raises:
            CheckpointError, SourceError: If the chunk cannot be read.
        """
        ...

    def task_vectors(self, chunk: RawChunk, room: Callable[[], np.ndarray]) -> Vectors:
        """Return the task vectors of a chunk.

        Args:
            chunk: Stored values of the base model and of every task.
            room: Returns float32 memory of that shape, for backends that write into memory used before.

        Raises:
            NonFiniteError: If they are not finite.
        """
        ...

    def products(self, chunk: RawChunk, *, with_base: bool = True) -> BlockSums:
        """Return the inner products of the base model's values and the task vectors, block by block.

        Pairs are those of the base model with itself and every task, then those of the first task with itself
        and every later one, and so on; `kernels.products` has the order of sums.

        Args:
            chunk: From the first element of a block on, and to the last one of a block or of the tensor.
            with_base: Otherwise those of the task vectors alone, which takes less time.

        Raises:
            NonFiniteError: If values or task vectors are not finite.
        """
        ...

    def of_matrices(
        self,
        function: Callable[[Float32[torch.Tensor, "tasks rows columns"]], Any],
        task_vectors: Float32[torch.Tensor, "tasks rows columns"],
    ) -> Any:
        """Return what a function makes of the task vectors of a matrix; a tensor comes back to the CPU.

        Not the reference's bytes: decompositions differ between devices and libraries in their last bits.

        Raises:
            RecipeError: If the device's memory does not hold what the function needs.
        """
        ...

    def mix(
        self, start: int, count: int, generator: CounterGenerator, edges: Edges, tasks: PerTask
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element: the one of the part between two edges in which its key lies.

        Args:
            start: Index of the first element in its tensor.
            count: Elements to draw for.
            generator: The tensor's; stream 0 is used.
            edges: The least key, without a sign, of every part but the first, ascending.
            tasks: The task of each part: at least one more than there are edges.
        """
        ...

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: MostKeys
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept: eight tasks in a row, the first one lowest.

        Args:
            start: Index of the first element in its tensor.
            count: Elements to draw for.
            generator: The tensor's.
            streams: One for each pair of tasks.
            most: Two numbers for each stream. An element is kept for the first task of the pair if the lower
                half of its key is at most the first one, and for the second task if the upper half is at most
                the other one.
        """
        ...

    def scores(self, chunk: RawChunk, numbers: PerTaskRows) -> Vectors:
        """Return how much each task claims each element, not negative; see `kernels.competition.scores`.

        Args:
            chunk: Of task vectors.
            numbers: Least and most magnitude of each task, and what it is multiplied by in the sum.

        Raises:
            NonFiniteError: At a NaN or infinity.
        """
        ...

    def spreads(self, chunk: RawChunk, active: Tasks, out: Spreads) -> None:
        """Write the standard deviation of the elements of some tasks around their mean.

        Args:
            chunk: Of task vectors.
            active: Numbers of the tasks, at least one.
            out: Takes a number for each element.

        Raises:
            NonFiniteError: At a NaN or infinity in one of these tasks.
        """
        ...

    def square_sums(self, chunk: RawChunk, spread: Spreads, least: np.float32, out: SquareSums) -> None:
        """Write the sums of the squares of all elements whose spread is at least `least`.

        `kernels.spreads` has the order of sums.

        Args:
            chunk: From the first element of a block on.
            spread: Of its elements.
            least: 0 for all of them.
            out: Takes a number for each task and block.
        """
        ...

    def factors_by_rank(
        self,
        start: int,
        chunk: RawChunk,
        generator: CounterGenerator,
        streams: Sequence[int],
        table: RankTable,
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return what each element of a chunk of whole rows is multiplied by: 0 where it is not kept.

        Args:
            start: Index of the first element in its tensor.
            chunk: Its rows are as long as `table` says.
            generator: The tensor's.
            streams: One for each pair of tasks; the first task's draw is the lower half of a key.
            table: Says by an element's rank which draws keep it, and its factor.

        Raises:
            NonFiniteError: At a NaN or infinity.
        """
        ...

    def magnitude_sums(self, chunk: RawChunk, factors: Vectors, length: int) -> RowSums:
        """Return by task the sums of the magnitudes of each row, and of those that are kept.

        `kernels.row_ranks` has the order of sums.

        Args:
            chunk: Whole rows.
            factors: 0 for an element that is not kept, else 1.
            length: Of a row.
        """
        ...

    def rank(self, chunk: RawChunk, wanted: PerTask, owner: Owners, codes: Codes) -> None:
        """Write the winner of each element of a chunk, and a code of the tasks that own it after that.

        Bit t of a code says that task t is the largest in magnitude among tasks 0 to t, later tasks first
        among equals; so the highest bit is the winner, and the next lower bit the owner after that. Bit 0
        would always be set. It says instead that task 0 wins, and then one other bit stands for the largest
        among tasks 1 and above.

        Where several tasks are largest, the owner is `TIED` plus the last of them, and the code has a bit for
        each of them. Where all are zero, the owner is `ZERO`.

        Args:
            chunk: Of at least two tasks.
            wanted: 1 for tasks that take part; all others count as zero.
            owner: Takes winners.
            codes: Takes codes; unsigned, a bit for every task.

        Raises:
            NonFiniteError: At a NaN or infinity in a task that takes part.
        """
        ...

    def count(self, owner: Owners, value: int) -> int:
        """Return the number of elements that an owner holds."""
        ...

    def draw(self, owner: Owners, codes: Codes, draw: Draw, room: int) -> Places:
        """Give elements of small keys to their heirs, and return the places of those up to `high`, in order.

        Args:
            owner: Changed.
            codes: As `rank` writes them.
            draw: States the owner, its heirs and the keys.
            room: Expected number of places.
        """
        ...

    def histogram(self, chunk: RawChunk, histograms: Histograms, rule: Any = None) -> bool:
        """Add a chunk's magnitudes to histograms, and say whether it was merged meanwhile.

        Args:
            chunk: Merged in one pass if it has `one_pass`.
            histograms: Changed.
            rule: A method's, right for all elements that the bounds of `histograms` do not leave open.

        Raises:
            NonFiniteError: At a NaN or infinity.
        """
        ...

    def part(self, owner: Owners, codes: Codes, value: int, bits: int, name: int) -> int:
        """Give an owner's elements whose codes have none of `bits` to `name`, and return their number."""
        ...

    def rename(self, owner: Owners, names: Names) -> None:
        """Turn every owner into its entry of `names`."""
        ...

    def look(
        self,
        part: Iterable[tuple[int, RawChunk]],
        contest: Contest,
        owner: Owners,
        rule_of: RuleOf | None = None,
    ) -> Sight:
        """Write the winner of each element that has the same one at all prices in a box; collect the others.

        Args:
            part: Chunks and the indices of their first elements; merged in one pass if they have `one_pass`.
            contest: Prices, and classes of elements that get a mark instead of being collected.
            owner: Takes winners, marks, and `NOBODY` for elements that are collected.
            rule_of: Turns the winners of a chunk into the rule that takes each element from its winner.

        Raises:
            NonFiniteError: At a NaN or infinity in a task that takes part.
        """
        ...
