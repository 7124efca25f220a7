"""Whole matrices: which tensors are some, and the rule that a method of whole matrices gives for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hub_magmax.methods.plugins import checked_values, failures
from hub_magmax.methods.rules import Rule, precomputed_rule, weighted_rule

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.kernels.backend import Backend
    from hub_magmax.methods.chunks import Chunks
    from hub_magmax.methods.factors import Coordinates

#: Modules that look rows up, and language models' heads, by the last part of their names.
_LOOKED_UP = re.compile(r".*(embed|_emb$|^emb$).*|wte|wpe|shared|lm_head|relative_attention_bias")
#: A part of the names of tensors that hold a matrix for each expert, along the first axis.
_STACKED = re.compile(r"experts?")


class Matrices(NamedTuple):
    """The matrices that a tensor holds.

    Attributes:
        number: One, or that of the experts.
        rows: Outputs of a layer.
        columns: Its inputs; of a convolution, times the elements of the kernel.
    """

    number: int
    rows: int
    columns: int


def matrices_in(name: str, shape: Sequence[int]) -> Matrices | None:
    """Return which matrices a tensor holds; None of vectors, and of tables that are looked up.

    A tensor of more than two dimensions is one matrix, the first dimension by all others, as a convolution
    is applied; one of stacked experts is a matrix for each of them. A matrix whose smaller side is 1 is a
    vector.

    Args:
        name: Of the tensor; embeddings, language models' heads and experts are known by theirs.
        shape: Of the tensor.
    """
    parts = name.removesuffix(".weight").split(".")
    is_stacked = len(shape) > 2 and any(map(_STACKED.fullmatch, parts))
    number, *sides = shape if is_stacked else (1, *shape)
    if len(sides) < 2 or (len(sides) == 2 and _LOOKED_UP.fullmatch(parts[-1])):
        return None
    found = Matrices(number, sides[0], math.prod(sides[1:]))
    return found if min(found.rows, found.columns) > 1 else None


def matrix_rule(
    function: Callable[..., Tensor],
    chunks: Chunks,
    matrices: Matrices,
    tasks: Sequence[int],
    options: Mapping[str, Any],
    where: str,
    *,
    is_checked: bool,
) -> Rule:
    """Return how a method of whole matrices merges one tensor.

    Args:
        function: Takes float32 `"tasks rows columns"`, on the device of the backend, and returns what is
            merged of them, float32 on the same device; one with the option `sides` may get fewer rows and
            columns.
        chunks: The tensor's stacked task vectors.
        matrices: That it holds.
        tasks: Those that the function gets.
        options: What the function takes beside them.
        where: Names method and tensor in messages.
        is_checked: Whether what comes out is checked, as of a plug-in.
    """
    from hub_magmax.kernels.lazy_imports import torch
    from hub_magmax.methods.chunks import stacked_vectors
    from hub_magmax.methods.factors import in_coordinates

    call = partial(function, **options)
    if "sides" in options and matrices.number == 1 and (factors := chunks.factors(tasks)) is not None:
        found = in_coordinates(factors)
        small = merged_in(found, call, chunks.backend, where, is_checked=is_checked)
        return _rule_of_factors(found, small, tasks, chunks.num_tasks)
    stacked = stacked_vectors(chunks, tasks).view(len(tasks), *matrices)
    merged = []
    with failures(where):
        for number in range(matrices.number):
            found = chunks.backend.of_matrices(call, stacked[:, number])
            merged.append(checked_values(found, matrices[1:], where) if is_checked else found)
    return precomputed_rule((merged[0] if len(merged) == 1 else torch.stack(merged)).reshape(-1))


def merged_in(
    found: Coordinates, call: Callable[[Tensor], Tensor], backend: Backend, where: str, *, is_checked: bool
) -> Tensor | None:
    """Return what a method gives in coordinates of factors; None where that is the first task's vector.

    Task vectors without a direction, all of them zero, give the first one, too.
    """
    if not found.small.any():
        return None
    with failures(where):
        merged = backend.of_matrices(call, found.small)
        merged = checked_values(merged, tuple(found.small.shape[1:]), where) if is_checked else merged
    return None if len(found.small) == 1 and merged.equal(found.small[0]) else merged


def _rule_of_factors(found: Coordinates, merged: Tensor | None, tasks: Sequence[int], num_tasks: int) -> Rule:
    """Return how a matrix is merged whose task vectors are products."""
    if merged is None:  # added as other methods add task vectors, to the bit
        return weighted_rule(tuple(float(task == tasks[0]) for task in range(num_tasks)))
    whole = (found.left @ merged.double()).float() @ found.right.T.float()
    return replace(precomputed_rule(whole.reshape(-1)), takes_tasks=False)


def transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of matrices whose sides are the other way round."""

    def turned(task_vectors: Tensor, **options: Any) -> Tensor:
        return function(task_vectors.transpose(1, 2), **options).T

    return turned


def held_with(matrices: float) -> Callable[[int, int, int], float]:
    """Return what a method holds that decomposes matrices, given how many it has besides, in float64."""
    return lambda rows, columns, num_tasks: 8 * matrices * rows * columns + decomposition_bytes(rows, columns)


def decomposition_bytes(rows: int, columns: int) -> float:
    """Return what the directions of a matrix take besides itself: squares of the smaller side, and buffers.

    Four squares in float64 are those of LAPACK; the buffers of libraries are measured.
    """
    square = min(rows, columns) ** 2
    return 32 * square + min(8 * square + 20 * rows * columns, 80_000_000)


def relative(preference: Sequence[float]) -> tuple[float, ...]:
    """Return weights as shares of the largest: ones where all tasks weigh the same, and for a single task."""
    return tuple(weight / max(preference) for weight in preference)
