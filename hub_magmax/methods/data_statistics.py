"""Statistics of the data of tasks, tensor by tensor, as methods read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float32, Float64

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.lazy_imports import Tensor, np, torch

#: `gram`: mean of x xᵀ over the inputs x of a linear layer. `merged_gram`: the same behind merged blocks.
#: `fisher`: mean square of the gradient of the log-likelihood, for every element of a tensor.
#: `representation`: sums of products of the inputs of the head, in the merged model and in the task's own.
StatisticsKind = Literal["gram", "merged_gram", "fisher", "representation"]

#: Elements of a matrix that are read at a time.
_READ_ELEMENTS = 2**19

#: Those that methods take.
KINDS: tuple[StatisticsKind, ...] = ("gram", "merged_gram", "fisher")


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor on the data of one task.

    Attributes:
        read: Takes the first element and the one after the last; returns these, flat and finite, those of
            `fisher` not negative.
        num_elements: Of all; for `gram` the square of the number of inputs.
        scale: Of `fisher`, what values are divided by: their root mean square over the whole model.
        is_transposed: Of `gram`, whether the inputs are the rows of the tensor, as in GPT-2's `Conv1D`.
    """

    read: Callable[[int, int], Float32[np.ndarray, " some"]]
    num_elements: int
    scale: float = 1.0
    is_transposed: bool = False

    def matrix(self, size: int) -> Float64[Tensor, "size size"]:
        """Return all of them as a matrix, read some rows at a time."""
        found = torch.empty((size, size), dtype=torch.float64)
        num_rows = max(1, _READ_ELEMENTS // size)
        for start in range(0, size, num_rows):
            rows = found[start : start + num_rows]
            rows.copy_(torch.from_numpy(self.read(start * size, (start + len(rows)) * size)).view_as(rows))
        return found


#: Made of the merge itself, under one preference.
OF_THE_MERGE: StatisticsKind = "merged_gram"

#: Made of the whole merge, once its method is known, for a correction of its head.
REPRESENTATION: StatisticsKind = "representation"

#: What is known of one tensor, by task; None of a task that says nothing of it.
StatisticsByTask = Sequence[TensorStatistics | None]


def of_all(found: StatisticsByTask, tasks: Sequence[int], where: str) -> list[TensorStatistics]:
    """Return the statistics of some tasks, or an empty list where none of these has any.

    Raises:
        RecipeError: If only some have.
    """
    known = [found[task] for task in tasks]
    if not any(known):
        return []
    present = [one for one in known if one is not None]
    if len(present) < len(known):
        missing = [task + 1 for task in tasks if found[task] is None]
        raise RecipeError(
            f"tasks {', '.join(map(str, missing))} have no statistics of this tensor, and others have",
            where=where,
            expected="statistics of every task, or of none",
        )
    return present


def without_statistics(label: str, kind: StatisticsKind) -> RecipeError:
    """Return the error of a method that gets no statistics at all."""
    return RecipeError(
        f"the method needs {kind} statistics of each task's data, which this merge does not have",
        where=label,
        expected="a recipe with `statistics` for each task",
        hint="Merge from files: docs/data.md says how the statistics are made.",
    )
