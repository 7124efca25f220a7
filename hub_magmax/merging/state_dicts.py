"""Merges of state dicts: models in memory, such as a trainer's, without files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from hub_magmax.checkpoints.state_dicts import StateDictSource
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.merging.tensors import as_tensor, weights_in_order
from hub_magmax.planning.fitting.integers import check_integers
from hub_magmax.preference import resolve_preference
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.matching import locked_method, rules_of
from hub_magmax.recipe.schema import Recipe

StateDict = Mapping[str, torch.Tensor]

#: Names of tensors that are one parameter: those left out, and the one that stands for each.
Aliases = Mapping[str, str]


@checked
def merge_state_dicts(
    base: StateDict,
    tasks: Mapping[str, StateDict],
    *,
    preference: Mapping[str, Any] | Sequence[float] | Literal["uniform"] | None = None,
    method: str | Mapping[str, Any] = "tunable_magmax",
    norms: str | None = None,
    tensors: Sequence[Mapping[str, Any]] = (),
    dtype: str = "auto",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Merge fine-tuned models that are in memory, and return the state dict of the merged model.

    The values are those that a merge of the same checkpoints from files has, to the bit. Tensors that share
    their memory in the base model and in every task (tied layers) are one parameter: merged once, and shared
    in the result.

    Args:
        base: State dict of the base model, of any dense dtypes, on any device, or arrays of numpy; it is not
            changed.
        tasks: State dicts of the fine-tuned models by task, in the order in which they were learned: 1 to 64,
            with the names and shapes of `base`.
        preference: A weight by task (tasks that are not named get none), or one for each task in order,
            summing to 1. Or what a recipe may say, such as `{"geometric": {"ratio": 0.5}}` and
            `{"coefficients": {"a": 1, "b": -0.5}}`. Uniform by default.
        method: A method's name, or its name with its options and `scaling`, as in a recipe. The scaling
            coefficient is part of the result, unlike that of `merge_tensors`.
        norms: Scale the task vectors to their mean length, of the whole model (`equal`) or of each tensor
            (`equal-by-tensor`), or cut those of the model that are longer (`clipped`).
        tensors: Rules as in a recipe, `{"match": "head.*", "take": "a"}` or
            `{"layers": [0, 8], "scaling": 0.5}`; the first that covers a tensor counts.
        dtype: Of the merged tensors: float64, float32, float16, bfloat16, or as they are in `base`.
        seed: Decides the draws of methods that draw.

    Returns:
        New tensors by name, in the order of `base`, each on the device of the base model's.

    Raises:
        RecipeError: If the method, an option, a rule or the preference is not valid.
        MismatchError: If the state dicts do not fit each other, naming all tensors, and the rules
            that settle it.
        NonFiniteError: At a NaN or infinity in a state dict or in the merged model.
    """
    _check_state_dicts({"base": base, **tasks})
    base = _tensors(base)
    tasks = {name: _tensors(model) for name, model in tasks.items()}
    recipe = _recipe_of(
        {
            "tasks": [{"name": name, "model": name} for name in tasks],
            "method": method,
            "preference": _as_written(preference, tuple(tasks)),
            **({} if norms is None else {"norms": norms}),
            "tensors": [*tensors],
            "output": {"dtype": dtype},
            "seed": seed,
        }
    )
    lock = _lock_of(recipe)
    models = {"base_model": base, **tasks}
    shared = _shared_tensors(tuple(models.values()))
    sources = {name: StateDictSource(_without(model, shared), name) for name, model in models.items()}
    with InMemoryMerger(recipe, lock, sources=sources) as merger:
        check_integers(merger.plan, sources)
        weights = merger.merge(lock.method, lock.weights).weights(lock.method["scaling"])
    found = {name: _placed(tensor, base.get(name)) for name, tensor in weights.items()}
    found |= {name: found[of] for name, of in shared.items() if of in found}
    return {name: found[name] for name in dict.fromkeys((*base, *found)) if name in found}


def _tensors(model: StateDict) -> StateDict:
    """Return a state dict whose arrays of numpy are tensors."""
    return {name: as_tensor(value) for name, value in model.items()}


def _check_state_dicts(models: Mapping[str, Any]) -> None:
    """Raise RecipeError for what is no mapping, such as a model in place of its state dict."""
    for name, model in models.items():
        if not isinstance(model, Mapping):
            raise RecipeError(
                f"{type(model).__name__} is no state dict",
                where=f"merge_state_dicts, {name}",
                expected="tensors by name, as `model.state_dict()` returns them",
            )


def _as_written(preference: Any, tasks: Sequence[str]) -> Any:
    """Return the preference as a recipe writes it."""
    if preference is None or isinstance(preference, str):
        return None
    if isinstance(preference, Mapping):
        are_numbers = all(isinstance(value, int | float) for value in preference.values())
        return {"weights": dict(preference)} if are_numbers else dict(preference)
    return {"weights": dict(zip(tasks, weights_in_order(preference, len(tasks)), strict=True))}


def _recipe_of(values: dict[str, Any]) -> Recipe:
    """Return a checked recipe that needs no examples, for which models in files would have to be loaded."""
    recipe = parse_recipe({"base_model": "base", **values}, where="merge_state_dicts")
    if recipe.method.is_auto or (recipe.preference is not None and recipe.preference.is_estimated):
        raise RecipeError(
            "this needs examples, and models that can be loaded from files",
            where="merge_state_dicts, method" if recipe.method.is_auto else "merge_state_dicts, preference",
            expected="a method and weights as numbers",
            hint="Save the models and use `hub_magmax.lock`, or estimate the weights first.",
        )
    return recipe


def _lock_of(recipe: Recipe) -> Lock:
    source = LockedSource("memory", "local", None, None, ())
    return Lock(
        base_model=source,
        tasks=MappingProxyType(dict.fromkeys(recipe.task_names, source)),
        method=locked_method(recipe.method, recipe.preference),
        preference=resolve_preference(recipe),
        tensors=rules_of(recipe),
        seed=recipe.seed,
    )


def _shared_tensors(models: Sequence[StateDict]) -> Aliases:
    """Return tensors that are another one in all models: the same memory under two names."""
    found = [_aliases(model) for model in models]
    return {name: of for name, of in found[0].items() if all(other.get(name) == of for other in found)}


def _aliases(model: StateDict) -> Aliases:
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in model.items():
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.numel():
            place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            if (of := first.setdefault(place, name)) != name:
                aliases[name] = of
    return aliases


def _without(model: StateDict, names: Iterable[str]) -> StateDict:
    left_out = frozenset(names)
    return {name: tensor for name, tensor in model.items() if name not in left_out}


def _placed(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    return tensor if like is None else tensor.to(like.device)
