"""Files of statistics written, so that their bytes depend on the values alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hub_magmax.files import os_errors
from hub_magmax.kernels.lazy_imports import Tensor

#: Dtypes of statistics, as safetensors calls them, by the bytes of an element.
_DTYPES = {4: "F32", 8: "F64"}


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of values, so that the header, which locks pin, tells them apart too."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode() + b"\0")
        hasher.update(tensor.contiguous().numpy().data)
    return hasher.hexdigest()


def write_statistics(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a file of statistics in one step; its bytes depend on the values alone.

    The library for safetensors writes texts of a header in any order.

    Raises:
        OutputError: If it cannot be written.
    """
    header: dict[str, Any]
    header, start = {"__metadata__": dict(sorted(facts.items()))}, 0
    for name, tensor in sorted(tensors.items()):
        size = tensor.element_size()
        stop = start + size * tensor.numel()
        header[name] = {"dtype": _DTYPES[size], "shape": [*tensor.shape], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.tmp")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, tensor in sorted(tensors.items()):
                    file.write(tensor.contiguous().numpy().data)
            temporary.rename(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
