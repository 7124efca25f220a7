"""The merge of one tensor, once a method has looked at it: an operation and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import AFFINE_SUM, CHOSEN, PRECOMPUTED, WEIGHTED_SUM, Inputs, Op

if TYPE_CHECKING:
    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.kernels.lazy_imports import Array


def _nothing(start: int, count: int) -> tuple[Array, ...]:
    return ()


@dataclass(frozen=True)
class Rule:
    """The merge of one tensor, chunk by chunk, once its task vectors have been surveyed.

    Attributes:
        op: A built-in operation of `kernels.ops`, or `Op(function)` for one of your own.
        per_element: Takes the index of a chunk's first element and its length; returns the numbers that `op`
            takes for each element: tensors, or arrays, of that length, along their first axis.
        per_task: Tensors, or arrays, that are the same for all chunks.
        num_unaligned: Elements per task given at random by `algorithm-1`, or empty.
        duality_gap: Relative distance of `top-n` from the optimum, or None.
        per_chunk: Takes the index of a chunk's first element and the chunk, and returns what `per_element`
            would, for rules that look at values once more; None where `per_element` tells all.
        multiple_of: Elements that belong together: chunks hold a multiple of so many.
        takes_tasks: Whether `op` takes task vectors, beside its numbers; else they are not read again.
    """

    op: Op
    per_element: Callable[[int, int], tuple[Array, ...]] = _nothing
    per_task: tuple[Array, ...] = ()
    num_unaligned: tuple[int, ...] = ()
    duality_gap: float | None = None
    per_chunk: Callable[[int, RawChunk], tuple[Array, ...]] | None = None
    multiple_of: int = 1
    takes_tasks: bool = True

    def of_chunk(self, start: int, chunk: RawChunk) -> Inputs:
        """Return all numbers that `op` takes for a chunk from an element on."""
        if self.per_chunk is None:
            return self.inputs(start, chunk.num_elements)
        return Inputs(self.per_chunk(start, chunk), self.per_task)

    def inputs(self, start: int, count: int) -> Inputs:
        """Return all numbers that `op` takes for some elements."""
        return Inputs(self.per_element(start, count), self.per_task)


def weighted_rule(weights: tuple[float, ...]) -> Rule:
    """Return the rule that adds the task vectors, each multiplied by its weight."""
    return Rule(WEIGHTED_SUM, per_task=(np.array(weights, np.float32),))


def affine_rule(weights: Sequence[float] | Array) -> Rule:
    """Return the rule that adds the base model's values and the task vectors, each multiplied by its weight.

    Args:
        weights: "1+tasks", the base model's first: what the merged task vector has of its values.
    """
    return Rule(AFFINE_SUM, per_task=(np.array(weights, np.float32),))


def precomputed_rule(found: Array) -> Rule:
    """Return a rule whose merged values are known: float32, one per element of the tensor."""
    return Rule(PRECOMPUTED, per_element=lambda start, count: (found[start : start + count],))


def chosen_rule(owner: Array, num_unaligned: tuple[int, ...] = (), duality_gap: float | None = None) -> Rule:
    """Return a rule whose winners are known: uint8, one per element of the tensor; the facts are `Rule`'s."""
    return Rule(CHOSEN, lambda start, count: (owner[start : start + count],), (), num_unaligned, duality_gap)
