"""Elements kept at random with a probability that their rank in a row decides, in torch.

Magnitudes of a row are ranked from the smallest, 0, to the largest; equal ones share the mean of their ranks,
so twice a rank is a whole number. A table says for each of these which draws keep an element, and what a kept
one is multiplied by.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from hub_magmax.kernels.lazy_imports import Array, torch


class RankTable(NamedTuple):
    """Numbers by task and by twice the rank, from 0 to 2 (n - 1) in rows of n elements.

    Attributes:
        most: uint32, the largest draw that keeps an element.
        factors: float32, what a kept element is multiplied by.
    """

    most: Array
    factors: Array


#: Sums of a row's magnitudes that are formed beside each other, each of every sixteenth element.
LANES = 16


def magnitude_sums(
    vectors: Float32[np.ndarray, "tasks elements"],
    factors: Float32[np.ndarray, "tasks elements"],
    length: int,
) -> Float64[np.ndarray, "2 tasks rows"]:
    """Return the sums of each row's magnitudes, and of these times their factors, in float64.

    Sums are of every sixteenth element, one after the other, and then of these, the first one first.

    Args:
        vectors: Task vectors, of whole rows.
        factors: What each element is multiplied by: 0 or 1.
        length: Of a row.
    """
    shape = len(vectors), vectors.shape[1] // length, -(-length // LANES) * LANES
    found = np.zeros((2, *shape))
    magnitudes = np.abs(vectors.reshape(*shape[:2], length))
    found[0, ..., :length] = magnitudes
    found[1, ..., :length] = magnitudes * factors.reshape(magnitudes.shape)
    lanes = found.reshape(2, *shape[:2], -1, LANES).cumsum(axis=-2)[..., -1, :]
    sums: np.ndarray = lanes.cumsum(axis=-1)[..., -1]
    return sums


def factors_by_rank(
    vectors: Float32[torch.Tensor, "tasks elements"],
    draws: Int64[torch.Tensor, "tasks elements"],
    most: Int64[torch.Tensor, "tasks ranks"],
    factors: Float32[torch.Tensor, "tasks ranks"],
) -> Float32[torch.Tensor, "tasks elements"]:
    """Return what each element is multiplied by: 0 where it is not kept.

    Args:
        vectors: Task vectors, of whole rows.
        draws: Uniform numbers below 2**32.
        most, factors: As in `RankTable`.
    """
    length = (most.shape[1] + 1) // 2
    magnitudes = vectors.abs().reshape(len(vectors), -1, length)
    rising, order = magnitudes.sort(dim=-1)
    place = torch.arange(length, device=vectors.device).expand(rising.shape)
    is_new = torch.ones_like(rising, dtype=torch.bool)
    is_new[..., 1:] = rising[..., 1:] != rising[..., :-1]
    first = torch.where(is_new, place, 0).cummax(dim=-1).values
    is_last = torch.ones_like(is_new)
    is_last[..., :-1] = is_new[..., 1:]
    last = torch.where(is_last, place, length - 1).flip(-1).cummin(dim=-1).values.flip(-1)
    ranks = torch.empty_like(order).scatter_(-1, order, first + last).reshape(vectors.shape)
    return torch.where(draws <= most.gather(1, ranks), factors.gather(1, ranks), 0.0)
