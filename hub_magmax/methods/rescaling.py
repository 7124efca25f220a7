"""Factors that restore the sum of a tensor's magnitudes, where a method keeps some of its elements."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.lazy_imports import np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float32, Float64

    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.methods.chunks import Chunks

#: Elements whose magnitudes are added up at a time.
_BLOCK = 2**14


def restores_sums(method: Mapping[str, Any]) -> bool:
    """Say whether a method, as a lock describes it, multiplies each tensor by factors of its own."""
    return method.get("rescale") == "norm"


def norm_factors(
    chunks: "Chunks",
    least: "Float32[np.ndarray, ' tasks']",
    most: "Float32[np.ndarray, ' tasks']",
) -> "Float64[np.ndarray, ' tasks']":
    """Return by task the sum of all magnitudes over that of those from `least` to `most`.

    1 where nothing is kept. Sums are in float64 and in a fixed order, the same for any chunks and threads.

    Raises:
        NonFiniteError: If a task vector is not finite.
    """
    from hub_magmax.kernels.chunk import RawChunk

    backend = chunks.backend

    def sums(part: "Iterator[tuple[int, RawChunk]]") -> "list[np.ndarray]":
        found = []
        for _, chunk in part:
            room = partial(np.empty, (chunks.num_tasks, chunk.num_elements), np.float32)
            vectors = backend.task_vectors(chunk, room)
            for start in range(0, vectors.shape[1], _BLOCK):
                block = vectors[:, start : start + _BLOCK]
                magnitudes = np.abs(block)
                is_kept = (magnitudes >= least[:, None]) & (magnitudes <= most[:, None])
                part_sums = backend.magnitude_sums(
                    RawChunk.of_vectors(block), is_kept.astype(np.float32), block.shape[1]
                )
                found.append(part_sums[..., 0])
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


def restored(
    numbers: tuple[float, ...], factors: "Float64[np.ndarray, ' tasks']"
) -> "Float32[np.ndarray, ' tasks']":
    """Return numbers by task, times factors that restore sums.

    Raises:
        NonFiniteError: If float32 does not hold a product. `tensor_rule` adds the tensor's name.
    """
    products = np.array(numbers) * factors
    with np.errstate(over="ignore"):
        found: np.ndarray = products.astype(np.float32)
    if not np.isfinite(found).all():
        task = int(np.isfinite(found).argmin())
        raise NonFiniteError(
            f"what is kept of task {task} would have to be multiplied by {products[task]:.3g}",
            expected="numbers that float32 can hold",
            hint="Nearly all of the sum of its magnitudes is dropped. Keep the largest ones, or do not"
            " restore the sum: method.rescale: none.",
        )
    return found
