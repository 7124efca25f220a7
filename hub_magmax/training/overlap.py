"""Training examples that are evaluated too: counted and told before a task is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hub_magmax.errors import EvaluationError, SourceError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.evaluators import brings_data, evaluator_of
from hub_magmax.evaluation.shared_examples import num_shared, read_digests
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report, number_of

if TYPE_CHECKING:
    from datasets import Dataset


def tell_shared(recipe: Recipe, trained: Sequence[tuple[Data, Dataset]], report: Report) -> None:
    """Report how many of the recipe's evaluated examples are training examples, where any are.

    Examples are compared by what the evaluator reads of them, in each data set by its own columns. What
    cannot be loaded is told, and not compared.

    Args:
        recipe: Names what is evaluated.
        trained: Examples of tasks and capability, with the keys that name them.
        report: Called with a line about each data set that shares some.
    """
    if not trained or recipe.evaluation is None or brings_data(evaluator_of(recipe.evaluation)):
        return
    evaluator = evaluator_of(recipe.evaluation)
    known = frozenset(one for data, rows in trained for one in read_digests(evaluator, data, rows))
    for key, data in _evaluated(recipe):
        try:
            examples = examples_for(evaluator, data, recipe, {})
        except (EvaluationError, SourceError) as error:
            report(f"note: examples of {key} are not compared with those of training: {error}")
            continue
        if shared := num_shared(read_digests(evaluator, data, examples), known):
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
