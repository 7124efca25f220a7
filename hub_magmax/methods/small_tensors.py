"""One rule for many small tensors that lie side by side, the same to the bit as a rule for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.randomness import CounterGenerator, JoinedGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.registry import MergeMethod
from hub_magmax.methods.rules import Rule, chosen_rule
from hub_magmax.methods.selection.quotas import quotas
from hub_magmax.methods.selection.side_by_side import algorithm_1_side_by_side
from hub_magmax.methods.selection.unique_optima import unique_optima
from hub_magmax.methods.sparse import RANKS
from hub_magmax.methods.thresholds import thresholds_side_by_side
from hub_magmax.options import for_each_task

#: Elements of tensors of one size that are worked on at a time, so that they stay in the caches.
_AT_ONCE = 2**16


@dataclass(frozen=True)
class Tensors:
    """Small tensors side by side.

    Attributes:
        vectors: Their task vectors, finite; without elements where a method looks at none of them.
        sizes: Elements of each.
        generators: Of each.
    """

    vectors: Float32[np.ndarray, "tasks elements"]
    sizes: Sequence[int]
    generators: Sequence[CounterGenerator]
    backend: Backend

    @property
    def num_tasks(self) -> int:
        return len(self.vectors)

    @cached_property
    def firsts(self) -> Int64[np.ndarray, " tensors"]:
        """Index of each tensor's first element."""
        return np.cumsum([0, *self.sizes[:-1]])

    def of_one_size(self) -> Iterator[tuple[int, Int64[np.ndarray, " some"], Int64[np.ndarray, "some size"]]]:
        """Yield a size, some of the tensors that have it, and the indices of their elements."""
        sizes = np.array(self.sizes)
        for size in np.unique(sizes).tolist():
            members = np.flatnonzero(sizes == size)
            for some in np.array_split(members, min(len(members), -(-len(members) * size // _AT_ONCE))):
                yield size, some, self.firsts[some, None] + np.arange(size)


@dataclass(frozen=True)
class SideBySide:
    """A rule for the elements of all tensors.

    Attributes:
        rule: Per element of all of them.
        is_zero: Elements of task vectors that count as zero before that; None: none does.
    """

    rule: Rule
    is_zero: Bool[np.ndarray, "tasks elements"] | None = None


def looks_at_values(method: MergeMethod) -> bool:
    """Say whether a built-in method looks at task vectors before it merges; others at places only."""
    return method.held_bytes != 0


def rule_side_by_side(
    method: MergeMethod, tensors: Tensors, preference: tuple[float, ...], options: Mapping[str, Any]
) -> SideBySide:
    """Return how a built-in method merges tensors of scope `tensor`, all at once."""
    if not looks_at_values(method):
        # Draws are keyed by tensor and by the element's place in it, which numpy takes as well.
        joined = JoinedGenerator.of(tensors.generators, tensors.sizes)
        unseen = ArrayChunks(tensors.vectors[:, :0], backend=Reference())
        return SideBySide(
            method.rule(
                unseen,
                shape=(sum(tensors.sizes),),
                preference=preference,
                generator=joined,
                options=options,
            )
        )
    if method.name in RANKS:
        return _trimmed(method, tensors, preference, options)
    if options["selection"] == "algorithm-1":
        return SideBySide(_algorithm_1(tensors, preference))
    return SideBySide(_top_n(method, tensors, preference, options))


def _trimmed(
    method: MergeMethod, tensors: Tensors, preference: tuple[float, ...], options: Mapping[str, Any]
) -> SideBySide:
    """Return the rule without thresholds, and what each tensor's own thresholds set to zero."""
    magnitudes, of_each = np.abs(tensors.vectors), for_each_task(method, options, tensors.num_tasks)
    is_zero = np.empty(magnitudes.shape, bool)
    for size, _, elements in tensors.of_one_size():
        own = magnitudes[:, elements]
        *most, least = thresholds_side_by_side(own, RANKS[method.name](size, **of_each))
        is_zero[:, elements] = own < least[..., None]
        for largest in most:
            is_zero[:, elements] |= own > largest[..., None]
    # Any tensor tells operation and weights.
    example = ArrayChunks(np.ones((tensors.num_tasks, 1), np.float32), backend=tensors.backend)
    rule = method.rule(
        example, shape=(1,), preference=preference, generator=tensors.generators[0], options=options
    )
    least, *most = rule.per_task[: len(RANKS[method.name](1, **of_each))]
    bounds = np.zeros_like(least), *(np.full_like(largest, np.inf) for largest in most)
    return SideBySide(Rule(rule.op, per_task=(*bounds, *rule.per_task[len(bounds) :])), is_zero)


def _algorithm_1(tensors: Tensors, preference: tuple[float, ...]) -> Rule:
    owner = np.empty(tensors.vectors.shape[1], np.uint8)
    unaligned = np.zeros(tensors.num_tasks, np.int64)
    for size, some, elements in tensors.of_one_size():
        found, given = algorithm_1_side_by_side(
            np.ascontiguousarray(tensors.vectors[:, elements]),
            quotas(preference, size),
            [tensors.generators[tensor] for tensor in some],
            tensors.backend,
        )
        owner[elements] = found
        unaligned += given.sum(axis=0)
    return chosen_rule(owner, tuple(unaligned.tolist()))


def _top_n(
    method: MergeMethod, tensors: Tensors, preference: tuple[float, ...], options: Mapping[str, Any]
) -> Rule:
    """Return the winners of tensors that have one best selection, and what the method selects of others."""
    owner, gap = np.empty(tensors.vectors.shape[1], np.uint8), 0.0
    for size, some, elements in tensors.of_one_size():
        found, is_settled = unique_optima(tensors.vectors[:, elements], quotas(preference, size))
        owner[elements] = found
        for tensor in some[~is_settled].tolist():
            first = int(tensors.firsts[tensor])
            chunks = ArrayChunks(tensors.vectors[:, first : first + size], backend=tensors.backend)
            generator = tensors.generators[tensor]
            rule = method.rule(
                chunks, shape=(size,), preference=preference, generator=generator, options=options
            )
            owner[first : first + size] = rule.per_element(0, size)[0]
            gap = max(gap, rule.duality_gap or 0.0)
    return chosen_rule(owner, (0,) * tensors.num_tasks, gap)
