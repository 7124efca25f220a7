"""Damaged files beside the weights: empty ones, and JSON that cannot be read.

Sizes tell of empty files without a request. Content is read where the place of a checkpoint states no
hashes, which is on this machine: it is hashed there too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError

from hub_magmax.checkpoints.headers import DAMAGED, parse_json
from hub_magmax.checkpoints.side_files import is_tokenizer_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError

#: Formats whose files are never empty. Code, licences and plain lists may be.
_NEVER_EMPTY = re.compile(
    r".*\.(json|model|tiktoken|jinja|spm|bpe|vocab|codes|tokenizer|safetensors|bin|npy|npz|pt|gz|ya?ml)",
    re.IGNORECASE,
)

#: JSON that is longer is not read; the largest known tokenizers have some 50 MB.
_MAX_READ_BYTES = 100_000_000


class _AnyObject(BaseModel):
    """An object of which no key is looked at."""


def refuse_damaged(source: TensorSource, paths: Iterable[str]) -> None:
    """Raise CheckpointError for the first file that is empty, or JSON that cannot be read.

    Args:
        source: The checkpoint.
        paths: Files beside the weights that are going to be copied; those that are not there are skipped.
    """
    for path in sorted(set(paths)):
        size = source.size_of(path)
        if size == 0 and (_NEVER_EMPTY.fullmatch(path) or is_tokenizer_file(path)):
            raise CheckpointError(
                "the file is empty (0 bytes)",
                where=f"{source.label}, {path}",
                expected="what loaders read of the model",
                hint=DAMAGED,
            )
        is_read = path.endswith(".json") and source.stated_hashes(path) is None
        if size and size <= _MAX_READ_BYTES and is_read:
            _refuse_no_json(source.read_bytes(path, 0, size), f"{source.label}, {path}")


def _refuse_no_json(content: bytes, where: str) -> None:
    """Raise CheckpointError for what is no JSON.

    Python's values of a tokenizer take ten times its file, 330 MB of one of 33 MB. Pydantic reads objects
    in three times the file, as it makes none; what it does not take is left to Python's judgement.
    """
    try:
        _AnyObject.model_validate_json(content)
    except ValidationError:
        _refuse_no_json_slowly(content, where)


def _refuse_no_json_slowly(content: bytes, where: str) -> None:
    try:
        parse_json(content, where)
    except CheckpointError:
        if not _is_json_lines(content):
            raise


def _is_json_lines(content: bytes) -> bool:
    """Say whether each line is a value of its own, as in data that somebody called .json."""
    lines = [line for line in content.splitlines() if line.strip()]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict | list) for line in lines)
    except (ValueError, RecursionError):
        return False
