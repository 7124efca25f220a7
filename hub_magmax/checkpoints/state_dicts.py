"""Checkpoints that are state dicts of models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import CheckpointError
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.stored import Stored


class StateDictSource(TensorSource):
    """The tensors of a state dict, read where they are.

    They come in the order of a safetensors file: wide dtypes first, then by name. Values that lie side by
    side on the CPU are not copied; others are, once, when the source is made.

    Args:
        tensors: By name.
        label: Name of the checkpoint in messages.

    Raises:
        CheckpointError: If a value is no dense tensor, or safetensors has no name for its dtype.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], label: str) -> None:
        self.label = label
        stored = {name: _stored(name, tensor, label) for name, tensor in tensors.items()}
        self._stored = dict(sorted(stored.items(), key=lambda item: (-item[1].bits.itemsize, item[0])))
        self._index = CheckpointIndex(
            label,
            (),
            {
                name: TensorInfo(name, stored.dtype, stored.bits.shape, "state dict", 0, stored.bits.nbytes)
                for name, stored in self._stored.items()
            },
        )

    @property
    def sizes(self) -> Mapping[str, int]:
        return {}

    @property
    def index(self) -> CheckpointIndex:
        return self._index

    def read_bytes(self, path: str, start: int, stop: int) -> bytes:
        raise AssertionError(f"a state dict has no files, so {path} was not listed")

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        found = self._stored[name]
        values = found.bits.reshape(-1)[start:stop]
        if out is None:
            return Stored(values.copy(), found.dtype)  # a reader may compute in what it gets
        out[:] = values
        return Stored(out, found.dtype)


def _stored(name: str, tensor: Any, label: str) -> Stored:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"{name!r} is no dense tensor ({type(tensor).__name__})",
            where=label,
            expected="a state dict: tensors by name, as `model.state_dict()` returns them",
            hint="Leave out optimizer states and other values, and dequantise quantised weights.",
        )
    try:
        return Stored.of(tensor.detach().cpu())
    except StopIteration:
        raise CheckpointError(
            f"tensor {name!r} is of the dtype {tensor.dtype}",
            where=label,
            expected="a dtype that safetensors files can hold",
        ) from None
