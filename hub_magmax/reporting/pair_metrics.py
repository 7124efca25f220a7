"""Metrics of pairs of tasks that may tell how well two tasks merge, in one table.

All but those of subspaces are functions of three numbers: the squared lengths of two vectors, and their inner
product. Definitions are those of the authors' code, but for two slips, whose published form is measured
beside the right one: `subspace_overlap` was divided by k, so that it could not exceed 1/√k, and gradients
were of each model on examples of its own, which compares two things at once.

Source: Zhou, Zhao, Yu, Rodolà: Demystifying Mergeability (arXiv:2601.22285).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np

from hub_magmax.evaluation.tables import Table

#: Singular values of a matrix that are compared.
NUM_STRENGTHS = 100

#: What a metric is a function of. The examples' gradients are the same for both models, or each model's own.
Part = Literal[
    "task vectors",
    "tensors",
    "subspaces",
    "activations",
    "gradients",
    "input gradients",
    "gradients on own examples",
    "input gradients on own examples",
]


class Gram(NamedTuple):
    """Squared lengths of two vectors, and their inner product; arrays hold many pairs."""

    one: np.ndarray
    other: np.ndarray
    product: np.ndarray

    @classmethod
    def of(cls, products: np.ndarray) -> Gram:
        """Return every pair of some vectors, "... vectors vectors", by their inner products."""
        squares = np.diagonal(products, axis1=-2, axis2=-1)
        other = np.broadcast_to(squares[..., None, :], products.shape)
        return cls(np.swapaxes(other, -1, -2), other, products)

    @property
    def strengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Singular values of the matrix whose two rows the vectors are, the larger first."""
        middle = (self.one + self.other) / 2
        larger = middle + np.hypot((self.one - self.other) / 2, self.product)
        # The smaller one by the determinant: a difference of two near numbers would lose it.
        smaller = _ratio(np.maximum(self.one * self.other - self.product**2, 0), larger)
        return np.sqrt(larger), np.sqrt(smaller)


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Divide; 0 where the divisor is 0."""
    upper = np.asarray(upper, np.float64)
    return np.asarray(np.divide(upper, lower, out=np.zeros_like(upper), where=np.asarray(lower) > 0))


def cosine(pair: Gram) -> np.ndarray:
    """Return the cosine; 0 where one of the vectors is zero."""
    return np.asarray(np.clip(_ratio(pair.product, np.sqrt(pair.one * pair.other)), -1, 1))


def distance(pair: Gram) -> np.ndarray:
    """Return the length of the difference."""
    return np.asarray(np.sqrt(np.maximum(pair.one + pair.other - 2 * pair.product, 0)))


def product(pair: Gram) -> np.ndarray:
    """Return the inner product."""
    return pair.product


def angle(pair: Gram) -> np.ndarray:
    """Return the angle in degrees; 90 where one of the vectors is zero."""
    return np.asarray(np.degrees(np.arccos(cosine(pair))))


def magnitude_ratio(pair: Gram) -> np.ndarray:
    """Return the shorter length over the longer one."""
    return np.asarray(np.sqrt(_ratio(np.minimum(pair.one, pair.other), np.maximum(pair.one, pair.other))))


def effective_rank(pair: Gram) -> np.ndarray:
    """Return the exponential of the entropy of the two singular values' shares: from 1 to 2."""
    strengths = np.stack(pair.strengths)
    shares = _ratio(strengths, np.broadcast_to(strengths.sum(0), strengths.shape))
    return np.asarray(np.exp(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(0)))


def rank_score(rank: np.ndarray) -> np.ndarray:
    """Return 2 less an effective rank, from 0 to 1."""
    return np.asarray(np.clip(2 - rank, 0, 1))


def stable_rank(pair: Gram) -> np.ndarray:
    """Return the squared sum of the singular values over the sum of their squares: from 1 to 2."""
    larger, smaller = pair.strengths
    return _ratio((larger + smaller) ** 2, larger**2 + smaller**2)


def spectral_gap(pair: Gram) -> np.ndarray:
    """Return the difference of the singular values over the larger one."""
    larger, smaller = pair.strengths
    return _ratio(larger - smaller, larger)


def singular_value_ratio(pair: Gram) -> np.ndarray:
    """Return the smaller singular value over the larger one."""
    larger, smaller = pair.strengths
    return _ratio(smaller, larger)


class Side(NamedTuple):
    """Directions of one task's change to a matrix, in columns, as many as its rank and the option allow.

    Attributes:
        strengths: Singular values, the largest first, at most `NUM_STRENGTHS`.
        left, right: Of the strongest directions.
        weakest: On the right, of the weakest directions that are there.
    """

    strengths: np.ndarray
    left: np.ndarray
    right: np.ndarray
    weakest: np.ndarray

    @property
    def num_directions(self) -> int:
        return int(self.right.shape[1])


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    """Return the sum of the squared cosines of the angles between two subspaces."""
    return float(((one.T @ other) ** 2).sum())


def _strengths_overlap(one: Side, other: Side, count: int) -> float:
    size = min(len(one.strengths), len(other.strengths))
    a, b = one.strengths[:size], other.strengths[:size]
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _strongest(one: Side, other: Side, count: int) -> float:
    return _shared(one.right[:, :count], other.right[:, :count])


def _weakest(one: Side, other: Side, count: int) -> float:
    return _shared(one.weakest[:, -count:], other.weakest[:, -count:])


def _left(one: Side, other: Side, count: int) -> float:
    return _shared(one.left[:, :count], other.left[:, :count])


#: By name, functions of two sides and the number of directions of each; a mean over the matrices is told.
SUBSPACES: Mapping[str, Callable[[Side, Side, int], float]] = {
    "singular_value_overlap": _strengths_overlap,
    "subspace_overlap": lambda one, other, count: float(np.sqrt(_left(one, other, count) / count)),
    "right_subspace_overlap_top_k": lambda *pair: float(np.sqrt(_strongest(*pair) / pair[-1])),
    "right_subspace_overlap_bottom_k": lambda *pair: float(np.sqrt(_weakest(*pair) / pair[-1])),
    "interaction_matrix_overlap_top_k": lambda *pair: _strongest(*pair) / pair[-1],
    "interaction_matrix_overlap_bottom_k": lambda *pair: _weakest(*pair) / pair[-1],
    "subspace_overlap_as_published": lambda one, other, count: float(
        np.sqrt(_left(one, other, count)) / count
    ),
}


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: As in the authors' code.
        part: What it is a function of.
        function: Takes what is known of that part: pairs as `Gram`; of "tensors" the layerwise effective
            rank; of "subspaces" means over matrices by name. Returns an array, "tasks tasks".
    """

    name: str
    part: Part
    function: Callable[[Any], np.ndarray]

    @property
    def is_as_published(self) -> bool:
        """Whether it is a slip that is measured beside the right form, and no predictor uses it."""
        return self.name.endswith(_AS_PUBLISHED)


_AS_PUBLISHED = "_as_published"


def _of_gradients(part: Part, own: Part, name: str) -> tuple[Metric, ...]:
    kinds = (("cosine_similarity", cosine), ("l2_distance", distance), ("dot_product", product))
    return tuple(
        Metric(f"{name}_{kind}{ending}", of, function)
        for of, ending in ((part, ""), (own, _AS_PUBLISHED))
        for kind, function in kinds
    )


#: Every metric, the 28 of the paper and the published forms of seven of them.
METRICS: tuple[Metric, ...] = (
    Metric("task_vector_cosine_similarity", "task vectors", cosine),
    Metric("task_vector_l2_distance", "task vectors", distance),
    Metric("task_vector_dot_product", "task vectors", product),
    Metric("weight_space_angle", "task vectors", angle),
    Metric("task_vector_magnitude_ratio", "task vectors", magnitude_ratio),
    Metric("effective_rank", "task vectors", effective_rank),
    Metric(
        "effective_rank_mergeability_score", "task vectors", lambda pair: rank_score(effective_rank(pair))
    ),
    Metric("stable_rank", "task vectors", stable_rank),
    Metric("spectral_gap", "task vectors", spectral_gap),
    Metric("singular_value_ratio", "task vectors", singular_value_ratio),
    Metric("layerwise_effective_rank", "tensors", np.asarray),
    Metric("layerwise_effective_rank_mergeability_score", "tensors", rank_score),
    *(Metric(name, "subspaces", itemgetter(name)) for name in SUBSPACES),
    Metric("activation_l2_distance", "activations", distance),
    Metric("activation_cosine_similarity", "activations", cosine),
    Metric("activation_magnitude_ratio", "activations", magnitude_ratio),
    Metric("activation_dot_product", "activations", product),
    *_of_gradients("gradients", "gradients on own examples", "encoder_gradient"),
    *_of_gradients("input gradients", "input gradients on own examples", "input_gradient"),
)


@dataclass(frozen=True)
class MetricValues:
    """A metric of every pair of tasks, in the order of the tasks: first and second, first and third, …"""

    name: str
    part: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class PairMetrics:
    """What was measured of pairs of tasks.

    Attributes:
        metrics: In the order of `METRICS`.
        rank: Directions of each matrix that were compared at most.
        num_elements: Elements of each task vector, all of which were read.
        num_matrices: Of which directions were compared.
        num_examples: Of each task, on which models ran.
        seconds: That it took.
    """

    metrics: tuple[MetricValues, ...]
    rank: int
    num_elements: int
    num_matrices: int
    num_examples: int
    seconds: float

    def pairs(self, tasks: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
        """Return by pair of tasks every metric by its name."""
        return {
            (tasks[one], tasks[other]): {found.name: found.values[place] for found in self.metrics}
            for place, (one, other) in enumerate(combinations(range(len(tasks)), 2))
        }

    def as_table(self, tasks: Sequence[str]) -> Table:
        """Return a row for each metric: its mean over pairs, and the pairs at either end."""
        names = [" and ".join(pair) for pair in self.pairs(tasks)]
        rows = []
        for found in self.metrics:
            low, high = int(np.argmin(found.values)), int(np.argmax(found.values))
            ends = (found.values[low], names[low], found.values[high], names[high])
            rows.append((found.name, float(np.mean(found.values)), *ends))
        head = ("metric of pairs", "mean", "lowest", "pair with the lowest", "highest", "with the highest")
        return Table(head, tuple(rows))


def evaluate(known: Mapping[Part, Any], num_tasks: int) -> tuple[MetricValues, ...]:
    """Return all metrics of parts that are known, of every pair of tasks."""
    above = np.triu_indices(num_tasks, 1)
    return tuple(
        MetricValues(metric.name, metric.part, tuple(metric.function(known[metric.part])[above].tolist()))
        for metric in METRICS
        if metric.part in known
    )
