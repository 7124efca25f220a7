"""Checks of the rules for tensors, and of options by task, against each other and the rest of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import ValidationError

from hub_magmax import methods
from hub_magmax.errors import KeyPath, Problem, RecipeError
from hub_magmax.options import check_options, per_task
from hub_magmax.recipe.merge_values import with_numbers
from hub_magmax.recipe.problems import conflict, explain
from hub_magmax.recipe.schema import Method, Recipe
from hub_magmax.recipe.tensor_rules import Gradient, TensorRule, gradients_in, is_gradient
from hub_magmax.recipe.values import AUTO
from hub_magmax.text import listed

#: Keys of a rule that hold numbers by task.
_BY_TASK = ("weights", "coefficients")


def takes_coefficients(method: Method, **options: Any) -> bool:
    """Say whether a method takes coefficients, with these options besides its own."""
    with suppress(RecipeError):
        return method.name != AUTO and methods.get_method(method.name).multiplies(method.options | options)
    return False  # reported with the name


def takers(method: Method) -> str:
    """Return which methods take coefficients; first of all the method itself, where an option lets it."""
    names = f"{listed(methods.multiplying_names())} take coefficients"
    if not takes_coefficients(method, **methods.ADDING):
        return names
    options = ", ".join(f"{key}: {value}" for key, value in methods.ADDING.items())
    return f"with {options} {method.name} adds what agrees, and takes coefficients; {names} always"


def rule_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with the rules for tensors, apart from names that no task has."""
    for position, rule in enumerate(recipe.tensors):
        path = ("tensors", position)
        yield from _form_problems(rule, path)
        yield from _factor_problems(rule, path, recipe)
        yield from _weight_problems(rule, path, recipe.method)
        yield from _method_problems(rule, path, recipe)
        yield from _option_problems(rule, path, recipe)


def named_tasks(rule: TensorRule) -> Iterator[tuple[KeyPath, str]]:
    """Yield the tasks that a rule names, each with its key path in the rule."""
    if rule.take not in (None, "base_model", "nothing"):
        yield ("take",), rule.source
    for key in _BY_TASK:
        yield from (((key, task), task) for task in getattr(rule, key) or ())


def _form_problems(rule: TensorRule, path: KeyPath) -> Iterator[Problem]:
    if rule.factor is None or rule.take is not None:
        yield from _take_problems(rule, path) if rule.take is not None else _lack_problems(rule, path)
    if rule.weights is not None and rule.coefficients is not None:
        text = "weights and coefficients both say how much each task counts"
        yield conflict((*path, "coefficients"), text, "leave one of them out")
    for place, found in gradients_in(rule.values):
        if found.over == "layers" and rule.layers is None:
            text = "there are no layers to spread the numbers over"
            yield conflict((*path, *place, "over"), text, "add layers: [first, end], or leave `over` out")


def _factor_problems(rule: TensorRule, path: KeyPath, recipe: Recipe) -> Iterator[Problem]:
    """Yield a factor of what is not copied."""
    if rule.factor is None:
        return
    if recipe.output.is_adapter:
        text = "an adapter's products are added to weights that are not multiplied"
        yield conflict((*path, "factor"), text, "leave factor out")
    elif rule.take == "nothing":
        yield conflict((*path, "factor"), "what is left out has no values to multiply", "leave factor out")
    elif rule.take is None and rule.values:
        text = f"factor multiplies tensors that are copied, and {next(iter(rule.values))} is for merged ones"
        yield conflict((*path, "factor"), text, "leave one of them out, or write a rule for each")
    elif rule.take is None and not recipe.layers:
        text = "factor multiplies tensors that are copied, and the rule does not say from where"
        yield conflict((*path, "factor"), text, "add take: base_model, or a task")


def _take_problems(rule: TensorRule, path: KeyPath) -> Iterator[Problem]:
    if not rule.model_fields_set & {"match", "layers"}:
        yield Problem("missing_key", "the key 'match' is required", key=path, hint="name the tensors to take")
    for key in rule.values:
        text = f"take copies the tensors, so {key} would have no effect"
        yield conflict((*path, key), text, "leave one of them out, or write a rule for each")


def _lack_problems(rule: TensorRule, path: KeyPath) -> Iterator[Problem]:
    if not rule.values:
        text = "the rule says neither whose the tensors are nor how they are merged"
        hint = "add take: base_model, or one of weights, coefficients, scaling and options"
        yield Problem("missing_key", text, key=path, hint=hint)


def _numbers(written: float | Gradient) -> tuple[float, ...]:
    return written.gradient if isinstance(written, Gradient) else (written,)


def _weight_problems(rule: TensorRule, path: KeyPath, method: Method) -> Iterator[Problem]:
    weights = {task: _numbers(written) for task, written in (rule.weights or {}).items()}
    for task, numbers in weights.items():
        if min(numbers) < 0:
            instead = "" if takes_coefficients(method, **rule.options or {}) else f"; {takers(method)}"
            hint = f"to subtract a task, give coefficients in place of weights{instead}"
            yield conflict((*path, "weights", task), f"{min(numbers):g} is no share of the tasks", hint)
    if weights and not any(any(numbers) for numbers in weights.values()):
        hint = "give at least one task a weight above 0, or say take: base_model"
        yield conflict((*path, "weights"), "no task has a weight", hint)


def _method_problems(rule: TensorRule, path: KeyPath, recipe: Recipe) -> Iterator[Problem]:
    """Yield numbers by task that the method does not take, with the options of the rule."""
    method = recipe.method
    if (key := _coefficients_key(rule, recipe)) and method.is_auto:
        text = "a comparison tries methods that need shares of the tasks"
        yield conflict((*path, key), text, "use weights")
    elif key and not takes_coefficients(method, **rule.options or {}):
        text = f"{method.name} needs shares of the tasks, which are weights"
        yield conflict((*path, key), text, takers(method))
    if rule.weights is not None and _ignores_preference(method.name):
        text = f"{method.name} ignores how much each task counts"
        yield conflict((*path, "weights"), text, "leave them out, or choose another method")


def _coefficients_key(rule: TensorRule, recipe: Recipe) -> str:
    """Return the key by which tensors of a rule are merged with coefficients, its own or the recipe's."""
    if rule.coefficients is not None:
        return "coefficients"
    are_recipes = recipe.preference is not None and recipe.preference.coefficients is not None
    return "options" if are_recipes and rule.options is not None and rule.weights is None else ""


def _ignores_preference(method: str) -> bool:
    with suppress(RecipeError):  # reported with the name
        return method != AUTO and not methods.get_method(method).uses_preference
    return False


def _option_problems(rule: TensorRule, path: KeyPath, recipe: Recipe) -> Iterator[Problem]:
    """Yield options that the method does not have, and values that it does not take."""
    if rule.options is None:
        return
    prefix = (*path, "options")
    if recipe.method.name == AUTO:
        yield conflict(prefix, "options belong to a method, and auto leaves it open", "name the method")
        return
    wrong = [*_wrong_gradients(rule.options, prefix)]
    yield from wrong
    with suppress(RecipeError):  # reported with the name
        method = methods.get_method(recipe.method.name)
        problems = dict[Problem, None]()
        for end in () if wrong else range(_most_numbers(rule.options)):
            options = with_numbers(rule.options, partial(_nth, end))
            try:
                check_options(method, {**recipe.method.options, **options})
            except ValidationError as error:
                found = explain(error, prefix, [*method.options], method.name)
                problems |= {problem: None for problem in found if problem.key[len(prefix)] in options}
        yield from problems


def _wrong_gradients(options: Any, path: KeyPath) -> Iterator[Problem]:
    """Yield gradients among options that are none."""
    if is_gradient(options):
        try:
            Gradient.model_validate(options)
        except ValidationError as error:
            yield from explain(error, path, Gradient)
    elif isinstance(options, Mapping):
        for key, value in options.items():
            yield from _wrong_gradients(value, (*path, key))


def _most_numbers(options: Mapping[str, Any]) -> int:
    return max((len(found.gradient) for _, found in gradients_in(options)), default=1)


def _nth(end: int, written: float | Gradient) -> float:
    """Return a number of a gradient, its last one where it has fewer."""
    numbers = _numbers(written)
    return numbers[min(end, len(numbers) - 1)]


def _options_by_task(recipe: Recipe) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Yield every option with values by task, and its key path."""
    written: dict[KeyPath, tuple[str, Mapping[str, Any]]] = {
        ("method",): (recipe.method.name, recipe.method.options)
    }
    compared = recipe.compare.tried_methods if recipe.compare else ()
    written |= {("compare", "methods", n): (method.name, method.options) for n, method in enumerate(compared)}
    written |= {("tensors", n, "options"): (recipe.method.name, own) for n, own in _of_rules(recipe)}
    for path, (name, options) in written.items():
        with suppress(RecipeError):  # reported with the name
            entry = methods.get_method(name) if name != AUTO else None
            found = per_task(entry, options) if entry is not None else {}
            yield from (((*path, name), by_task) for name, by_task in found.items())


def _of_rules(recipe: Recipe) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the options of each rule but numbers over the blocks, with the rule's position."""
    for position, rule in enumerate(recipe.tensors):
        yield position, {name: v for name, v in (rule.options or {}).items() if not is_gradient(v)}


def missed_tasks(recipe: Recipe) -> Iterator[Problem]:
    """Yield the options with values by task that miss some of the tasks."""
    for path, by_task in _options_by_task(recipe):
        if missing := [task for task in recipe.task_names if task not in by_task]:
            hint = "name every task, or write one value for all"
            yield conflict(path, f"there is no {path[-1]} for {listed(missing)}", hint)


def option_tasks(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield the tasks that options name, each with its key path."""
    for path, by_task in _options_by_task(recipe):
        yield from (((*path, task), task) for task in by_task)
