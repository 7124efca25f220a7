"""Examples for preferences and evaluation, as `datasets` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError
from hub_magmax.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset

#: Single files by ending, and the `datasets` reader for each.
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the progress bars of datasets and transformers off: one line per step says enough."""
    import datasets
    from transformers.utils import logging

    bars = [
        (
            datasets.are_progress_bars_disabled(),
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        ),
        (not logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
    ]
    for was_off, disable, _ in bars:
        if not was_off:
            disable()
    try:
        yield
    finally:
        for was_off, _, enable in bars:
            if not was_off:
                enable()


def load_examples(spec: Data, folder: Path) -> Dataset:
    """Return the examples that `spec` names; relative paths start at `folder`.

    Raises:
        EvaluationError: If they cannot be loaded, are empty, or lack a named column.
    """
    where = f"{spec.dataset}, split {spec.split}"
    try:
        with without_bars():
            examples = _load(spec, folder)
    except Exception as error:  # datasets raises many kinds, most of them for a wrong name
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the data cannot be loaded ({type(error).__name__}: {reason})",
            where=where,
            hint="Check the name, the split and the columns with datasets.load_dataset.",
        ) from error
    for column in (spec.input_column, spec.label_column):
        if column is not None and column not in examples.column_names:
            raise EvaluationError(
                f"there is no column {column!r}",
                where=where,
                expected=f"one of {', '.join(examples.column_names)}",
                hint="Name it with input_column or label_column.",
            )
    if len(examples) == 0:
        raise EvaluationError("the split is empty", where=where)
    return examples


def _load(spec: Data, folder: Path) -> Dataset:
    from datasets import load_dataset

    path = (folder / Path(spec.dataset).expanduser()).absolute()
    if path.is_file() and path.suffix in _READERS:
        separator: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
        split = spec.split.replace(
            "test", "train", 1
        )  # a single file is one split, which datasets calls train
        return load_dataset(_READERS[path.suffix], data_files=str(path), split=split, **separator)
    name = str(path) if path.is_dir() else spec.dataset
    return load_dataset(name, spec.config, split=spec.split, revision=spec.revision)


def label_names(examples: Dataset, column: str) -> list[str] | None:
    """Return the names of integer labels where the data set knows them, else None."""
    names = getattr(examples.features[column], "names", None)
    return list(names) if names else None
