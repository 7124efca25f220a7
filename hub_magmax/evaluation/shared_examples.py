"""Examples that are the same in two data sets, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hub_magmax.evaluation.data import content_parts
from hub_magmax.evaluation.evaluators import Evaluator, wanted_columns
from hub_magmax.recipe.values import Data

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
