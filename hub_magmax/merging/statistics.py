"""Means of running statistics over checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np

from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.dtypes import rounded_once, torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.profile import Clock
from hub_magmax.planning.plan import TensorJob


def mean_chunks(
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    shares: tuple[float, ...],
    chunk_elements: int,
    clock: Clock,
) -> Iterator[Stored]:
    """Yield the weighted mean of a tensor over the sources, summed in float64, in the output's dtype.

    Args:
        job: The tensor.
        sources: The base model and the tasks, in order.
        shares: A weight for each source, non-negative, summing to 1; without one a source is not read.
        chunk_elements: Elements of a chunk.
        clock: Told when values are read.

    Raises:
        NonFiniteError: At a NaN or an infinity.
    """
    counted = [(source, share) for source, share in zip(sources.values(), shares, strict=True) if share]
    for start in range(0, job.num_elements, chunk_elements):
        stop = min(start + chunk_elements, job.num_elements)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for source, share in counted:
            with clock.spend("read"):
                values = source.read_stored(job.name, start, stop).tensor.double()
            source.release(job.name, stop)
            _check_finite(job, source, start, values)
            total += share * values
        yield Stored.of(rounded_once(total, torch_dtype(job.dtype)))


def _check_finite(job: TensorJob, source: TensorSource, start: int, values: torch.Tensor) -> None:
    bad = np.flatnonzero(~np.isfinite(values.numpy()))
    if not len(bad):
        return
    first = int(bad[0])
    raise NonFiniteError(
        f"element {start + first:,} is {float(values[first])}",
        where=tensor_place(source, source.index.tensors[job.name], start + first),
        expected="finite statistics",
        hint="The checkpoint is damaged or its training diverged; use an earlier one. If it is meant, copy "
        f"it: tensors: [{{match: {json.dumps(job.name)}, take: base_model}}]",
    )
