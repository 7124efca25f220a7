"""Read what a safetensors checkpoint contains from its headers and its index alone.

Nothing here imports torch or touches a network: a checkpoint is a listing of file sizes and
a function that reads bytes, so a folder, a repository and a test all look the same.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.text import shown

#: Elements that have a task vector; all others are copied.
MERGEABLE_DTYPES = ("F64", "F32", "F16", "BF16")

#: Elements that are counts, positions or masks: copied from the base model, and the same everywhere.
EXACT_DTYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")

#: The format's own limit; a larger header (or index) is an attack or a mistake.
MAX_HEADER_BYTES = 100_000_000

#: torch's and numpy's own limit.
MAX_DIMENSIONS = 64


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: What PEFT calls an adapter's files.
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

_DAMAGED = "The file is damaged; download or save it again."

ReadBytes = Callable[[str, int, int], bytes]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `stop_byte` is exclusive, both count from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start_byte: int
    stop_byte: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.stop_byte - self.start_byte


@dataclass(frozen=True)
class ShardInfo:
    """One weight file. `header_sha256` covers the eight length bytes and the JSON header."""

    file: str
    size_bytes: int
    header_sha256: str


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of one checkpoint, in file and offset order.

    Attributes:
        label: What the checkpoint is called in messages.
        shards: The weight files, sorted by name.
        tensors: By name, in the order in which their bytes lie in the files.
    """

    label: str
    shards: tuple[ShardInfo, ...]
    tensors: Mapping[str, TensorInfo] = field(hash=False)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_index(
    label: str, sizes: Mapping[str, int], read_bytes: ReadBytes, weights: str = "", origin: str = ""
) -> CheckpointIndex:
    """Build the index of the checkpoint whose files are listed in `sizes`.

    Args:
        label: What to call the checkpoint in messages.
        sizes: Bytes of every file, by its path relative to the checkpoint.
        read_bytes: Returns the bytes `[start, stop)` of a file.
        weights: The file of weights, or the index, that counts where there are several.
        origin: What `from_pretrained` takes to load it, as Python writes it, for messages.

    Raises:
        CheckpointError: If there are no safetensors weights, or they are malformed.
    """
    shards: list[ShardInfo] = []
    tensors: dict[str, TensorInfo] = {}
    expected = weight_map(label, sizes, read_bytes, weights, origin)
    for file in sorted(expected):
        shard, found = _read_header(label, file, sizes[file], read_bytes)
        names = expected[file]
        if names is not None and set(found) != set(names):
            raise _disagreement(label, file, set(found), set(names))
        for name in found:
            if name in tensors:
                raise CheckpointError(
                    f"tensor {shown(name)} is stored twice, in {tensors[name].file} and {file}",
                    where=label,
                    hint="Save the checkpoint again with `save_pretrained`.",
                )
        shards.append(shard)
        tensors.update(found)
    if not tensors:
        raise CheckpointError(
            "the checkpoint has no tensors", where=label, hint="Save it again with `save_pretrained`."
        )
    return CheckpointIndex(label, tuple(shards), tensors)


def weight_map(
    label: str, sizes: Mapping[str, int], read_bytes: ReadBytes, weights: str = "", origin: str = ""
) -> dict[str, frozenset[str] | None]:
    """Return the weight files, each with the tensor names its index promises (None: no index)."""
    _refuse_odd_names(label, sizes)
    if weights:
        return _named_weights(label, sizes, read_bytes, weights)
    indexes = (
        [INDEX_NAME] if INDEX_NAME in sizes else fnmatch.filter(sorted(sizes), "*.safetensors.index.json")
    )
    if len(indexes) == 1:
        return _parse_index(label, indexes[0], sizes, read_bytes)
    singles = [SINGLE_NAME] if SINGLE_NAME in sizes else fnmatch.filter(sorted(sizes), "*.safetensors")
    singles = [path for path in singles if "/" not in path]
    _refuse_adapter(label, sizes, [*indexes, *singles])
    if len(indexes) > 1 or len(singles) > 1:
        raise CheckpointError(
            f"several weight files and no {INDEX_NAME}: {', '.join(indexes or singles)}",
            where=label,
            expected=f"one {SINGLE_NAME}, or shards listed in one {INDEX_NAME}",
            hint="Keep one set of weights, or name the file that counts: hf://org/model@revision/FILE, or "
            f"./folder/FILE, such as {(indexes or singles)[0]}.",
        )
    if not singles:
        raise _no_weights(label, sizes, origin or repr(label))
    return {singles[0]: None}


def _named_weights(
    label: str, sizes: Mapping[str, int], read_bytes: ReadBytes, weights: str
) -> dict[str, frozenset[str] | None]:
    if weights not in sizes:
        there = [path for path in sizes if ".safetensors" in path]
        raise CheckpointError(
            f"there is no file {shown(weights)}",
            where=label,
            expected=f"one of {', '.join(there[:10])}" if there else "a safetensors file",
            hint="Check the name.",
        )
    return _parse_index(label, weights, sizes, read_bytes) if weights.endswith(".json") else {weights: None}


def _refuse_odd_names(label: str, sizes: Mapping[str, int]) -> None:
    for path in sizes:
        control = any(unicodedata.category(character) in ("Cc", "Cs") for character in path)
        if (control or "\\" in path) and path.endswith((".safetensors", ".index.json")):
            raise CheckpointError(
                f"the file name {shown(path)} holds {'control characters' if control else 'a backslash'}",
                where=label,
                hint="Rename the file.",
            )


def is_adapter(index: CheckpointIndex) -> bool:
    """Say whether the weights are those of a PEFT adapter, which is a part of a model."""
    return [shard.file for shard in index.shards] == [ADAPTER_NAME]


def _refuse_adapter(label: str, sizes: Mapping[str, int], weights: list[str]) -> None:
    """Raise CheckpointError if the weights are those of an adapter that cannot be read."""
    files = weights or [path for path in sizes if path.endswith(".bin")]
    if not files or any(Path(path).stem != "adapter_model" for path in files):
        return
    if files != [ADAPTER_NAME]:
        raise CheckpointError(
            f"a PEFT adapter with pickled weights ({files[0]}), which are never loaded",
            where=label,
            expected=ADAPTER_NAME,
            hint='Convert it where you trust it: python -c "import torch; from safetensors.torch import '
            "save_file; save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')\", in its folder.",
        )
    if ADAPTER_CONFIG_NAME not in sizes:
        raise CheckpointError(
            f"a PEFT adapter ({ADAPTER_NAME}) without {ADAPTER_CONFIG_NAME}",
            where=label,
            hint="Download or copy the adapter again, completely.",
        )


def _no_weights(label: str, sizes: Mapping[str, int], origin: str) -> CheckpointError:
    pickles = sorted(path for path in sizes if path.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        return CheckpointError(
            f"only pickled weights ({', '.join(pickles[:3])}), which are never loaded",
            where=label,
            expected="safetensors",
            hint=f"Convert them where you trust them: {_conversion(origin, sizes, pickles)}",
        )
    return CheckpointError(
        "no safetensors file",
        where=label,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="Check the path; a checkpoint is a folder written by `save_pretrained`.",
    )


def _conversion(origin: str, sizes: Mapping[str, int], pickles: list[str]) -> str:
    """Return the command that writes pickled weights as safetensors."""
    if "config.json" in sizes and all(path.startswith("pytorch_model") for path in pickles):
        return (
            f'python -c "import transformers as t; c = t.AutoConfig.from_pretrained({origin}); '
            f"getattr(t, c.architectures[0]).from_pretrained({origin}).save_pretrained('OUT')\", and name "
            "./OUT in the recipe."
        )
    return (
        f'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load({pickles[0]!r}, weights_only=True), 'model.safetensors')\", in its folder."
    )


def _parse_index(
    label: str, path: str, sizes: Mapping[str, int], read_bytes: ReadBytes
) -> dict[str, frozenset[str] | None]:
    where = f"{label}, {path}"
    if sizes[path] > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{sizes[path]:,} bytes long", where=where, expected=f"at most {MAX_HEADER_BYTES:,} bytes"
        )
    document = _parse_json(read_bytes(path, 0, sizes[path]), where)
    entries = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()) or not entries:
        raise CheckpointError(
            "no `weight_map` from tensor names to file names",
            where=where,
            hint=_DAMAGED,
        )
    names: dict[str, set[str]] = {}
    for name, file in entries.items():
        if file not in sizes or "/" in file or "\\" in file:
            raise CheckpointError(
                f"tensor {shown(name)} is said to be in {shown(file)}, which is not there",
                where=where,
                expected="a file beside the index",
                hint="Download or copy the checkpoint again, completely.",
            )
        names.setdefault(file, set()).add(name)
    return {file: frozenset(found) for file, found in names.items()}


def _disagreement(label: str, file: str, found: set[str], promised: set[str]) -> CheckpointError:
    missing, extra = sorted(promised - found), sorted(found - promised)
    facts = [
        f"it lacks {shown(missing[0])}" if missing else "",
        f"it also holds {shown(extra[0])}" if extra else "",
    ]
    return CheckpointError(
        "the index and the file disagree: " + " and ".join(fact for fact in facts if fact),
        where=f"{label}, {file}",
        expected=f"exactly the {len(promised)} tensors that the index lists",
        hint="Remove stale shards, or save the checkpoint again with `save_pretrained`.",
    )


def _read_header(
    label: str, file: str, size: int, read_bytes: ReadBytes
) -> tuple[ShardInfo, dict[str, TensorInfo]]:
    where = f"{label}, {file}"
    if size < 8:
        raise CheckpointError(
            f"{size} bytes are too few for a header",
            where=where,
            expected="a safetensors file",
            hint=_DAMAGED,
        )
    length_bytes = read_bytes(file, 0, 8)
    length = int.from_bytes(length_bytes, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"the header is said to be {length:,} bytes long in a file of {size:,} bytes",
            where=where,
            expected="a safetensors file",
            hint="The file is truncated or not safetensors; download or save it again.",
        )
    text = read_bytes(file, 8, 8 + length)
    document = _parse_json(text, where)
    if not isinstance(document, dict):
        raise CheckpointError("the header is not a JSON object", where=where, hint=_DAMAGED)
    _check_metadata(document.get("__metadata__", {}), where)
    tensors = [
        _tensor_info(name, entry, file, 8 + length, where)
        for name, entry in document.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.start_byte, tensor.stop_byte, tensor.name))
    _check_layout(tensors, 8 + length, size, where)
    shard = ShardInfo(file, size, hashlib.sha256(length_bytes + text).hexdigest())
    return shard, {tensor.name: tensor for tensor in tensors}


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            "`__metadata__` is not a mapping of texts to texts",
            where=where,
            hint="Save the checkpoint again with `save_pretrained`.",
        )


def _parse_json(text: bytes, where: str) -> Any:
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
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not readable as JSON ({_json_problem(error)})",
            where=where,
            hint=_DAMAGED,
        ) from error


def _json_problem(error: Exception) -> str:
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
            "the name is not valid Unicode (half of a surrogate pair)", where=where, hint=_DAMAGED
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the header entry lacks dtype, shape or data_offsets", where=where, hint=_DAMAGED
        ) from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"dtype {shown(str(dtype))} is not supported", where=where, expected=", ".join(ITEM_BYTES)
        )
    _check_numbers(shape, start, stop, where)
    info = TensorInfo(name, dtype, tuple(shape), file, data_start + start, data_start + stop)
    if info.num_bytes != info.num_elements * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"shape {_shape_shown(shape)} of {dtype} needs {info.num_elements * ITEM_BYTES[dtype]:,} bytes, "
            f"the offsets give {info.num_bytes:,}",
            where=where,
            hint=_DAMAGED,
        )
    return info


def _check_numbers(shape: Any, start: Any, stop: Any, where: str) -> None:
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(
            "shape and offsets are not whole numbers",
            where=where,
            expected="numbers from 0 on",
            hint=_DAMAGED,
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
                hint=_DAMAGED,
            )
        position = tensor.stop_byte
    if position != size:
        kind = "truncated" if size < position else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"the file is {kind}: {size:,} bytes instead of {position:,}",
            where=where,
            hint="Download or save the checkpoint again.",
        )
