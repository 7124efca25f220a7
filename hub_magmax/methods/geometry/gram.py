"""Gram matrices: inner products of a tensor's vectors, and weighted sums of vectors that follow from them.

The vectors of a tensor are the base model's values and the task vectors. What a method computes from lengths
and angles is a weighted sum of these, whose weights need their inner products and nothing else: one pass
gives the products, and a second one adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.ops import AFFINE_SUM_OF_EACH
from hub_magmax.kernels.products import BLOCK, total
from hub_magmax.methods.geometry import Each, Of
from hub_magmax.methods.rules import Rule, affine_rule

if TYPE_CHECKING:
    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.kernels.lazy_imports import Array
    from hub_magmax.methods.chunks import Chunks

Products = Float64[np.ndarray, "*each vectors vectors"]
Weights = Float64[np.ndarray, "*each vectors"]

#: A square length that is this share of what it was before earlier axes were taken out is rounding.
_ROUNDED = 2.0**-50
#: The base model's values have no part in a change that is nearer to none than rounding.
_NONE = 2.0**-46

#: Rows of a tensor whose columns are added up at a time, and elements of rows that are widened at a time.
_ROWS, _AT_ONCE = 16, 2**15


@dataclass(frozen=True)
class Gram:
    """Inner products of one tensor's vectors, the base model's values first, then the task vectors.

    Attributes:
        chunks: The tensor.
        shape: Its own.
        each: What has a vector of its own, and weights of its own.
    """

    chunks: Chunks
    shape: tuple[int, ...]
    each: Each = "tensor"

    def products(self) -> Products:
        """Return the inner products, by one pass; "vectors vectors", or as many for each row or column.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        if self._is_whole:
            return self._whole(with_base=True)
        by_row = self.each == "row"
        work, num_rows = (self._of_rows, 1) if by_row else (self._of_columns, _ROWS)
        (found,) = self.chunks.map(work, multiple_of=num_rows * self._row_elements)
        return found

    def task_products(self) -> Products:
        """Return the inner products of the task vectors alone: less work than `products`, and the same bits.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        return self._whole(with_base=False) if self._is_whole else self.products()[..., 1:, 1:]

    def rule(self, weights: Weights) -> Rule:
        """Return the rule that adds the vectors times their weights.

        Args:
            weights: "vectors", or of each row or column, the base model's first.
        """
        if weights.ndim == 1:
            return affine_rule(weights)
        narrow = weights.astype(np.float32)
        return Rule(AFFINE_SUM_OF_EACH, per_element=partial(self._weights_of, narrow))

    @property
    def _is_whole(self) -> bool:
        return self.each == "tensor" or len(self.shape) < 2

    @property
    def _row_elements(self) -> int:
        return math.prod(self.shape[1:])

    def _whole(self, *, with_base: bool) -> Products:
        work = partial(self._blocks, with_base=with_base)
        shares = self.chunks.map(work, multiple_of=BLOCK)
        return total((part for share in shares for part in share), with_base + self.chunks.num_tasks)

    def _blocks(self, part: Iterator[tuple[int, RawChunk]], *, with_base: bool) -> list[np.ndarray]:
        return [self.chunks.backend.products(chunk, with_base=with_base) for _, chunk in part]

    def _of_rows(self, part: Iterator[tuple[int, RawChunk]]) -> Products:
        # In memory of their own: small arrays that are kept among large ones that are not scatter memory.
        found, start = self._zeros(self.shape[0]), 0
        for rows in self._whole_rows(part):
            found[start : start + rows.shape[1]] = _products(rows, 1)
            start += rows.shape[1]
        return found

    def _of_columns(self, part: Iterator[tuple[int, RawChunk]]) -> Products:
        found = self._zeros(self._row_elements)
        for rows in self._whole_rows(part, _ROWS):
            found += _products(rows, 0)
        return found

    def _zeros(self, count: int) -> Products:
        num_vectors = 1 + self.chunks.num_tasks
        return np.zeros((count, num_vectors, num_vectors))

    def _whole_rows(
        self, part: Iterator[tuple[int, RawChunk]], at_once: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield rows of all vectors in float64, some at a time: as many as stay in the caches, or so many."""
        at_once = at_once or max(1, _AT_ONCE // self._row_elements)
        for _, chunk in part:
            vectors = chunk.vectors()
            rows = vectors.reshape(len(vectors), -1, self._row_elements)
            for first in range(0, rows.shape[1], at_once):
                yield rows[:, first : first + at_once].astype(np.float64)

    def _weights_of(self, weights: np.ndarray, start: int, count: int) -> tuple[Array, ...]:
        places = np.arange(start, start + count)
        own = places // self._row_elements if self.each == "row" else places % self._row_elements
        return (weights[own],)


def _products(rows: np.ndarray, axis: int) -> Products:
    """Return the inner products of "vectors rows columns" along rows (0) or columns (1), in a fixed order."""
    num_vectors = len(rows)
    found = np.empty((rows.shape[2 - axis], num_vectors, num_vectors))
    for one in range(num_vectors):
        for other in range(one, num_vectors):
            sums = _folded(np.moveaxis(rows[one] * rows[other], axis, 0))
            found[:, one, other] = found[:, other, one] = sums
    return found


def _folded(values: np.ndarray) -> Any:
    """Add up along the first axis, in place: the last half to the first one, again and again."""
    while (size := len(values)) > 1:
        half = size // 2
        values[:half] += values[size - half :]
        values = values[: size - half]
    return values[0]


def coordinates(products: Products) -> Float64[np.ndarray, "*each vectors axes"]:
    """Return vectors of a few numbers with the same inner products, by Cholesky's decomposition.

    What is computed from their lengths and angles is what the tensor's own vectors would give, and a small
    task vector beside large values of the base model loses no accuracy. Vectors that depend on earlier ones
    have no axis of their own.
    """
    num_vectors = products.shape[-1]
    lower = np.zeros_like(products)
    for axis in range(num_vectors):
        left = products[..., axis:, axis].copy()
        for before in range(axis):
            left -= lower[..., axis:, before] * lower[..., axis, before, None]
        pivot, size = left[..., :1], products[..., axis, axis, None]
        has_axis = pivot > _ROUNDED * num_vectors * size
        lower[..., axis:, axis] = np.where(has_axis, left / np.sqrt(np.where(has_axis, pivot, 1.0)), 0.0)
    return lower


@dataclass(frozen=True)
class Vectors:
    """Some vectors of a tensor, or of each row or column, as weighted sums of the vectors of its Gram matrix.

    Attributes:
        places: Coordinates, along the last axis.
        weights: Of the Gram matrix's vectors, along the last axis.
    """

    places: Float64[np.ndarray, "*each axes"]
    weights: Weights

    def __add__(self, other: Vectors) -> Vectors:
        return Vectors(self.places + other.places, self.weights + other.weights)

    def __sub__(self, other: Vectors) -> Vectors:
        return Vectors(self.places - other.places, self.weights - other.weights)

    def times(self, number: float | np.ndarray) -> Vectors:
        """Return the vectors times a number, or times a number for each of them."""
        factor = np.asarray(number, np.float64)[..., None]
        return Vectors(self.places * factor, self.weights * factor)

    def dot(self, other: Vectors) -> np.ndarray:
        """Return the inner products with other vectors."""
        return added(self.places * other.places)

    @property
    def length(self) -> np.ndarray:
        """Their lengths."""
        found: np.ndarray = np.sqrt(self.dot(self))
        return found

    @property
    def unit(self) -> Vectors:
        """The vectors divided by their lengths; those without a length stay zero."""
        length = self.length
        return self.times(np.where(length > 0, 1 / np.where(length > 0, length, 1.0), 0.0))

    def angle(self, other: Vectors) -> np.ndarray:
        """Return the angle with other vectors, all of length 1: accurate for small and for flat ones."""
        found: np.ndarray = 2 * np.arctan2((self - other).length, (self + other).length)
        return found


def added(values: np.ndarray) -> np.ndarray:
    """Return the sum along the last axis, added in order."""
    found = np.zeros(values.shape[:-1])
    for place in range(values.shape[-1]):
        found = found + values[..., place]
    return found


def vectors_of(gram: Gram, of: Of) -> tuple[Vectors, ...]:
    """Return the base model's vector and each task's, of whole models or of task vectors.

    The base model's own task vector is zero.

    Args:
        gram: Of the tensor, which is read once.
        of: What the vectors are of.

    Raises:
        RecipeError: If the models' are asked for and the base model's values are not known.
    """
    if of == "models" and not gram.chunks.has_base:
        raise RecipeError(
            "lengths and angles of whole models need the base model's values",
            expected="base=..., a tensor like one task vector",
        )
    products = gram.products()
    places, weights = coordinates(products), np.broadcast_to(np.eye(products.shape[-1]), products.shape)
    base, *tasks = (Vectors(places[..., n, :], weights[..., n, :]) for n in range(products.shape[-1]))
    nothing = base.times(0.0)
    if of == "task_vectors":
        return (nothing, *tasks)
    return (base, *(base + task for task in tasks))


def rule_of(gram: Gram, merged: Vectors, of: Of) -> Rule:
    """Return the rule that gives a merged vector: of a whole model, or a task vector.

    Args:
        gram: Of the tensor.
        merged: Of the tensor, or of each row or column.
        of: What it is.
    """
    weights = merged.weights.copy()
    if of == "models":
        weights[..., 0] -= 1
        weights[np.abs(weights[..., 0]) < _NONE, 0] = 0
    return gram.rule(weights)
