"""Bytes that a merge reads of its sources: of files on a disk, or by requests to the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hub_magmax import methods
from hub_magmax.checkpoints.data_statistics import DataStatistics
from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.plan import Plan, TensorJob


def bytes_read(jobs: Iterable[TensorJob], sources: Mapping[str, TensorSource]) -> int:
    """Return the bytes of stored tensors that making `jobs` one after the other reads.

    A stored tensor counts once for each job: the base model's, too, where adapters stand for checkpoints.

    Args:
        jobs: Of the output.
        sources: The base model and the tasks, by name, as jobs name their tensors.
    """
    base = sources["base_model"]
    merged = {name: source.merged_with(base) for name, source in sources.items()}
    return sum(info.num_bytes for job in jobs for _, info in _stored(job, merged if job.merged else sources))


def _stored(job: TensorJob, sources: Mapping[str, TensorSource]) -> set[tuple[object, TensorInfo]]:
    read = ((source, tensor) for name, source in sources.items() for tensor in job.inputs(name))
    return {stored for source, tensor in read for stored in source.stored(tensor)}


#: Looks at the whole model of methods that take several: at magnitudes, and at scores that these give.
_LOOKS = {"pcb": 2}


def bytes_looked_at(plan: Plan, sources: Mapping[str, TensorSource]) -> int:
    """Return the bytes that are read before the first tensor is merged, by methods that look at the model."""
    tasks = plan.lock.tasks
    return sum(
        _LOOKS.get(values.how.name, 1)
        * bytes_read((replace(job, unread=values.unread(tasks)) for job in plan.merged), sources)
        for values in plan.surveyed
        if methods.surveys_model(values.method)
    )


def bytes_of_statistics(plan: Plan, statistics: DataStatistics) -> int:
    """Return the bytes that are read of statistics of the tasks' data."""
    jobs = {job.tensor: job for job in plan.merged}
    return sum(
        source.index.tensors[name].num_bytes
        for name in plan.by_statistics
        for task, source in statistics.sources.items()
        if task not in jobs[name].unread
    )
