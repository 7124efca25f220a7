"""Examples of each step of a task's training, and those that are held out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.evaluators import Columns, Evaluator, columns_of
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.shared_examples import row_digests
from hub_magmax.processes import Processes
from hub_magmax.recipe.training import Training
from hub_magmax.training.order import ExampleOrder, Mixture, seed_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Examples:
    """Examples of one kind, in the order in which they are seen.

    Attributes:
        rows, columns: All examples, and their columns.
        order: Which of them come when.
    """

    rows: Dataset
    columns: Columns
    order: ExampleOrder


@dataclass(frozen=True)
class HeldOutExamples:
    """Examples of a task that no step sees, and their columns."""

    rows: Dataset
    columns: Columns


@dataclass(frozen=True)
class StepExamples:
    """Examples of each step of a task, as its model reads them.

    Attributes:
        evaluator: Encodes them, and gives each a loss.
        parts: Examples of the task, and of a capability if there are some.
        mixture: How many of each a step has.
        seed: Of dropout.
        held_out: Examples that no step has, by whose loss the training stops; None without.
    """

    evaluator: Evaluator
    parts: tuple[Examples, ...]
    mixture: Mixture
    seed: int
    held_out: HeldOutExamples | None = None

    def encoded(self, model: LoadedModel, step: int, processes: Processes) -> tuple[list[Any], float]:
        """Return this process's share of a step in batches, and by what its summed loss is multiplied.

        accelerate takes the mean of the processes' gradients, which is then that of all examples of the step.
        """
        ends = zip(self.mixture.until(step), self.mixture.until(step + 1), strict=True)
        numbers = [
            (part, number)
            for part, (start, end) in zip(self.parts, ends, strict=False)
            for number in part.order.between(start, end)
        ]
        own = numbers[processes.rank :: processes.count]
        batches: list[Any] = []
        for part in self.parts:
            if chosen := [number for other, number in own if other is part]:
                rows = part.rows.select(chosen)
                batches += self.evaluator.encode(model, rows, part.columns, len(chosen))
        return batches, processes.count / len(numbers)


def step_examples_of(
    spec: Training, task: str, rows: Sequence[Dataset], evaluator: Evaluator, seed: int
) -> StepExamples:
    """Return the examples of each step of a task.

    Args:
        spec: Says how many of which kind, and what is held out.
        task: Its name.
        rows: All examples of the task, and those of the capability if there is one.
        evaluator: Encodes them.
        seed: Of all tasks' orders.

    Raises:
        RecipeError: If no example is left when some are held out.
    """
    kept, seed = spec.capability, seed_of(seed, f"task {task}")
    own, held_out = _held_apart(spec, task, rows[0])
    columns = [columns_of(data) for data in (spec.data[task], *([kept.data] if kept else []))]
    parts = tuple(
        Examples(found, read, ExampleOrder(len(found), seed_of(seed, f"part {number}")))
        for number, (found, read) in enumerate(zip([own, *rows[1:]], columns, strict=True))
    )
    mixture = Mixture(spec.batch_size, kept.share if kept else 0.0)
    return StepExamples(evaluator, parts, mixture, seed, held_out)


def held_apart(rows: Dataset, share: float) -> tuple[list[int], list[int]]:
    """Split examples by their content alone: into those to train on, and those held out, both in order.

    The examples with the smallest digests are held out, so that every round and every seed holds out the
    same ones. Copies of an example are on one side.

    Args:
        rows: All examples.
        share: Of the different ones, rounded down, that are held out; at least one is.
    """
    digests = row_digests(rows, rows.column_names)
    different = sorted(set(digests))
    held = frozenset(different[: max(1, math.floor(share * len(different)))])
    sides: tuple[list[int], list[int]] = ([], [])
    for number, digest in enumerate(digests):
        sides[digest in held].append(number)
    return sides


def _held_apart(spec: Training, task: str, rows: Dataset) -> tuple[Dataset, HeldOutExamples | None]:
    """Return the examples of a task that it is trained on, and those that are held out."""
    if spec.held_out is None:
        return rows, None
    own, held = held_apart(rows, spec.held_out.share)
    if not own:
        raise RecipeError(
            f"the examples of {task} are all the same, so that none is left when some are held out",
            key=("training", "held_out"),
            expected="two different examples or more for every task",
            hint=f"Leave held_out out, or name more examples in training.data.{task}.",
        )
    return rows.select(own), HeldOutExamples(rows.select(held), columns_of(spec.data[task]))
