"""Examples that are the same in two data sets, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hub_magmax.evaluation.data import content_parts

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


def num_shared(examples: Dataset, others: Dataset) -> int:
    """Return how many of `examples` are among `others`, by the columns that both have."""
    columns = sorted(set(examples.column_names) & set(others.column_names))
    if not columns:
        return 0
    known = frozenset(row_digests(others, columns))
    return sum(row in known for row in row_digests(examples, columns))
