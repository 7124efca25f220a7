"""Examples for evaluators: columns in batches, and labels as class numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError

if TYPE_CHECKING:
    from datasets import Dataset


def batches_of(examples: Dataset, columns: Sequence[str], batch_size: int) -> Iterator[tuple[list[Any], ...]]:
    """Yield the columns, `batch_size` examples at a time.

    Raises:
        EvaluationError: If a column is missing.
    """
    if missing := [column for column in columns if column not in examples.column_names]:
        raise EvaluationError(
            f"there is no column {missing[0]!r}",
            where="examples",
            expected=f"one of {', '.join(examples.column_names)}",
        )
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        yield tuple(list(batch[column]) for column in columns)


def rows_of(examples: Dataset, columns: Sequence[str], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield examples as mappings by column, `batch_size` at a time.

    Raises:
        EvaluationError: If a column is missing.
    """
    for batch in batches_of(examples, columns, batch_size):
        yield [dict(zip(columns, values, strict=True)) for values in zip(*batch, strict=True)]


def label_names(examples: Dataset, column: str) -> list[str] | None:
    """Return the names of integer labels where the data set knows them, else None."""
    names = getattr(examples.features[column], "names", None) if column in examples.features else None
    return list(names) if names else None


def label_text(label: Any, names: list[str] | None) -> str:
    """Return a label as people would write it: by name where the data set has names.

    Raises:
        EvaluationError: If it is the number of none of these.
    """
    if names is None or not isinstance(label, int):
        return str(label)
    if not 0 <= label < len(names):
        raise EvaluationError(
            f"the label {label} is none of the data set's classes",
            where="label column",
            expected=f"a number from 0 to {len(names) - 1}",
            hint="Choose another split: labels are often left out of a test split, as -1."
            if label == -1
            else "Check the data.",
        )
    return names[label]


def class_lookup(
    classes: Mapping[str, int], names: list[str] | None, *, named: bool = True
) -> Callable[[Any], int]:
    """Return a function from a label of the data to the number of a class.

    Args:
        classes: Numbers by name.
        names: Of the data's integer labels, or None.
        named: Whether the classes' own names mean anything; where they do not, or where the data has
            no names, numbers count as they are.

    The returned function raises EvaluationError for a label that is none of the classes.
    """
    by_number = names is None or not named
    numbers = frozenset(classes.values())

    def to_class(label: Any) -> int:
        name = label_text(label, names)
        if name in classes:
            return classes[name]
        if by_number and isinstance(label, int) and label in numbers:
            return label
        raise EvaluationError(
            f"the model has no class {name!r}",
            where="label column",
            expected=f"one of {', '.join(list(classes)[:20])}",
        )

    return to_class
