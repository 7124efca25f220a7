"""Merges of stacked task vectors in memory, without files, base model or scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from hub_magmax import methods
from hub_magmax.errors import ArgumentError, NonFiniteError, RecipeError
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.lazy_imports import one_thread, torch
from hub_magmax.kernels.ops import Inputs, Op
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods import Rule
from hub_magmax.methods.chunks import ArrayChunks, Chunks
from hub_magmax.methods.data_statistics import StatisticsByTask
from hub_magmax.methods.selection import quotas
from hub_magmax.options import per_task
from hub_magmax.recipe.arguments import checked


def tensor_rule(
    chunks: Chunks,
    shape: tuple[int, ...],
    method: Mapping[str, Any],
    weights: tuple[float, ...],
    generator: CounterGenerator,
    statistics: StatisticsByTask | None = None,
) -> Rule:
    """Return how the method that a lock describes merges one tensor; see `MergeMethod.rule`.

    Raises:
        NonFiniteError: If a number is not finite by which the method would multiply, with the tensor's name.
    """
    options = {key: value for key, value in method.items() if key not in ("name", "scaling")}
    found = methods.get_method(method["name"])
    try:
        return found.rule(
            chunks,
            shape=shape,
            preference=weights,
            generator=generator,
            options=options,
            statistics=statistics,
        )
    except NonFiniteError as error:
        name = generator.name
        error.where = error.where or (name if methods.surveys_model(method) else f"tensor {name!r}")
        raise


@checked
def merge_tensors(
    task_vectors: Float[torch.Tensor, "tasks *shape"]
    | Mapping[str, Float[torch.Tensor, "*shape"]]
    | Sequence[Float[torch.Tensor, "*shape"]],
    *,
    preference: Sequence[float] | Mapping[str, float] | Literal["uniform"] | None = None,
    method: str = "tunable_magmax",
    seed: int = 0,
    name: str = "",
    base: Float[torch.Tensor, "*shape"] | None = None,
    **options: Any,
) -> Float[torch.Tensor, "*shape"]:
    """Merge stacked task vectors by any method; the result is not scaled: add λ times it to the base.

    Args:
        task_vectors: Finite floating-point numbers, merged as float32 on the CPU: the tasks along the first
            axis, a tensor by task, or a list of one for each. Arrays of numpy are taken for tensors.
        preference: One non-negative weight per task, summing to 1, in order or by task (tasks that are not
            named get none); uniform by default.
        method: Name of a registered method.
        seed: Decides the draws of methods that draw.
        name: The tensor's name; tensors of different names get different draws.
        base: The base model's values, for methods that need them, such as `slerp`: of the shape of one task
            vector.
        options: The method's own; those of which each task may have its own value take values in order or
            by task too.

    Raises:
        RecipeError: If the method, an option or the preference is not valid.
        ArgumentError: If the task vectors are no tensors, or do not fit each other.
        NonFiniteError: At a NaN or infinity.
    """
    tasks = tuple(task_vectors) if isinstance(task_vectors, Mapping) else None
    stacked = _stacked(task_vectors)
    names = tasks or tuple(str(number) for number in range(len(stacked)))
    described = {"name": method, "scaling": 1.0, **_checked(method, options, names)}
    weights = _weights(preference, len(stacked), tasks)
    quotas(weights, 0)  # raises unless the weights are a preference
    if not stacked[0].numel():
        return stacked[0].clone()  # no method is asked, as in a merge of files
    label = methods.get_method(method).label
    chunks = _with_base(stacked, base, method)
    shape = tuple(stacked.shape[1:])
    with one_thread():  # as in merges of files: threads change last bits of decompositions
        rule = tensor_rule(chunks, shape, described, weights, CounterGenerator(seed, name))
    return torch.cat([*_merged(chunks, rule, label)]).reshape(shape)


def as_tensor(value: Any) -> Any:
    """Return an array of numpy as a tensor, where it can be one; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    native = value.dtype.newbyteorder("=")
    with suppress(TypeError):  # objects, texts
        return torch.from_numpy(np.require(value, native, ["C", "W"]))
    return value


def _stacked(given: Any) -> torch.Tensor:
    """Return task vectors as one float32 tensor on the CPU, the tasks first."""
    where = "merge_tensors, task_vectors"
    if isinstance(given, Mapping | list | tuple):
        named = given.items() if isinstance(given, Mapping) else enumerate(given)
        found = {name: _float32(value, f"{where}, task {name}") for name, value in named}
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if len({*shapes.values()}) > 1:
            told = ", ".join(f"{name}: {[*shape]}" for name, shape in shapes.items())
            raise ArgumentError(
                f"the shapes differ ({told})", where=where, expected="one shape for all tasks"
            )
        rows = torch.stack([*found.values()]) if found else torch.empty(0)
    else:
        rows = _float32(given, where)
    if rows.ndim == 0 or not len(rows):
        raise ArgumentError("there is no task", where=where, expected="at least one, along the first axis")
    return rows


def _float32(given: Any, where: str) -> torch.Tensor:
    """Return finite numbers as float32 on the CPU, without a copy where they are that."""
    found = as_tensor(given)
    is_dense = isinstance(found, torch.Tensor) and found.layout == torch.strided and not found.is_meta
    if not is_dense or not found.is_floating_point():
        told = (
            f"a {found.layout} tensor of {found.dtype} on {found.device}"
            if isinstance(found, torch.Tensor)
            else f"a {type(given).__name__}"
        )
        raise ArgumentError(
            f"this is {told}", where=where, expected="a dense tensor or array of floating-point numbers"
        )
    values: torch.Tensor = found.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("this holds a NaN or an infinity", where=where, expected="finite numbers")
    return values


def _with_base(task_vectors: torch.Tensor, base: Any, method: str) -> ArrayChunks:
    """Return task vectors with the base model's values, where they are given."""
    found, like = methods.get_method(method), task_vectors[0]
    if base is None:
        if "base" in found.supplied:
            raise _without_base(found.label)
    else:
        base = _float32(base, "merge_tensors, base")
        if base.shape != like.shape:
            told = f"the shape is {[*base.shape]}"
            raise ArgumentError(told, where="merge_tensors, base", expected=f"{[*like.shape]}")
    return ArrayChunks(task_vectors, backend=choose_backend(like.numel()), base=base)


def _merged(chunks: ArrayChunks, rule: Rule, label: str) -> Iterator[torch.Tensor]:
    (parts,) = chunks.map(list, multiple_of=rule.multiple_of)
    for start, part in parts:
        chunk, inputs = torch.from_numpy(part.task_vectors()), rule.of_chunk(start, part)
        below = chunks.below(start, start + part.num_elements)
        if below is None and rule.op.takes_base and _weighs_base(rule.op, inputs):
            raise _without_base(label)
        yield rule.op(chunk, inputs, None if below is None else torch.from_numpy(below))


def _weighs_base(op: Op, inputs: Inputs) -> bool:
    """Say whether the base model's values count: a built-in operation has their weights first."""
    return not op.name or any(
        torch.as_tensor(w)[..., 0].any() for w in (*inputs.per_task, *inputs.per_element)
    )


def _without_base(label: str) -> RecipeError:
    return RecipeError(
        "the method needs the base model's values, besides the task vectors",
        where=label,
        expected="base=..., a tensor like one task vector",
    )


def _checked(method: str, options: Mapping[str, Any], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Return a method's options with its defaults, values of single tasks by their names in order.

    Args:
        method: Name of the method.
        options: As they are given.
        tasks: Names of the tasks, or their numbers.
    """
    entry = methods.get_method(method)
    named = {name: _by_name(value, tasks) for name, value in options.items()}
    by_task = per_task(entry, named)
    for name, values in by_task.items():
        if {*values} != {*tasks}:
            raise RecipeError(
                f"{name} is given for {', '.join(map(str, values))}",
                where=method,
                expected=f"one value, or one for each of {', '.join(tasks)}",
            )
    ordered = {name: {task: values[task] for task in tasks} for name, values in by_task.items()}
    try:
        return methods.check_options(entry, {**options, **ordered})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, found['loc']))}: {found['msg'].removeprefix('Value error, ')}"
            for found in error.errors()
        )
        raise RecipeError(problems, where=method) from error


def _by_name(value: Any, tasks: tuple[str, ...]) -> Any:
    """Return an option that has a value for each task by their names; any other as it is."""
    is_list = isinstance(value, list | tuple) and len(value) == len(tasks)
    return dict(zip(tasks, value, strict=True)) if is_list else value


def _weights(preference: Any, num_tasks: int, tasks: tuple[str, ...] | None) -> tuple[float, ...]:
    """Return one weight per task, in order, from weights in order or by task."""
    if preference is None or isinstance(preference, str):
        return (1 / num_tasks,) * num_tasks
    if not isinstance(preference, Mapping):
        return weights_in_order(preference, num_tasks)
    if tasks is None:
        raise RecipeError(
            "weights by task, and the task vectors have no names",
            where="preference",
            expected=f"{num_tasks} weights in the order of the tasks, or task vectors by task",
        )
    if unknown := [task for task in preference if task not in tasks]:
        raise RecipeError(
            f"there is no task {unknown[0]!r}", where="preference", expected=f"one of {', '.join(tasks)}"
        )
    return tuple(float(preference.get(task, 0.0)) for task in tasks)


def weights_in_order(preference: Any, num_tasks: int) -> tuple[float, ...]:
    """Return one number per task.

    Raises:
        RecipeError: If these are no numbers, or not as many as there are tasks.
    """
    try:
        weights = tuple(float(weight) for weight in preference)
    except (TypeError, ValueError):
        raise RecipeError(
            f"{preference!r} are no weights",
            where="preference",
            expected=f"{num_tasks} numbers, one per task, or numbers by task",
        ) from None
    if len(weights) != num_tasks:
        raise RecipeError(
            f"{len(weights)} weights for {num_tasks} tasks", where="preference", expected="one per task"
        )
    return weights
