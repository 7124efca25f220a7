"""Index of a checkpoint: its tensors and weight files, with the names and dtypes that occur in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Elements that have a task vector; all others are copied.
MERGEABLE_DTYPES = ("F64", "F32", "F16", "BF16")

#: Numbers in eight bits, which are no codes where no scales are beside them; they are cast before a merge.
FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2")

#: Elements that are counts, positions or masks: copied from the base model, and the same everywhere.
EXACT_DTYPES = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Ends the name of a file that says which task each element is taken from, and holds no weights.
SELECTION_SUFFIX = ".selection"

#: What PEFT calls an adapter's files.
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

#: A router between a merged model and its tasks' checkpoints, beside the model; no weights of the model.
ROUTER_NAME, ROUTER_WEIGHTS_NAME = "router.json", "router.safetensors"


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
    """One weight file. `header_sha256` covers the eight length bytes and the JSON header.

    `metadata` are the texts in the header that are about the file or the model.
    """

    file: str
    size_bytes: int
    header_sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


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


def is_adapter(index: CheckpointIndex) -> bool:
    """Say whether the weights are those of a PEFT adapter, which is a part of a model."""
    return [shard.file for shard in index.shards] == [ADAPTER_NAME]
