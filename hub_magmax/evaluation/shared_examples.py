"""Examples that are the same in two data sets, by their content, and a note of those that are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hub_magmax.errors import EvaluationError, SourceError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import content_parts
from hub_magmax.evaluation.evaluators import Evaluator, brings_data, evaluator_of, wanted_columns
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report, number_of

if TYPE_CHECKING:
    from datasets import Dataset


def row_digests(examples: Dataset, columns: Sequence[str]) -> list[bytes]:
    """Return a digest of each example's columns: the same for the same content, wherever it is stored."""
    found = []
    for row in examples.select_columns(list(columns)):
        parts = [part for column in columns for part in content_parts(row[column])]
        content = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        found.append(hashlib.sha256(content).digest())
    return found


def read_digests(evaluator: Evaluator, data: Data, examples: Dataset) -> list[bytes]:
    """Return a digest of what an evaluator reads of each example, whatever the columns are called.

    Solved examples before it play no part. All columns count where the evaluator does not say what it reads;
    there are no digests where a column is missing that it reads.
    """
    alone = data.model_copy(update={"few_shot": None})
    columns = wanted_columns(evaluator, alone) or sorted(examples.column_names)
    return row_digests(examples, columns) if {*columns} <= {*examples.column_names} else []


def num_shared(examples: Iterable[bytes], others: Iterable[bytes]) -> int:
    """Return how many of some examples are among others, by their digests."""
    known = frozenset(others)
    return sum(one in known for one in examples)


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
