"""Values of one column of data that a command names, outside of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data import READERS, load_examples
from hub_magmax.recipe.model_names import is_there, near_sibling
from hub_magmax.recipe.values import Data
from hub_magmax.text import shown


def column_values(place: str, column: str | None, split: str, what: str) -> Sequence[Any]:
    """Return the values of a column of data, outside of recipes.

    Args:
        place: A file (CSV, TSV, JSON lines, parquet), a folder, or a data set on the Hub.
        column: Its name; None where the data has a single one.
        split: Of the data; of a single file, which is one split, `test` and `train` are all of it.
        what: Names the data in messages, such as "inputs".

    Raises:
        EvaluationError: If it cannot be read, or has no such column.
    """
    refuse_missing(place, what)
    try:
        spec = Data(dataset=place, split=split)
    except ValueError as error:  # of pydantic
        raise EvaluationError("this is no name of data", where=f"{what} {shown(place)}") from error
    with taken_for_repository(place, Path()):
        examples = load_examples(spec, Path(), labelled=False)
    if column is None and len(examples.column_names) == 1:
        (column,) = examples.column_names
    if column not in examples.column_names:
        raise EvaluationError(
            "the data has several columns" if column is None else f"there is no column {column!r}",
            where=place,
            expected=f"one of {', '.join(examples.column_names)}",
            hint="Name it with --column.",
        )
    found: Sequence[Any] = examples[column]
    return found


def refuse_missing(place: str, what: str) -> None:
    """Refuse a name of data that can only be a file's or a folder's, and is not there.

    Raises:
        EvaluationError: Names the data as `what`.
    """
    is_path = place.startswith((".", "/", "~")) or Path(place).suffix in READERS
    if not place or (is_path and not is_there(Path(place).expanduser())):
        raise EvaluationError(
            "there is no such file or folder",
            where=f"{what} {place!r}",
            expected="a file or folder of data, or the name of a data set on the Hub",
            hint=near_sibling(place, Path(place).expanduser(), files=True)
            or "Relative paths start in the current folder.",
        )
