"""The device backend: the operations of the reference, by torch on a device such as `cuda:1`, `mps` or `cpu`.

A chunk is copied to the device, merged there as a whole, and copied back. Each step of a built-in operation
(+, −, ×, tensor ÷ tensor, comparisons, choices, casts) is a kernel of its own that rounds once, correctly on
the CPU and, by NVIDIA's documents, on CUDA. A plug-in's operation may hold other steps (torch's sums along an
axis, its `exp`, and on CUDA its division by a number may differ in the last bit): the reference computes it.

Tested on the CPU only, where the bytes are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8, UInt64

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import Array, torch
from hub_magmax.kernels.ops import Inputs, Op, task_vectors
from hub_magmax.kernels.products import block_sums, in_blocks
from hub_magmax.kernels.randomness import MULTIPLIERS, CounterGenerator
from hub_magmax.kernels.reference import Reference, merge_piece
from hub_magmax.kernels.row_ranks import RankTable, factors_by_rank
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import MostKeys

#: Kinds of devices without float64; the reference does what needs it.
WITHOUT_FLOAT64 = ("mps",)


@dataclass(frozen=True)
class Device(Reference):
    """Arithmetic in torch on a device; the reference, on the CPU, does what this class lacks.

    All threads share the device's default stream.

    Attributes:
        device: With its number, where there may be several: threads differ in which is their current one.
    """

    device: torch.device = field(kw_only=True)

    def merge(self, op: Op, chunk: RawChunk, inputs: Inputs, dtype: str, scaling: float) -> Merged:
        """Merge one chunk, as `Backend.merge` says."""
        numbers = [tuple(map(torch.as_tensor, arrays)) for arrays in (inputs.per_element, inputs.per_task)]
        wide = [torch.float64] if op.is_wide else []
        if not op.name or self._lacks(
            [*wide, torch_dtype(dtype), *(v.dtype for v in (*chunk.values, *numbers[0], *numbers[1]))]
        ):
            return super().merge(op, chunk, inputs, dtype, scaling)
        placed = Inputs(*(tuple(map(self._place, arrays)) for arrays in numbers))
        found = merge_piece(op, self._values(chunk), placed, torch_dtype(dtype), scaling)
        merged, counts, probe = (tensor.cpu() for tensor in found)
        return Merged(Stored.of(merged), counts.numpy(), float(probe))

    def task_vectors(
        self, chunk: RawChunk, room: Callable[[], np.ndarray]
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return the task vectors of a chunk, as `Backend.task_vectors` says."""
        if not chunk.has_base or self._lacks(values.dtype for values in chunk.values):
            return super().task_vectors(chunk, room)
        base, *checkpoints = self._values(chunk)
        stacked, out = task_vectors(base, checkpoints), room()
        chunk.check(float(stacked.sum()))
        torch.from_numpy(out).copy_(stacked)
        return out

    def products(self, chunk: RawChunk, *, with_base: bool = True) -> Float64[np.ndarray, "pairs blocks"]:
        """Return inner products block by block, as `Backend.products` says."""
        if not chunk.has_base or self.device.type in WITHOUT_FLOAT64 or not chunk.num_elements:
            return super().products(chunk, with_base=with_base)
        base, *checkpoints = self._values(chunk)
        vectors = task_vectors(base, checkpoints)
        chunk.check(float(vectors.sum()))
        if with_base:
            vectors = torch.cat([base.float()[None], vectors])

        def zeros(shape: tuple[int, int]) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        found: np.ndarray = torch.cat(block_sums(in_blocks(vectors, zeros))).cpu().numpy()
        return found

    def of_matrices(
        self,
        function: Callable[[Float32[torch.Tensor, "tasks rows columns"]], Any],
        task_vectors: Float32[torch.Tensor, "tasks rows columns"],
    ) -> Any:
        """Return what a function makes of a matrix, as `Backend.of_matrices` says.

        It computes in float64, so where a device lacks that, the CPU does.
        """
        if self.device.type in WITHOUT_FLOAT64:
            return super().of_matrices(function, task_vectors)
        try:
            found = function(self._place(task_vectors))
        except torch.OutOfMemoryError as error:
            num_tasks, rows, columns = task_vectors.shape
            raise RecipeError(
                f"{self.device} has not the memory that {num_tasks} matrices of {rows} x {columns} take",
                key=("output", "device"),
                hint="Leave out the device, or free its memory: other programs may hold some.",
            ) from error
        return found.cpu() if isinstance(found, torch.Tensor) else found

    def mix(
        self,
        start: int,
        count: int,
        generator: CounterGenerator,
        edges: UInt64[np.ndarray, " edges"],
        tasks: UInt8[np.ndarray, " tasks"],
    ) -> UInt8[np.ndarray, " count"]:
        """Return a task for each element, as `Backend.mix` says."""
        # Without its highest bit, a number without a sign sorts like one with a sign.
        keys = self._keys(start, count, generator, 0) ^ -(2**63)
        places = torch.zeros(count, dtype=torch.int64, device=self.device)
        for edge in edges.tolist():
            places += keys >= edge - 2**63
        drawn: np.ndarray = self._place(tasks)[places].cpu().numpy()
        return drawn

    def drop(
        self, start: int, count: int, generator: CounterGenerator, streams: Sequence[int], most: MostKeys
    ) -> UInt8[np.ndarray, "bytes count"]:
        """Return a bit for every task and element that is kept, as `Backend.drop` says."""
        kept = torch.zeros(((len(streams) + 3) // 4, count), dtype=torch.uint8, device=self.device)
        for pair, stream in enumerate(streams):
            keys = self._keys(start, count, generator, stream)
            for task, drawn in enumerate((keys & 0xFFFFFFFF, _shifted(keys, 32)), 2 * pair):
                kept[task // 8] |= (drawn <= int(most[task])).to(torch.uint8) << task % 8
        found: np.ndarray = kept.cpu().numpy()
        return found

    def factors_by_rank(
        self,
        start: int,
        chunk: RawChunk,
        generator: CounterGenerator,
        streams: Sequence[int],
        table: RankTable,
    ) -> Float32[np.ndarray, "tasks chunk"]:
        """Return what each element is multiplied by, as `Backend.factors_by_rank` says."""
        if not chunk.has_base or self._lacks(values.dtype for values in chunk.values):
            return super().factors_by_rank(start, chunk, generator, streams, table)
        base, *checkpoints = self._values(chunk)
        vectors = task_vectors(base, checkpoints)
        chunk.check(float(vectors.sum()))
        keys = [self._keys(start, chunk.num_elements, generator, stream) for stream in streams]
        halves = [half for key in keys for half in (key & 0xFFFFFFFF, _shifted(key, 32))]
        numbers = self._place(np.asarray(table.most).astype(np.int64)), self._place(table.factors)
        found: np.ndarray = (
            factors_by_rank(vectors, torch.stack(halves[: len(vectors)]), *numbers).cpu().numpy()
        )
        return found

    def _keys(
        self, start: int, count: int, generator: CounterGenerator, stream: int
    ) -> Int64[torch.Tensor, " count"]:
        """Return what `CounterGenerator.keys` returns: products and sums of int64 wrap, too."""
        increment, first, second = map(_signed, MULTIPLIERS)
        before, middle = map(_signed, generator.constants(stream))
        mixed = torch.arange(start, start + count, device=self.device) * increment + before
        mixed = (mixed ^ _shifted(mixed, 30)) * first ^ middle
        mixed = (mixed ^ _shifted(mixed, 27)) * second
        return mixed ^ _shifted(mixed, 31)

    def _place(self, values: Array) -> torch.Tensor:
        return torch.as_tensor(values).to(self.device)

    def _values(self, chunk: RawChunk) -> list[torch.Tensor]:
        """Return what is stored of a chunk on the device: one row for each checkpoint."""
        return [self._place(values) for values in chunk.values]

    def _lacks(self, dtypes: Iterable[torch.dtype]) -> bool:
        return self.device.type in WITHOUT_FLOAT64 and torch.float64 in dtypes


def available_devices() -> tuple[str, ...]:
    """Return the names of all devices that torch finds on this machine."""
    cuda = (f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return ("cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else []))


def backend_on(name: str) -> Device:
    """Return the backend on a device; without a number, on the current one of several.

    Raises:
        RecipeError: If torch finds no such device.
    """
    found = available_devices()
    if name not in found and f"{name}:0" not in found:
        raise RecipeError(
            f"torch finds no device {name!r} on this machine",
            key=("output", "device"),
            expected=f"one of {', '.join(found)}" if found[1:] else f"{found[0]}, which is all it finds",
            hint="Choose another one (--device), or none for what is fastest on the CPU: the bytes are the "
            "same. A GPU needs its driver, and a version of torch for it.",
        )
    return Device(device=torch.empty(0, device=name).device)


def _signed(number: int | np.unsignedinteger) -> int:
    """Return the int64 with the bits of a uint64."""
    return (int(number) + 2**63) % 2**64 - 2**63


def _shifted(keys: Int64[torch.Tensor, " count"], by: int) -> Int64[torch.Tensor, " count"]:
    """Shift to the right without copying the sign."""
    return keys >> by & (1 << 64 - by) - 1
