"""Integers that must be the same in all checkpoints, compared before a merge begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import MismatchError
from hub_magmax.planning.fitting.globs import rules_for
from hub_magmax.planning.plan import EXACT_REASON, Plan
from hub_magmax.text import listed, shown

#: Bytes that a plan reads of each checkpoint at most; what is larger is compared while it is copied.
_MOST_BYTES = 8_000_000


def check_integers(plan: Plan, sources: Mapping[str, TensorSource]) -> None:
    """Raise MismatchError for all tensors of integers that differ, with rules that settle them.

    Checkpoints on a network are compared while they are copied.
    """
    differing = [] if plan.num_remote else list(_differing(plan, sources))
    if not differing:
        return
    names = list(dict.fromkeys(name for name, _ in differing))
    labels = list(dict.fromkeys(label for _, label in differing))
    every_name = {name for source in sources.values() for name in source.index.tensors}
    rules = ", ".join(rules_for(names, every_name, "base_model"))
    raise MismatchError(
        f"integers differ from the base model's: {listed([shown(name) for name in names], 3)}",
        where=listed(labels, 5),
        expected="the same counts or positions everywhere, since they cannot be merged",
        hint=f"Say which to take, the base model's or a task's: tensors: [{rules}]",
    )


def _differing(plan: Plan, sources: Mapping[str, TensorSource]) -> Iterator[tuple[str, str]]:
    """Yield the tensors that differ from the base model's, with the label of the checkpoint."""
    left = _MOST_BYTES
    for job in (job for job in plan.jobs if job.reason == EXACT_REASON):
        left -= job.num_bytes
        if left < 0:
            return
        values = sources["base_model"].read_stored(job.name, 0, job.num_elements).bits.copy()
        for source in (sources[name] for name in plan.lock.tasks if name not in job.unread):
            if not np.array_equal(values, source.read_stored(job.name, 0, job.num_elements).bits):
                yield job.name, source.label
