"""The last pass over one tensor: its chunks merged by the tensor's rule, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxtyping import Float32

from hub_magmax.kernels.backend import Merged
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.methods import Rule


def merged_vector(chunks: StoredChunks, rule: Rule) -> Float32[torch.Tensor, " elements"]:
    """Return the merged task vector of a tensor, not scaled; no part of it is read again.

    Raises:
        NonFiniteError: At the first NaN or infinity.
    """
    found = torch.empty(chunks.num_elements)
    for chunk in chunks.last_pass(rule.multiple_of):
        vectors, inputs = torch.from_numpy(chunk.task_vectors()), rule.of_chunk(chunk.start, chunk)
        part = rule.op(vectors, inputs, chunk.base.float() if rule.op.takes_base else None)
        found[chunk.start : chunk.start + chunk.num_elements] = part
    return found


def merged_chunks(
    chunks: StoredChunks, rule: Rule, dtype: str, scaling: float
) -> Iterator[tuple[int, Merged]]:
    """Yield the merged chunks of a tensor, and the index of the first element of each.

    Args:
        chunks: The stored tensor; no part of it is read again.
        rule: Of the tensor.
        dtype: Of the output, as safetensors calls it.
        scaling: Scaling coefficient.

    Raises:
        NonFiniteError: At the first NaN or infinity, of the inputs or of what they were merged into.
    """
    chunks = chunks if rule.takes_tasks else replace(chunks, tasks=())
    for chunk in chunks.last_pass(rule.multiple_of):
        # Not by a name, which would hold it while the next chunk is read, or other sites merge this one.
        yield chunk.start, _merged(chunks, chunk, rule, dtype, scaling)


def _merged(chunks: StoredChunks, chunk: RawChunk, rule: Rule, dtype: str, scaling: float) -> Merged:
    merged = chunks.backend.merge(rule.op, chunk, rule.of_chunk(chunk.start, chunk), dtype, scaling)
    chunks.check(merged.probe, chunk, merged.values)
    return merged
