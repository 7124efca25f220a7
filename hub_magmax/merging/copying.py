"""Tensors copied from one checkpoint, cast or checked for equality."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.profile import Clock
from hub_magmax.planning.plan import EXACT_REASON, TensorJob


def copied_chunks(
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    tasks: tuple[str, ...],
    chunk_elements: int,
    clock: Clock | None = None,
) -> Iterator[Stored]:
    """Yield the values of a tensor that is copied, in the output's dtype.

    A NaN or an infinity is copied like any other value.

    Raises:
        MismatchError: If values that cannot be merged differ between the checkpoints.
        NonFiniteError: If a finite value is too large for the output's dtype.
    """
    source, clock = sources[job.source], clock or Clock()
    for start in range(0, job.num_elements, chunk_elements):
        stop = min(start + chunk_elements, job.num_elements)
        with clock.spend("read"):
            found = source.read_stored(job.name, start, stop)
        source.release(job.name, stop)
        if job.reason == EXACT_REASON:
            _check_equal(job, start, found, [sources[task] for task in tasks])
        yield found if found.dtype == job.dtype else _cast(job, source, start, found.tensor)


def _cast(job: TensorJob, source: TensorSource, start: int, values: torch.Tensor) -> Stored:
    cast = values.to(torch_dtype(job.dtype))
    found = Stored.of(cast)
    if not found.is_finite():
        overflown = torch.nonzero(torch.isfinite(values) & ~torch.isfinite(cast))
        if len(overflown):
            element = int(overflown[0])
            raise NonFiniteError(
                f"element {start + element:,} is {float(values[element])}",
                where=tensor_place(source, source.index.tensors[job.name], start + element),
                expected=f"numbers that {str(cast.dtype).removeprefix('torch.')} can hold",
                hint="Choose a wider output.dtype.",
            )
    return found


def _check_equal(job: TensorJob, start: int, values: Stored, others: Sequence[TensorSource]) -> None:
    stop = start + len(values.bits)
    for source in others:
        found = source.read_stored(job.name, start, stop)
        source.release(job.name, stop)
        if not np.array_equal(values.bits, found.bits):
            raise MismatchError(
                f"{job.dtype} values differ from the base model's",
                where=f"{source.label}, tensor {job.name!r}",
                expected="the same counts or positions everywhere, since they cannot be merged",
                hint=f"Say which to take: tensors: [{{match: {json.dumps(job.name)}, take: base_model}}]",
            )
