"""Examples for preferences and evaluation, as `datasets` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_magmax.digest import canonical_json
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


def load_examples(spec: Data, folder: Path, *, labelled: bool = True) -> Dataset:
    """Return the examples that `spec` names; relative paths start at `folder`.

    Args:
        spec: Which examples.
        folder: Where relative paths start.
        labelled: Whether the label column has to be there.

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
    for column in (spec.input_column, spec.label_column if labelled else None):
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


def fingerprint(examples: Dataset, columns: Sequence[str]) -> str:
    """Return a digest of what the columns hold: the same for the same examples, wherever they are stored.

    Images count by their pixels, so that a copy in another format without loss is the same data.
    """
    hasher = hashlib.sha256(canonical_json(list(columns)).encode())
    for example in examples.select_columns(list(columns)):
        for column in columns:
            for part in _parts(example[column]):
                hasher.update(len(part).to_bytes(8, "little") + part)
    return "sha256:" + hasher.hexdigest()


def _parts(value: Any) -> tuple[bytes, ...]:
    """Return a value as bytes; an image as its mode and size, and its pixels."""
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return f"{value.mode} {value.size}".encode(), value.tobytes()
    return (canonical_json(value).encode(),)


def label_names(examples: Dataset, column: str) -> list[str] | None:
    """Return the names of integer labels where the data set knows them, else None."""
    names = getattr(examples.features[column], "names", None)
    return list(names) if names else None
