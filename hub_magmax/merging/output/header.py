"""The safetensors header of an output file, with the provenance of the merge."""

from __future__ import annotations

import json
import struct
from typing import Any

from hub_magmax.planning.plan import Plan, Shard


def metadata_of(plan: Plan) -> dict[str, str]:
    """Provenance stored in every shard, beside what its source has there: the same on any machine."""
    sources = {name: source.label for name, source in plan.lock.every_source.items()}
    merge: dict[str, Any] = {
        "sources": sources,
        "method": dict(plan.lock.method),
        "preference": dict(plan.lock.preference.weights),
        "seed": plan.lock.seed,
        "lock": plan.lock.digest,
    }
    if rules := plan.lock.value_rules:
        merge["tensors"] = [*rules]
    return {"format": "pt", **plan.metadata, "hub_magmax": json.dumps(merge, ensure_ascii=False)}


def shard_header(plan: Plan, shard: Shard) -> bytes:
    """Return the safetensors header of an output file, known before any tensor is.

    It is padded so that the data begin at a multiple of 64 bytes, as memory does: between places that
    differ by a few bytes some processors copy at a fifth of the speed, see `source.RowMemory`.
    """
    entries: dict[str, Any] = {"__metadata__": metadata_of(plan)}
    position = 0
    for job in shard.jobs:
        offsets = [position, position + job.num_bytes]
        entries[job.name] = {"dtype": job.dtype, "shape": list(job.shape), "data_offsets": offsets}
        position += job.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text
