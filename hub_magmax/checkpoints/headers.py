"""Headers of weight files: where each tensor lies, checked before any offset is believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hub_magmax.checkpoints.foreign_files import format_of_content
from hub_magmax.checkpoints.index import ShardInfo, TensorInfo
from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.dtypes import ITEM_BYTES, PACKED_DTYPES
from hub_magmax.text import shown

#: The format's own limit; a larger header (or index) is an attack or a mistake.
MAX_HEADER_BYTES = 100_000_000

#: torch's and numpy's own limit.
MAX_DIMENSIONS = 64

#: Hint of errors that only another copy of the file can mend.
DAMAGED = "The file is damaged; download or save it again."

#: Returns the bytes `[start, stop)` of a file of a checkpoint, by its path.
ReadBytes = Callable[[str, int, int], bytes]

#: Takes a file's path, its size, a function that reads it, and its name in messages. Returns the file, with
#: a hash of its header, and its tensors by name in offset order; raises CheckpointError if it is malformed.
HeaderReader = Callable[[str, int, ReadBytes, str], tuple[ShardInfo, dict[str, TensorInfo]]]


def read_safetensors(
    file: str, size: int, read_bytes: ReadBytes, where: str
) -> tuple[ShardInfo, dict[str, TensorInfo]]:
    """Return a safetensors file and its tensors by name, in offset order; see `HeaderReader`.

    Format: https://github.com/huggingface/safetensors#format
    """
    if size < 8:
        raise CheckpointError(
            f"{size} bytes are too few for a header",
            where=where,
            expected="a safetensors file",
            hint=DAMAGED,
        )
    length_bytes = read_bytes(file, 0, 8)
    length = int.from_bytes(length_bytes, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        found = format_of_content(length_bytes)
        raise CheckpointError(
            f"this is {found.what}"
            if found
            else f"the header is said to be {length:,} bytes long in a file of {size:,} bytes",
            where=where,
            expected="a safetensors file",
            hint=found.step
            if found
            else "The file is truncated or not safetensors; download or save it again.",
        )
    text = read_bytes(file, 8, 8 + length)
    document = parse_json(text, where, unique_names=True)
    if not isinstance(document, dict):
        raise CheckpointError("the header is not a JSON object", where=where, hint=DAMAGED)
    metadata = document.get("__metadata__", {})
    _check_metadata(metadata, where)
    tensors = [
        _tensor_info(name, entry, file, 8 + length, where)
        for name, entry in document.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.start_byte, tensor.stop_byte, tensor.name))
    _check_layout(tensors, 8 + length, size, where)
    shard = ShardInfo(file, size, hashlib.sha256(length_bytes + text).hexdigest(), metadata)
    return shard, {tensor.name: tensor for tensor in tensors}


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            "`__metadata__` is not a mapping of texts to texts",
            where=where,
            hint="Save the checkpoint again with `save_pretrained`.",
        )


def parse_json(text: bytes, where: str, *, unique_names: bool = False) -> Any:
    """Return the values of a JSON text in UTF-8.

    Raises:
        CheckpointError: If it is malformed, or a name that has to be unique is not.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(
                f"the name {shown(twice)} appears twice",
                where=where,
                hint="Save the checkpoint again with `save_pretrained`.",
            )
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique if unique_names else None)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not readable as JSON ({json_problem(error)})",
            where=where,
            hint=DAMAGED,
        ) from error


def json_problem(error: Exception) -> str:
    """Return why a text cannot be read as JSON, given what reading it raised."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos:,}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start:,}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"


def _tensor_info(name: str, entry: Any, file: str, data_start: int, where: str) -> TensorInfo:
    where = f"{where}, tensor {shown(name)}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        name.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            "the name is not valid Unicode (half of a surrogate pair)", where=where, hint=DAMAGED
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the header entry lacks dtype, shape or data_offsets", where=where, hint=DAMAGED
        ) from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"dtype {shown(str(dtype))} is not supported",
            where=where,
            expected=", ".join(ITEM_BYTES),
            hint="Its values are quantised: merge the checkpoints from before quantisation."
            if dtype in PACKED_DTYPES
            else "",
        )
    _check_numbers(shape, start, stop, where)
    info = TensorInfo(name, dtype, tuple(shape), file, data_start + start, data_start + stop)
    if info.num_bytes != info.num_elements * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"shape {_shape_shown(shape)} of {dtype} needs {info.num_elements * ITEM_BYTES[dtype]:,} bytes, "
            f"the offsets give {info.num_bytes:,}",
            where=where,
            hint=DAMAGED,
        )
    return info


def _check_numbers(shape: Any, start: Any, stop: Any, where: str) -> None:
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(
            "shape and offsets are not whole numbers",
            where=where,
            expected="numbers from 0 on",
            hint=DAMAGED,
        )
    # The product of many large numbers takes hours, so their count comes first.
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) >= 2**63:
        raise CheckpointError(
            f"shape {_shape_shown(shape)} is larger than any tensor",
            where=where,
            expected=f"at most {MAX_DIMENSIONS} dimensions and fewer than 2^63 elements",
        )


def _shape_shown(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"[{', '.join(map(str, shape[:8]))}, ...]"


def _check_layout(tensors: list[TensorInfo], data_start: int, size: int, where: str) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start_byte != position:
            what = (
                "overlaps the tensor before it" if tensor.start_byte < position else "leaves a hole before it"
            )
            raise CheckpointError(
                f"tensor {shown(tensor.name)} {what} at byte {position:,}",
                where=where,
                hint=DAMAGED,
            )
        position = tensor.stop_byte
    if position != size:
        kind = "truncated" if size < position else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"the file is {kind}: {size:,} bytes instead of {position:,}",
            where=where,
            hint="Download or save the checkpoint again.",
        )


#: Readers of headers, by the suffix of the file; a further format of weights is a line here.
HEADER_READERS: Mapping[str, HeaderReader] = MappingProxyType({"safetensors": read_safetensors})
