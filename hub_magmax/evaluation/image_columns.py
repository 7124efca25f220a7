"""Columns of images that data holds as bytes of files, as `datasets` stores them, without saying so."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows that are looked at for one that is not empty.
_NUM_LOOKED_AT = 20


def with_images(examples: Dataset) -> Dataset:
    """Return examples whose columns of images' bytes are images.

    `datasets` stores an image as `{bytes, path}`, and notes in the file's metadata that it is one; other
    programs leave that out. A column of such values, or of bytes, is one of images if the first bytes are.
    """
    from datasets import Image

    for name, feature in examples.features.items():
        if _holds_bytes(feature) and _is_image(_first_bytes(examples, name)):
            examples = examples.cast_column(name, Image())
    return examples


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {*feature} == {"bytes", "path"} and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _first_bytes(examples: Dataset, column: str) -> bytes:
    """Return the first bytes that a column has; none where it has none at its start."""
    rows = examples.select_columns([column])[: min(_NUM_LOOKED_AT, len(examples))][column]
    values = (value.get("bytes") if isinstance(value, dict) else value for value in rows)
    return next((value for value in values if value), b"")


def _is_image(content: bytes) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)):
            return True
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return False
