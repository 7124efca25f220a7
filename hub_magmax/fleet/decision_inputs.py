"""Inputs of decisions: read from data, stored in records, and found again."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hub_magmax.errors import EvaluationError, RecordError

#: Modes of Pillow's images that come back from a PNG as they were.
_PNG_MODES = ("1", "I;16", "L", "LA", "P", "RGB", "RGBA")


def stored_input(asked: Any, *, digest_only: bool) -> dict[str, Any]:
    """Return an input as a record holds it: its digest, and unless it is left out itself, images as PNG.

    Raises:
        EvaluationError: If it cannot be stored.
    """
    found = {"digest": digest_of(asked)}
    if digest_only:
        return found
    return {**found, "text": asked} if isinstance(asked, str) else {**found, "image": _as_png(asked)}


def digest_of(asked: Any) -> str:
    """Return `sha256:` of a text in UTF-8, or of an image's mode, size, palette and pixels.

    Raises:
        EvaluationError: If the text cannot be encoded.
    """
    try:
        content = asked.encode() if isinstance(asked, str) else _image_bytes(asked)
    except UnicodeEncodeError as error:
        raise EvaluationError("the text holds what is no character", where="input") from error
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _image_bytes(image: Any) -> bytes:
    """Return mode, size, palette and pixels of an image."""
    pixels: bytes = image.tobytes()
    return f"{image.mode} {image.size} {image.getpalette()} ".encode() + pixels


def _as_png(image: Any) -> str:
    """Return an image as PNG, which loses nothing, in base64."""
    if image.mode not in _PNG_MODES:
        raise EvaluationError(
            f"an image of mode {image.mode} cannot be stored as PNG",
            where="input",
            hint="Convert it to RGB, or record digests of the inputs alone.",
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def restored_input(stored: Mapping[str, Any]) -> Any:
    """Return the input that a record holds; None where it holds the digest alone.

    Raises:
        RecordError: If the input is not that of its digest.
    """
    found = _stored(stored)
    if found is not None and digest_of(found) != stored.get("digest"):
        raise RecordError("the input is not that of its digest", where=f"input {stored.get('digest')}")
    return found


def _stored(stored: Mapping[str, Any]) -> Any:
    from PIL import Image

    if isinstance(stored.get("text"), str):
        return stored["text"]
    if not isinstance(stored.get("image"), str):
        return None
    try:
        image = Image.open(io.BytesIO(base64.b64decode(stored["image"])), formats=["PNG"])
        image.load()
    except (OSError, ValueError, binascii.Error) as error:
        raise RecordError("the image cannot be read", where=f"input {stored.get('digest')}") from error
    return image


def lines_of(file: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream of UTF-8, without their ends.

    Raises:
        EvaluationError: If one is no UTF-8.
    """
    for number, line in enumerate(file, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise EvaluationError(
                "this is no text in UTF-8", where=f"standard input, line {number}"
            ) from error
