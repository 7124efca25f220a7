"""Training examples that are evaluated too: counted and told before a task is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hub_magmax.errors import EvaluationError, SourceError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.evaluators import brings_data, evaluator_of
from hub_magmax.evaluation.shared_examples import row_digests
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report, number_of

if TYPE_CHECKING:
    from datasets import Dataset


def tell_shared(recipe: Recipe, trained: Sequence[Dataset], report: Report) -> None:
    """Report how many of the recipe's evaluated examples are training examples, where any are.

    Examples are compared by the columns that both have. What cannot be loaded is told, and not compared.

    Args:
        recipe: Names what is evaluated.
        trained: Examples of tasks and capability.
        report: Called with a line about each data set that shares some.
    """
    if not trained or recipe.evaluation is None or brings_data(evaluator_of(recipe.evaluation)):
        return
    evaluator, known = evaluator_of(recipe.evaluation), _Known(trained)
    for key, data in _evaluated(recipe):
        try:
            examples = examples_for(evaluator, data, recipe, {})
        except (EvaluationError, SourceError) as error:
            report(f"note: examples of {key} are not compared with those of training: {error}")
            continue
        if shared := known.num_shared(examples):
            some = f"{shared} of {number_of(len(examples), 'example')} of {key}"
            report(
                f"note: {some} are training examples too, so scores on them will be too high: "
                "take them out of one of the two"
            )


def _evaluated(recipe: Recipe) -> Iterator[tuple[str, Data]]:
    """Yield the data that scores are reported on, with its key."""
    assert recipe.evaluation is not None
    for task, data in recipe.evaluation.tasks.items():
        yield f"evaluation.tasks.{task}", data
    if recipe.compare is not None and recipe.compare.report is not None:
        yield "compare.report", recipe.compare.report


class _Known:
    """Digests of some data sets' examples, by the columns that others have too."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        self._digests: dict[tuple[int, tuple[str, ...]], frozenset[bytes]] = {}

    def num_shared(self, examples: Dataset) -> int:
        """Return how many of the examples are in one of the data sets."""
        own: dict[tuple[str, ...], list[bytes]] = {}
        shared: set[int] = set()
        for number, dataset in enumerate(self._datasets):
            if not (columns := tuple(sorted({*examples.column_names} & {*dataset.column_names}))):
                continue
            if (number, columns) not in self._digests:
                self._digests[number, columns] = frozenset(row_digests(dataset, columns))
            if columns not in own:
                own[columns] = row_digests(examples, columns)
            known = self._digests[number, columns]
            shared |= {place for place, one in enumerate(own[columns]) if one in known}
        return len(shared)
