"""Plans of selections: which task each element is taken from, in place of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from hub_magmax.checkpoints.index import SELECTION_SUFFIX
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.plan import Plan, Shard
from hub_magmax.planning.reads import bytes_looked_at, bytes_read


def plan_selection(plan: Plan, sources: Mapping[str, TensorSource]) -> Plan:
    """Return what a selection takes of the plan of whole weights: merged tensors alone, each parameter once.

    Args:
        plan: Of the weights.
        sources: The base model and the tasks, by name.
    """
    merged = {job.name for job in plan.merged}
    shards = tuple(
        Shard(
            shard.file.removesuffix(".safetensors") + SELECTION_SUFFIX,
            tuple(job for job in shard.jobs if job.name in merged),
        )
        for shard in plan.shards
    )
    made = replace(plan, shards=shards)
    return replace(made, bytes_in=bytes_read(made.jobs, sources) + bytes_looked_at(made, sources))


def selection_bytes(plan: Plan) -> int:
    """Return about the most that the files of a selection take: as if tasks won alike, and never agreed."""
    elements = sum(job.num_elements for job in plan.merged)
    return math.ceil(elements * math.log2(max(2, len(plan.lock.tasks))) / 8)


def written_bytes(plan: Plan) -> int:
    """Return the bytes of weights that a plan writes; of a selection, about the most that it takes."""
    return selection_bytes(plan) if plan.recipe.output.is_selection else plan.bytes_out
