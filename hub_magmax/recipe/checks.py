"""Checks across the keys of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import ValidationError

from hub_magmax import methods
from hub_magmax.errors import HubMagmaxError, KeyPath, Problem, RecipeError
from hub_magmax.options import check_options
from hub_magmax.recipe.evaluation_checks import (
    guard_problems,
    prompt_problems,
    rounding_problems,
    routing_problems,
)
from hub_magmax.recipe.lockfile import COEFFICIENTS
from hub_magmax.recipe.model_checks import (
    choices_without_tasks,
    layer_problems,
    norm_problems,
    own_base_problems,
)
from hub_magmax.recipe.model_names import parse_model_name
from hub_magmax.recipe.output_checks import (
    adapter_problems,
    correction_problems,
    output_problems,
    selection_problems,
)
from hub_magmax.recipe.preferences import DistanceEstimate, Preference
from hub_magmax.recipe.problems import SEE_SCHEMA, conflict, explain
from hub_magmax.recipe.rule_checks import (
    missed_tasks,
    named_tasks,
    option_tasks,
    rule_problems,
    takers,
    takes_coefficients,
)
from hub_magmax.recipe.schema import MAX_TRIED, Method, Recipe, Sweep
from hub_magmax.recipe.statistics_checks import statistics_problems
from hub_magmax.recipe.tokenizer import tokenizer_problems
from hub_magmax.recipe.training_checks import alternation_problems, training_problems
from hub_magmax.recipe.values import AUTO, EvaluatorChoice, Named
from hub_magmax.registry import EVALUATORS, METHODS, Registry
from hub_magmax.text import holds_control, holds_token, nearest, shown

#: Control characters that lay out a text.
_LAYOUT = str.maketrans("", "", "\n\t\r")


def text_problems(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Return where a text holds an access token, since a recipe is published, or control characters."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from text_problems(key, path)
            yield from text_problems(item, (*path, key))
    elif isinstance(value, str) and holds_token(value):
        yield Problem(
            "value",
            "this holds an access token or a password, and recipes are published",
            key=path,
            hint="name the model as org/model, and give the token by `hf auth login` or HF_TOKEN",
        )
    elif isinstance(value, str) and path[-1:] != ("template",) and holds_control(value.translate(_LAYOUT)):
        hint = "leave out what cannot be shown: no file, repository or column has such a name"
        yield Problem("value", f"{shown(value, 60)} holds control characters", key=path, hint=hint)


def option_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """Return what is wrong with the names and options of methods and the evaluator."""
    for prefix, model, registry, value in _named(values):
        try:
            entry = registry.get(value.get("name", model.model_fields["name"].default))
            check_options(entry, {k: v for k, v in value.items() if k not in model.model_fields})
        except RecipeError as error:
            yield _of_error((*prefix, "name"), error)
        except ValidationError as error:
            yield from explain(error, prefix, [*model.model_fields, *entry.options], entry.name)


def _named(values: dict[str, Any]) -> Iterator[tuple[KeyPath, type[Named], Registry, dict[str, Any]]]:
    """Yield the methods and the evaluator that a recipe names, each with its key path."""
    for prefix, model, registry, value in _written(values):
        named = {"name": value} if isinstance(value, str) else value
        # Anything else is reported by the schema.
        if isinstance(named, dict) and isinstance(named.get("name", ""), str):
            yield prefix, model, registry, named


def _written(values: dict[str, Any]) -> Iterator[tuple[KeyPath, type[Named], Registry, Any]]:
    method = values.get("method", {})
    if method != AUTO and not (isinstance(method, dict) and method.get("name") == AUTO):
        yield ("method",), Method, METHODS, method
    compare = values.get("compare")
    for key, default in (("evaluation", {}), ("statistics", None), ("training", None)):
        spec = values.get(key)
        if isinstance(spec, dict) and (evaluator := spec.get("evaluator", default)) is not None:
            yield (key, "evaluator"), EvaluatorChoice, EVALUATORS, evaluator
    if isinstance(compare, dict) and isinstance(compare.get("methods"), list):
        for index, tried in enumerate(compare["methods"][:MAX_TRIED]):
            yield ("compare", "methods", index), Method, METHODS, tried


def text_wanted(values: Any) -> Iterator[KeyPath]:
    """Yield the key paths of values that should be text and are something else."""
    if not isinstance(values, dict):
        return
    for prefix, check in _schemas(values):
        try:
            check()
        except ValidationError as error:
            yield from ((*prefix, *e["loc"]) for e in error.errors() if e["type"] == "string_type")


def _schemas(values: dict[str, Any]) -> Iterator[tuple[KeyPath, Callable[[], object]]]:
    """Yield calls that check parts of a recipe against their schemas, each with the part's key path."""
    yield (), partial(Recipe.model_validate, values)
    for prefix, model, registry, value in _named(values):
        options = {k: v for k, v in value.items() if k not in model.model_fields}
        with suppress(RecipeError):
            entry = registry.get(value.get("name", model.model_fields["name"].default))
            yield prefix, partial(check_options, entry, options)


def _of_error(path: KeyPath, error: HubMagmaxError) -> Problem:
    """Return the facts of an error as the problem of a key."""
    return Problem("value", error.what, key=path, expected=error.expected, hint=error.hint.rstrip("."))


def _task_problems(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.tasks and not recipe.layers:  # which one model is enough for
        is_missing = "tasks" not in recipe.model_fields_set
        text = "the key 'tasks' is required" if is_missing else "[] should hold at least 1"
        yield Problem("missing_key" if is_missing else "value", text, key=("tasks",), hint=SEE_SCHEMA)
    for index, name in enumerate(recipe.task_names):
        if name in ("base_model", "nothing"):  # which rules take
            yield conflict(("tasks", index, "name"), f"{name!r} is taken", "choose another name")
        elif name in recipe.task_names[:index]:
            first = recipe.task_names.index(name)
            text = f"the name {name!r} is used twice, first by tasks.{first}"
            yield conflict(("tasks", index, "name"), text, "give each task a name of its own")


def _reference_problems(recipe: Recipe) -> Iterator[Problem]:
    for path, written in recipe.places.items():
        try:
            parse_model_name(written, recipe.folder)
        except HubMagmaxError as error:
            yield _of_error(path, error)


def _name_problems(recipe: Recipe) -> Iterator[Problem]:
    names = recipe.task_names
    for path, name in _used_names(recipe):
        if name not in names:
            known = f"the tasks are {', '.join(names)}" if names else "the recipe has no tasks"
            yield conflict(path, f"there is no task {shown(name)}", nearest(name, names) or known)


def _preferences(recipe: Recipe) -> Iterator[tuple[KeyPath, Preference]]:
    """Yield every preference in the recipe with its key path."""
    if recipe.preference is not None:
        yield ("preference",), recipe.preference
    if recipe.compare is not None:
        for name, preference in recipe.compare.preferences.items():
            yield ("compare", "preferences", name), preference


def _names_in(preference: Preference, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if preference.kind in ("weights", COEFFICIENTS):
        yield from (((*path, preference.kind, name), name) for name in preference.spec)
    elif preference.is_estimated:
        for key in ("classes", "train", "towards"):
            names = getattr(preference.spec, key, None) or ()
            yield from (((*path, preference.kind, key, name), name) for name in names)


def _used_names(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    for path, preference in _preferences(recipe):
        yield from _names_in(preference, path)
    yield from _data_names(recipe)
    if recipe.output.files_from != "base_model":
        yield ("output", "files_from"), recipe.output.files_from
    for index, rule in enumerate(recipe.tensors):
        yield from ((("tensors", index, *key), name) for key, name in named_tasks(rule))
    yield from option_tasks(recipe)


def _data_names(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the names under which tasks have data."""
    for key, measured in (("evaluation", recipe.evaluation), ("routing", recipe.routing)):
        yield from (((key, "tasks", name), name) for name in (measured.tasks if measured else ()))
    for key, spec in (("statistics", recipe.statistics), ("training", recipe.training)):
        yield from (((key, "data", name), name) for name in (spec.data if spec else ()))


def _weight_problems(recipe: Recipe) -> Iterator[Problem]:
    for prefix, preference in _preferences(recipe):
        written: dict[KeyPath, Mapping[str, float] | None] = {(*prefix, "weights"): preference.weights}
        if preference.is_estimated:
            written[*prefix, preference.kind, "towards"] = preference.spec.towards
        for path, weights in written.items():
            yield from _share_problems(path, weights or {}, recipe.method)


def _share_problems(path: KeyPath, weights: Mapping[str, float], method: Method) -> Iterator[Problem]:
    """Return why weights are no shares, and how to say what may be meant."""
    negative = next((name for name, value in weights.items() if value < 0), None)
    if negative is not None:
        instead = "" if takes_coefficients(method) else f" and method: {methods.multiplying_names()[0]}"
        yield conflict(
            (*path, negative),
            f"{weights[negative]:g} is no share of the tasks",
            "to subtract a task, multiply the task vectors by coefficients: "
            f"{_as_coefficients(weights)}{instead}",
        )
    elif weights and abs(math.fsum(weights.values()) - 1) > 1e-6:
        total = math.fsum(weights.values())
        text = f"the weights sum to {total:.6g}, expected 1"
        yield conflict(path, text, _with_sum_one(weights, total, method))


def _with_sum_one(weights: Mapping[str, float], total: float, method: Method) -> str:
    if not total:
        return "give at least one task a weight above 0"
    shares = ", ".join(f"{name}: {value / total:.4g}" for name, value in weights.items())
    text = f"in the same proportions: {{{shares}}}"
    if takes_coefficients(method):
        text += f"; to multiply the task vectors by the numbers as they are: {_as_coefficients(weights)}"
    return text


def _as_coefficients(weights: Mapping[str, float]) -> str:
    written = ", ".join(f"{name}: {value!r}".removesuffix(".0") for name, value in weights.items())
    return f"preference: {{coefficients: {{{written}}}}}"


def _data_problems(recipe: Recipe) -> Iterator[Problem]:
    for prefix, preference in _preferences(recipe):
        if isinstance(preference.spec, DistanceEstimate):
            missing = [name for name in recipe.task_names if name not in preference.spec.train]
            if missing:
                path = (*prefix, preference.kind, "train")
                hint = "name the training data of every task"
                yield conflict(path, f"there is no data for {', '.join(missing)}", hint)


def _coefficient_problems(recipe: Recipe) -> Iterator[Problem]:
    """Return where coefficients are given to what needs shares of the tasks."""
    for path, preference in _preferences(recipe):
        if preference.coefficients is None:
            continue
        if path != ("preference",) or recipe.method.is_auto:
            text = "a comparison tries methods that need shares of the tasks"
            yield conflict((*path, "coefficients"), text, "use weights")
        elif not takes_coefficients(recipe.method):
            text = f"{recipe.method.name} needs shares of the tasks, which are weights"
            yield conflict((*path, "coefficients"), text, takers(recipe.method))


def _comparison_problems(recipe: Recipe) -> Iterator[Problem]:
    """Return what keeps a comparison from choosing, where the recipe leaves a choice to one."""
    if recipe.method.is_auto and recipe.tuning_data is None:
        key = "name" if recipe.method.name == AUTO else "scaling"
        text = "there is no labelled sample of the target to choose by"
        yield conflict(("method", key), text, "name one: compare: {tune: {dataset: ..., split: ...}}")
    for index, method in enumerate(recipe.compare.tried_methods if recipe.compare else ()):
        if method.is_auto:
            hint = "name a method; a comparison tries every scaling of compare.scaling"
            yield conflict(("compare", "methods", index), "auto is no method to try", hint)


def _count_problems(recipe: Recipe) -> Iterator[Problem]:
    """Return methods that do not take so many tasks; an estimate may leave some out."""
    preference, names = recipe.preference, recipe.task_names
    weights = preference.weights if preference else None
    if not (preference and preference.is_estimated):
        given = tuple(weights.get(name, 0.0) if weights else 1.0 for name in names)
        yield from _refused_count(("tasks",), recipe.method.name, given)
    for index, method in enumerate((recipe.compare and recipe.compare.methods) or ()):
        yield from _refused_count(("compare", "methods", index), method.name, (1.0,) * len(names))


def _refused_count(path: KeyPath, method: str, weights: tuple[float, ...]) -> Iterator[Problem]:
    try:
        if method != AUTO:
            methods.get_method(method).unread(weights)
    except RecipeError as error:
        if error.problems[0].key == ("tasks",):  # others are reported with the name
            yield conflict(path, error.what, error.hint.rstrip("."))


def _sweep_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.sweep is not None and (found := sweep_problem(recipe)) is not None:
        yield found


def sweep_problem(recipe: Recipe) -> Problem | None:
    """Return why a sweep of the recipe tells nothing, or not of its merge; None where it does."""
    if recipe.correction is not None:
        text = "the models of a sweep are merged without the correction"
        return conflict(("correction",), text, "leave it out for the sweep, and put it back for the merge")
    spec, num_tasks = recipe.sweep or Sweep(), len(recipe.tasks)
    if num_tasks < 2:
        return conflict(("sweep",), "one task has one preference only", "name at least 2 tasks")
    if (least := spec.least_budget(num_tasks)) > spec.budget:
        return conflict(
            ("sweep", "budget"),
            f"{spec.budget} preferences of the walk {spec.walk} cannot tell {num_tasks} tasks apart",
            f"give it at least {least}, better {20 * num_tasks}; walk: schedule goes from the first task to "
            "the last with any number",
        )
    return None


def _search_problems(recipe: Recipe) -> Iterator[Problem]:
    searched = [path for path, preference in _preferences(recipe) if preference.is_searched]
    if searched and recipe.method.name == AUTO:
        yield conflict(searched[0], "a search needs a method", "name one in place of auto")


def _tokenizer_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from tokenizer_problems(recipe.tokenizer, ("base_model", *recipe.task_names))


#: Checks of contradictions between keys whose values are valid one by one, each with the top-level keys that
#: it has to know whole. A new check is a line here.
_CHECKS: Mapping[Callable[[Recipe], Iterator[Problem]], frozenset[str]] = {
    _task_problems: frozenset({"tasks", "layers"}),
    choices_without_tasks: frozenset({"tasks", "layers", "preference", "compare", "sweep"}),
    _reference_problems: frozenset(),
    own_base_problems: frozenset({"tasks", "adapters", "method", "compare", "token_rows", "tokenizer"}),
    statistics_problems: frozenset(
        {"tasks", "method", "compare", "correction", "statistics", "layers", "tensors", "tokenizer"}
    ),
    _name_problems: frozenset({"tasks"}),
    missed_tasks: frozenset({"tasks", "preference", "compare"}),
    _weight_problems: frozenset({"preference", "compare", "method"}),
    _data_problems: frozenset({"tasks", "preference", "compare"}),
    _coefficient_problems: frozenset({"preference", "compare", "method"}),
    _comparison_problems: frozenset({"preference", "compare", "method"}),
    _search_problems: frozenset({"preference", "compare", "method"}),
    _sweep_problems: frozenset({"tasks", "sweep", "correction"}),
    _count_problems: frozenset({"tasks", "preference", "method", "compare"}),
    correction_problems: frozenset({"correction", "output", "tokenizer", "method", "preference", "compare"}),
    norm_problems: frozenset({"norms", "tasks", "output"}),
    rule_problems: frozenset({"tensors", "method", "preference"}),
    layer_problems: frozenset({"tasks", "layers", "tensors", "output"}),
    output_problems: frozenset({"output"}),
    selection_problems: frozenset({"output", "method", "compare", "evaluation"}),
    adapter_problems: frozenset({"output", "method", "compare", "token_rows", "tokenizer"}),
    _tokenizer_problems: frozenset({"tasks", "tokenizer"}),
    guard_problems: frozenset({"tasks", "evaluation"}),
    prompt_problems: frozenset({"evaluation", "routing"}),
    rounding_problems: frozenset({"evaluation"}),
    routing_problems: frozenset({"tasks", "evaluation", "routing"}),
    training_problems: frozenset({"tasks", "training", "evaluation"}),
    alternation_problems: frozenset({"tasks", "training", "output", "sites"}),
}


def contradictions(recipe: Recipe, lacking: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Yield contradictions between the keys of a recipe whose values are valid one by one.

    Args:
        recipe: What is valid of it.
        lacking: Top-level keys from which something was left out; what depends on it is not checked.
    """
    for check, needed in _CHECKS.items():
        if not needed & lacking:
            yield from check(recipe)
