"""Columns of an evaluation's local files, seen from their first rows, without `datasets` or a model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.columns import check_names
from hub_magmax.evaluation.data import SEPARATORS, local_file
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    brings_data,
    evaluator_of,
    needs_labels,
    wanted_columns,
)
from hub_magmax.evaluation.evaluators.prompts import PROMPT_COLUMN, SHOTS_COLUMN
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.templates import mentioned_columns
from hub_magmax.recipe.values import Data
from hub_magmax.registry import EVALUATORS
from hub_magmax.text import listed

#: Rows of a file that are read, and bytes of one that has to be read whole.
NUM_ROWS, MAX_BYTES = 1000, 16_000_000

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ColumnLook:
    """Columns of one task's examples, or why they are not known.

    Attributes:
        task: Of the evaluation; a guard's name too.
        columns: Of the file; empty where it was not read.
        unread: Why it was not, in words.
        error: What the evaluation would stop at.
    """

    task: str
    columns: tuple[str, ...] = ()
    unread: str = ""
    error: EvaluationError | None = None


def look_at_columns(recipe: Recipe) -> tuple[ColumnLook, ...]:
    """Return the columns of every task of a recipe's evaluation, as far as they are cheap to see."""
    spec = recipe.evaluation
    if spec is None or brings_data(evaluator := evaluator_of(spec)):
        return ()
    is_known = spec.evaluator.name in EVALUATORS.built_in
    return tuple(_look(recipe, task, data, evaluator, is_known) for task, data in spec.data.items())


def _look(recipe: Recipe, task: str, data: Data, evaluator: Evaluator, is_known: bool) -> ColumnLook:
    path = local_file(data, recipe.folder)
    if path is None:
        return ColumnLook(task, unread="no single file on this machine")
    if (found := first_rows(path)) is None:
        return ColumnLook(task, unread=f"{path.name} is not there, or is not read in parts")
    columns, rows = found
    try:
        with about_data(recipe, data):
            _check_names(columns, evaluator, data)
            if is_known and "[" not in data.split:  # a part of a split may leave such rows out
                _check_values(rows, columns, evaluator, data)
            solved = data.shots and local_file(data.shots, recipe.folder)
            if solved and (of_shots := first_rows(solved)):
                check_names([*of_shots[0], PROMPT_COLUMN, SHOTS_COLUMN], evaluator, data, ("few_shot",))
    except EvaluationError as error:
        return ColumnLook(task, columns, error=error)
    return ColumnLook(task, columns)


def _check_names(columns: Sequence[str], evaluator: Evaluator, data: Data) -> None:
    """Raise EvaluationError where a column is missing that a template mentions or the evaluator reads."""
    for column in mentioned_columns(data.template) if data.template is not None else ():
        if column not in columns:
            raise EvaluationError(
                f"there is no column {column!r}",
                where=f"template of {data.dataset}, split {data.split}",
                expected=f"one of {', '.join(columns)}",
                key=("template",),
            )
    check_names([*columns, PROMPT_COLUMN, SHOTS_COLUMN], evaluator, data)


def _check_values(rows: Sequence[Row], columns: Sequence[str], evaluator: Evaluator, data: Data) -> None:
    """Raise EvaluationError for the first example that cannot be scored, whatever the model."""
    read = [column for column in wanted_columns(evaluator, data) if column in columns]
    for number, row in enumerate(rows):
        where = f"{data.dataset}, split {data.split}, example {number}"
        for column in read:
            if row.get(column) in (None, ""):
                raise EvaluationError(
                    f"nothing is in the column {column!r}", where=where, hint="Leave such examples out."
                )
        if needs_labels(evaluator) and str(row.get(data.label_column)) == "-1":
            raise EvaluationError(
                "the label -1 is no class",
                where=where,
                key=("label_column",),
                hint="Choose another split: labels are often left out of a test split, as -1.",
            )


def first_rows(path: Path) -> tuple[tuple[str, ...], list[Row]] | None:
    """Return the columns of a file, and its first rows; None if it is missing or damaged, or too large.

    Args:
        path: CSV, TSV, JSON, JSON lines or parquet, of which only the columns are read.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return tuple(read_schema(path).names), []
        rows = [*islice(_rows(path), NUM_ROWS)]
    except (OSError, ValueError, csv.Error, RecursionError):
        return None
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return tuple(dict.fromkeys(str(column) for row in rows for column in row)), rows


def _rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix in SEPARATORS:
            yield from csv.DictReader(file, delimiter=SEPARATORS[path.suffix])
        elif file.read(1) == "[":
            file.seek(0)
            if path.stat().st_size <= MAX_BYTES:
                yield from json.load(file)
        else:
            file.seek(0)
            yield from map(json.loads, filter(str.strip, file))


def column_rows(found: Sequence[ColumnLook]) -> Iterator[tuple[str, str]]:
    """Yield lines of a plan about columns, each a label and a text: faults first, then the rest together."""
    label = "columns"
    for look in found:
        if look.error is not None:
            yield label, f"FAILED: {look.error}"
    by_text: dict[str, list[str]] = {}
    for look in found:
        if look.error is None:
            text = f"not looked at ({look.unread})" if look.unread else ", ".join(look.columns)
            by_text.setdefault(text, []).append(look.task)
    for text, tasks in by_text.items():
        yield label, f"of {listed(tasks, 5)}: {text}"
