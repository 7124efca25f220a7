"""Factors that restore the sum of a tensor's magnitudes, where a method keeps some of its elements."""

import math
from typing import TYPE_CHECKING

from hub_magmax.kernels.lazy_imports import np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float32, Float64

    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.methods.chunks import Chunks

#: Elements whose magnitudes are added up at a time.
_BLOCK = 2**14


def norm_factors(
    chunks: "Chunks",
    least: "Float32[np.ndarray, ' tasks']",
    most: "Float32[np.ndarray, ' tasks']",
) -> "Float64[np.ndarray, ' tasks']":
    """Return by task the sum of all magnitudes over that of those from `least` to `most`.

    1 where nothing is kept. Sums are in float64 and in a fixed order, the same for any chunks and threads.
    """
    from hub_magmax.kernels.row_ranks import magnitude_sums

    def sums(part: "Iterator[tuple[int, RawChunk]]") -> "list[np.ndarray]":
        found = []
        for _, chunk in part:
            vectors = chunk.task_vectors()
            for start in range(0, vectors.shape[1], _BLOCK):
                block = vectors[:, start : start + _BLOCK]
                magnitudes = np.abs(block)
                is_kept = (magnitudes >= least[:, None]) & (magnitudes <= most[:, None])
                found.append(magnitude_sums(block, is_kept.astype(np.float32), block.shape[1])[..., 0])
        return found

    shares = chunks.map(sums, multiple_of=_BLOCK)
    blocks = [one for share in shares for one in share]
    whole, kept = np.moveaxis(np.array(blocks), 0, -1) if blocks else np.zeros((2, chunks.num_tasks, 0))
    return ratios(whole, kept)


def ratios(
    whole: "Float64[np.ndarray, 'tasks parts']", kept: "Float64[np.ndarray, 'tasks parts']"
) -> "Float64[np.ndarray, ' tasks']":
    """Return by task the sum of one array over that of another; 1 where that is 0."""

    def added(parts: "np.ndarray") -> "Sequence[float]":
        return [math.fsum(row) for row in parts.tolist()]

    pairs = zip(added(whole), added(kept), strict=True)
    return np.array([one / other if other else 1.0 for one, other in pairs])
