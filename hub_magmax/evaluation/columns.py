"""Examples of a recipe, with the columns that an evaluator reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hub_magmax.errors import EvaluationError, KeyPath
from hub_magmax.evaluation.data import load_examples, pinned
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import Evaluator, needs_labels, wanted_columns
from hub_magmax.evaluation.evaluators.prompts import PROMPT_COLUMN, SHOTS_COLUMN
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset


#: In place of a label column that does not count; no data has it.
_UNREAD = "(unread)"


def examples_for(
    evaluator: Evaluator, data: Data, recipe: Recipe, datasets: Mapping[str, str], *, labelled: bool = True
) -> Dataset:
    """Return examples, with all columns that the evaluator is known to read.

    Args:
        evaluator: Takes examples.
        data: Names them.
        recipe: Names `data`.
        datasets: Commits of data sets on the Hub, as a lock has them.
        labelled: The evaluator reads labels, if it does at all.

    Raises:
        EvaluationError: If they cannot be loaded, or lack a column, with the recipe's key that names it.
        SourceError: If the Hub does not answer.
    """
    with about_data(recipe, data):
        labelled = labelled and needs_labels(evaluator)
        found = load_examples(pinned(data, datasets), recipe.folder, labelled=labelled)
    check_columns(found, evaluator, data, recipe, labelled=labelled)
    return found


def check_columns(
    examples: Dataset, evaluator: Evaluator, data: Data, recipe: Recipe, *, labelled: bool = True
) -> None:
    """Raise EvaluationError where examples, or the solved ones before them, lack a column that is read."""
    with about_data(recipe, data):
        read = data if labelled else data.model_copy(update={"label_column": _UNREAD})
        check_names([*examples.column_names, _UNREAD], evaluator, read)
        if data.shots is not None and SHOTS_COLUMN in examples.column_names:
            solved = [*json.loads(examples[0][SHOTS_COLUMN])[0], SHOTS_COLUMN]
            check_names(solved, evaluator, data, ("few_shot",))


def check_names(there: Sequence[str], evaluator: Evaluator, data: Data, where: KeyPath = ()) -> None:
    """Raise EvaluationError where a column is not there that the evaluator reads.

    Args:
        there: Columns of the examples, or of the solved ones before them.
        evaluator: Takes examples.
        data: Names them.
        where: Key of the solved ones below the data; empty for the examples themselves.
    """
    for column in wanted_columns(evaluator, data):
        if column not in there:
            raise _missing(column, there, evaluator, (data.shots if where else None) or data, where)


def _missing(
    column: str, there: Sequence[str], evaluator: Evaluator, data: Data, where: KeyPath = ()
) -> EvaluationError:
    known = [name for name in there if name not in (PROMPT_COLUMN, SHOTS_COLUMN, _UNREAD)]
    if key := _key_of(column, evaluator, data):
        hint = f"Name one of them with {key}, beside the dataset."
    elif option := _option_of(column, evaluator):
        hint = f"Name one of them with {option}, an option of the evaluator."
    else:
        hint = "No key names it: give one of them this name."
    return EvaluationError(
        f"there is no column {column!r}, which the evaluator reads",
        where=f"{data.dataset}, split {data.split}",
        expected=f"one of {', '.join(known)}",
        hint=hint,
        key=where or ((key,) if key else ()),
    )


def _key_of(column: str, evaluator: Evaluator, data: Data) -> str:
    """Return the key of the data that decides that a column is read; empty where none does."""
    for key in ("input_column", "prompt_column", "label_column"):
        other = data.model_copy(update={key: f"not {column}"})
        if column not in wanted_columns(evaluator, other):
            return key
    return ""


def _option_of(column: str, evaluator: Evaluator) -> str:
    """Return the option of an evaluator that names a column; empty where none does."""
    options = getattr(evaluator, "__dataclass_fields__", {})
    return next((name for name in options if getattr(evaluator, name, None) == column), "")
