"""Samples whose tails are compared: a column of data, or what a merge lost on each example of a task."""

from __future__ import annotations

import csv
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.column_values import column_values
from hub_magmax.evaluation.data import SEPARATORS
from hub_magmax.evaluation.scores import MERGED, SCORES_NAME, read_scores
from hub_magmax.evaluation.tails import losses_of
from hub_magmax.text import listed


@dataclass(frozen=True)
class TailSample:
    """Scores of which more is worse.

    Attributes:
        name: Of the sample, as it was asked for.
        values: One per example.
        bounds: Ends of the scale, where they are known.
        examples: Fingerprint of the examples, where it is known.
    """

    name: str
    values: Float64[np.ndarray, " examples"]
    bounds: tuple[float, float] | None = None
    examples: str = ""

    @property
    def negative(self) -> TailSample:
        """The sample whose upper tail is this one's lower tail."""
        return replace(self, values=-self.values)


def read_sample(place: str, column: str | None = None) -> TailSample:
    """Return a sample of scores.

    Args:
        place: A folder that a merge and its evaluation wrote: what the merged model lost on each example,
            against the task's own checkpoint. Else data, as `column_values` takes it.
        column: Of a merge the task, else the column; None where there is one only.

    Raises:
        EvaluationError: If there is no such data, column or task, or it holds no numbers.
    """
    folder = Path(place).expanduser()
    if (folder / SCORES_NAME).is_file():
        return _losses(place, folder, column)
    if folder.suffix in SEPARATORS and folder.is_file():
        _check_lines(folder, place)
    values = column_values(place, column, "test", "scores")
    try:
        if any(isinstance(value, str) for value in values):
            raise TypeError
        found = np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            "the column holds no numbers", where=place, expected="one an example"
        ) from error
    return TailSample(place, found)


def _check_lines(path: Path, place: str) -> None:
    """Raise EvaluationError for a blank line, which readers pass over, and for a file without a head."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=SEPARATORS[path.suffix])
            head = next(rows, [])
            blank = next((rows.line_num for row in rows if not row), None)
    except (OSError, UnicodeDecodeError, csv.Error):
        return  # the reader of the data says what is wrong
    if blank is not None:
        raise EvaluationError(
            f"line {blank} is blank, and the lines after it would stand for other examples",
            where=place,
            expected="a line for each example",
            hint="Take the example out of both samples, or the line out of the file.",
        )
    with suppress(ValueError):
        numbers = [float(name) for name in head]
        raise EvaluationError(
            f"the first line, {listed([f'{number:g}' for number in numbers], 60)}, names no column",
            where=place,
            expected="names of the columns in the first line",
            hint="Put one there, such as `loss`.",
        )


def _losses(place: str, folder: Path, task: str | None) -> TailSample:
    """Return what a merged model lost on each example of a task."""
    scores = read_scores(folder)
    found = {name: (scores.get(name, name), scores.get(MERGED, name)) for name in scores.data}
    pairs = {name: (own, merged) for name, (own, merged) in found.items() if own and merged}
    if not pairs:
        raise EvaluationError(
            "there are no scores of a task's own checkpoint and of the merge",
            where=place,
            hint="Run `hub-magmax evaluate` on the recipe.",
        )
    if task is None and len(pairs) == 1:
        (task,) = pairs
    if task not in pairs:
        raise EvaluationError(
            "the merge has several tasks" if task is None else f"there are no scores of {task!r}",
            where=place,
            expected=f"one of {', '.join(pairs)}",
            hint="Name it with --column.",
        )
    values, bounds = losses_of(*pairs[task])
    return TailSample(place, values, bounds, str(scores.data[task].get("fingerprint", "")))


def check_pairs(first: TailSample, second: TailSample) -> None:
    """Raise EvaluationError for merges that were scored on different examples."""
    if first.examples and second.examples and first.examples != second.examples:
        raise EvaluationError(
            "the merges were scored on different examples, so there are no pairs",
            where=f"{first.name} and {second.name}",
            hint="Evaluate both on the same data, or leave out --paired.",
        )
