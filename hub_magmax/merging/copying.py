"""Tensors without a task vector: copied from one checkpoint, checked for equality, or averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import MismatchError, NonFiniteError
from hub_magmax.kernels.dtypes import rounded_once, torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.profile import Clock
from hub_magmax.planning.plan import EXACT_REASON, MEAN, TensorJob
from hub_magmax.text import rule_text


def unmerged_chunks(
    job: TensorJob,
    sources: Mapping[str, TensorSource],
    shares: tuple[float, ...],
    chunk_elements: int,
    clock: Clock | None = None,
) -> Iterator[Stored]:
    """Yield the values of a tensor that is copied, or a mean of statistics, in the output's dtype.

    A NaN or an infinity is copied like any other value. A factor of the job that is not 1 multiplies them.

    Args:
        job: The tensor.
        sources: The base model and the tasks, in order.
        shares: The weight of each in a mean of statistics.
        chunk_elements: Elements of a chunk.
        clock: Told when values are read.

    Raises:
        MismatchError: If values that cannot be merged differ between the checkpoints.
        NonFiniteError: If a finite value is too large for the output's dtype, or a statistic is not finite.
    """
    clock = clock or Clock()
    if job.source == MEAN:
        yield from mean_chunks(job, sources, shares, chunk_elements, clock)
        return
    source = sources[job.source]
    others = [other for name, other in sources.items() if name not in (job.source, *job.unread)]
    for start in range(0, job.num_elements, chunk_elements):
        stop = min(start + chunk_elements, job.num_elements)
        with clock.spend("read"):
            found = source.read_stored(job.tensor, start, stop)
        source.release(job.tensor, stop)
        if job.reason == EXACT_REASON:
            _check_equal(job, start, found, others)
        if found.dtype == job.dtype and job.factor == 1:
            yield found
        else:
            # In float64, so that the product is rounded once, to the output's dtype.
            values = found.tensor if job.factor == 1 else found.tensor.to(torch.float64) * job.factor
            yield _cast(job, source, start, values)


def _cast(job: TensorJob, source: TensorSource, start: int, values: torch.Tensor) -> Stored:
    cast = rounded_once(values, torch_dtype(job.dtype))
    found = Stored.of(cast)
    if not found.is_finite():
        overflown = torch.nonzero(torch.isfinite(values) & ~torch.isfinite(cast))
        if len(overflown):
            element = int(overflown[0])
            raise NonFiniteError(
                f"element {start + element:,} is {float(values[element])}",
                where=tensor_place(source, source.index.tensors[job.tensor], start + element),
                expected=f"numbers that {str(cast.dtype).removeprefix('torch.')} can hold",
                hint="Choose a wider output.dtype" + (", or a smaller factor." if job.factor != 1 else "."),
            )
    return found


def _check_equal(job: TensorJob, start: int, values: Stored, others: Sequence[TensorSource]) -> None:
    stop = start + len(values.bits)
    for source in others:
        found = source.read_stored(job.tensor, start, stop)
        source.release(job.tensor, stop)
        if not np.array_equal(values.bits, found.bits):
            raise MismatchError(
                f"{job.dtype} values differ from the base model's",
                where=f"{source.label}, tensor {job.name!r}",
                expected="the same counts or positions everywhere, since they cannot be merged",
                hint=f"Say which to take: tensors: [{rule_text(job.name)}]",
            )


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
        f"it: tensors: [{rule_text(job.name)}]",
    )
