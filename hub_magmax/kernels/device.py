"""Arithmetic of built-in operations by torch on a device, such as a GPU.

Tested on the CPU only, where its bytes are those of the reference. Operations of plug-ins, which may create
tensors of their own, float64, which some devices lack, and surveys of whole tensors run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from hub_magmax.errors import OutputError
from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import NARROW_DTYPES, RawChunk
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import Array, torch
from hub_magmax.kernels.ops import OPS, Inputs, Op
from hub_magmax.kernels.randomness import MULTIPLIERS, CounterGenerator
from hub_magmax.kernels.reference import Reference, merge_piece
from hub_magmax.kernels.stored import Stored

_SIGN_BIT = -(2**63)


@dataclass(frozen=True)
class Device(Reference):
    """Elementwise operations and draws on a device; the rest on the CPU.

    Attributes:
        device: As torch calls it: "cpu", "cuda", "mps".
    """

    device: str = "cpu"

    def merge(self, op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float) -> Merged:
        """Merge one chunk, as `Backend.merge` says."""
        if op.name not in OPS or dtype not in NARROW_DTYPES or not chunk.is_narrow:
            return super().merge(op, chunk, inputs, dtype, scaling)
        numbers = Inputs(*(tuple(map(self._there, found)) for found in (inputs.per_element, inputs.per_task)))
        values = [self._there(row) for row in chunk.values]
        merged, counts, probe = merge_piece(op, values, numbers, torch_dtype(dtype), scaling)
        return Merged(Stored.of(merged.cpu()), counts.cpu().numpy(), float(probe))

    def mix(
        self,
        start: int,
        count: int,
        generator: CounterGenerator,
        edges: UInt64[np.ndarray, " edges"],
        tasks: UInt8[np.ndarray, " tasks"],
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element, as `Backend.mix` says."""
        # Without the highest bit, signed integers sort like unsigned ones.
        keys = self._keys(start, count, generator, 0) ^ _SIGN_BIT
        places = torch.zeros(count, dtype=torch.int64, device=self.device)
        for edge in edges.view(np.int64).tolist():
            places += keys >= (edge ^ _SIGN_BIT)
        found: UInt8[np.ndarray, " count"] = np.take(tasks, places.cpu().numpy(), mode="clip")
        return found

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: np.uint32
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept, as `Backend.drop` says."""
        kept = torch.zeros(((len(streams) + 3) // 4, count), dtype=torch.uint8, device=self.device)
        for pair, stream in enumerate(streams):
            keys = self._keys(start, count, generator, stream)
            for task, drawn in enumerate((keys & 0xFFFFFFFF, keys >> 32 & 0xFFFFFFFF), 2 * pair):
                kept[task // 8] |= (drawn <= int(most)).to(torch.uint8) << task % 8
        found: UInt8[np.ndarray, "bytes count"] = kept.cpu().numpy()
        return found

    def _there(self, values: Array) -> torch.Tensor:
        return torch.as_tensor(values).to(self.device)

    def _keys(
        self, start: int, count: int, generator: CounterGenerator, stream: int
    ) -> Int64[torch.Tensor, " count"]:
        """Return what `CounterGenerator.keys` returns, in torch's integers, which wrap alike."""
        increment, first, second = (int(number.view(np.int64)) for number in MULTIPLIERS)
        before, middle = (int(number.view(np.int64)) for number in generator.constants(stream))
        keys = torch.arange(start, start + count, dtype=torch.int64, device=self.device) * increment + before
        keys ^= _shifted(keys, 30)
        keys = keys * first ^ middle
        keys ^= _shifted(keys, 27)
        keys *= second
        return keys ^ _shifted(keys, 31)


def _shifted(keys: Int64[torch.Tensor, " count"], by: int) -> Int64[torch.Tensor, " count"]:
    """Shift right with zeros, where torch repeats the sign."""
    return keys >> by & ((1 << 64 - by) - 1)


def find_device(name: str) -> Device:
    """Return the backend of a device.

    Raises:
        OutputError: If torch finds no such device.
    """
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found[name]:
        raise OutputError(
            f"torch finds no device {name!r}",
            where="recipe, output.device",
            expected=", ".join(device for device, is_there in found.items() if is_there),
            hint="Leave output.device out to merge on the CPU.",
        )
    return Device(device=name)
