"""Resamples of large samples by their means and largest values, without sorting or copying each resample.

How often each example was drawn tells both: the mean is a weighted sum, and the largest values are those of
the few examples that are largest in the sample, each as often as it was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.evaluation.intervals import resampled_ranks

_Values = Float64[np.ndarray, " examples"]
_Counts = Int64[np.ndarray, "resamples examples"]


@dataclass(frozen=True)
class Resamples:
    """Some resamples of one sample.

    Attributes:
        size: Of the sample, and of each resample.
        means: Of the resamples.
        largest: Values of each, falling.
    """

    size: int
    means: Float64[np.ndarray, " resamples"]
    largest: Float64[np.ndarray, "resamples largest"]


class Falling:
    """A sample with the order of its values, the largest first.

    Args:
        values: Finite.
        share: Of the values that are the largest ones; one more of them is told.
    """

    def __init__(self, values: _Values, share: float = 1.0) -> None:
        self._values, self._order = values, np.argsort(-values, kind="stable")
        self._falling = values[self._order]
        self._num_largest = min(math.ceil(round(share * len(values), 9)) + 1, len(values))

    @property
    def itself(self) -> Resamples:
        """The sample as the only resample: each value once."""
        return self.drawn(np.ones((1, len(self._values)), np.int64))

    def drawn(self, counts: _Counts) -> Resamples:
        """Return resamples, given how often each value is in each."""
        size = len(self._values)
        # No product of BLAS, whose sums depend on its threads.
        means = np.einsum("re,e->r", counts, self._values) / size
        return Resamples(size, means, np.stack([self._largest(row) for row in counts]))

    def _largest(self, counts: Int64[np.ndarray, " examples"]) -> _Values:
        number = self._num_largest
        # Ten standard deviations more than are needed on average.
        near = number + 10 + math.ceil(10 * math.sqrt(number))
        times = counts[self._order[:near]]
        if times.sum() < number:
            near, times = len(counts), counts[self._order]
        found: _Values = np.repeat(self._falling[:near], times)[:number]
        return found


def resampled(
    samples: Sequence[_Values], seed: int, num_resamples: int, share: float
) -> Iterator[list[Resamples]]:
    """Yield some resamples of each sample at a time, drawing the same examples of all.

    Args:
        samples: Of one size.
        seed: Of the draws.
        num_resamples: In all.
        share: Of the values that are the largest ones; one more of them is told.
    """
    size = len(samples[0])
    falling = [Falling(values, share) for values in samples]
    for ranks in resampled_ranks(size, seed, num_resamples):
        rows = len(ranks)
        places = ranks + size * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size)
        yield [own.drawn(counts) for own in falling]
