"""Merges of stacked task vectors in memory, without files, base model or scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from pydantic import ValidationError

from hub_magmax import methods
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods import Rule
from hub_magmax.methods.selection import ArrayChunks, Chunks, quotas


def tensor_rule(
    chunks: Chunks,
    shape: tuple[int, ...],
    method: Mapping[str, Any],
    weights: tuple[float, ...],
    generator: CounterGenerator,
) -> Rule:
    """Return how the method that a lock describes merges one tensor."""
    options = {key: value for key, value in method.items() if key not in ("name", "scaling")}
    found = methods.get_method(method["name"])
    return found.rule(chunks, shape=shape, preference=weights, generator=generator, options=options)


def merge_tensors(
    task_vectors: Float[torch.Tensor, "tasks *shape"],
    *,
    preference: tuple[float, ...] | None = None,
    method: str = "tunable_magmax",
    seed: int = 0,
    name: str = "",
    **options: Any,
) -> Float[torch.Tensor, "*shape"]:
    """Merge stacked task vectors by any method; the result is not scaled: add λ times it to the base.

    Args:
        task_vectors: float32, CPU, finite; the tasks along the first axis.
        preference: One non-negative weight per task, summing to 1; uniform by default.
        method: Name of a registered method.
        seed: Decides the draws of methods that draw.
        name: The tensor's name; tensors of different names get different draws.
        options: The method's own.

    Raises:
        RecipeError: If the method, an option or the preference is not valid.
    """
    found = methods.get_method(method)
    try:
        checked = methods.check_options(found, options)
    except ValidationError as error:
        problems = "; ".join(f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors())
        raise RecipeError(problems, where=method) from error
    num_tasks = len(task_vectors)
    weights = preference if preference is not None else (1 / num_tasks,) * num_tasks
    if len(weights) != num_tasks:
        raise RecipeError(f"{len(weights)} weights for {num_tasks} tasks", where="preference")
    quotas(weights, 0)  # raises unless the weights are a preference
    if not task_vectors[0].numel():
        return task_vectors[0].clone()  # no method is asked, as in a merge of files
    chunks = ArrayChunks(task_vectors, backend=choose_backend(task_vectors[0].numel()))
    rule = tensor_rule(
        chunks,
        tuple(task_vectors.shape[1:]),
        {"name": method, "scaling": 1.0, **checked},
        tuple(weights),
        CounterGenerator(seed, name),
    )
    merged = [rule.op(chunk, rule.inputs(start, chunk.shape[1])) for start, chunk in chunks]
    return torch.cat(merged).reshape(task_vectors.shape[1:])
