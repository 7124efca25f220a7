"""Problems of a recipe: key path, line and nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)

from hub_magmax.errors import HubMagmaxError, KeyPath, Problem, RecipeError, place_in_recipe
from hub_magmax.recipe.strict_yaml import Place
from hub_magmax.text import nearest, shown

#: Problems listed in one message; whoever sees more has made one mistake many times.
_SHOWN_PROBLEMS = 20

#: Characters of a problem: some of them quote a name that may be of any length.
_SHOWN_CHARACTERS = 500


#: How keys are written whose value is of another form, by the last name in their path.
_FORMS: Mapping[str, str] = {
    "tasks": "tasks: [{name: animals, model: ./animals}]",
    "method": "method: {name: ties, density: 0.2}",
    "preference": (
        "preference: {weights: {animals: 0.7, plants: 0.3}}, and leave it out for every task the same"
    ),
    "weights": "weights: {animals: 0.7, plants: 0.3}",
    "coefficients": "coefficients: {animals: 1, plants: -0.5}",
    "geometric": "geometric: {ratio: 0.5}",
    "linear": "linear: {ratio: 0.5}",
    "power": "power: {exponent: 2}",
    "classes": "classes: {animals: [cat, dog]}",
    "target": "target: {dataset: me/site-photos, split: train}",
    "train": "train: {animals: {dataset: me/animals, split: train}}",
    "tune": "tune: {dataset: me/site-photos, split: train}",
    "report": "report: {dataset: me/site-photos, split: test}",
    "evaluation": "evaluation: {tasks: {animals: {dataset: me/animals, split: test}}}",
    "routing": "routing: {tasks: {animals: {dataset: me/animals, split: train}}}",
    "tensors": 'tensors: [{match: "lm_head.*", take: base_model}]',
    "layers": "layers: [{take: base_model, blocks: [0, 16]}, {take: math, blocks: [8, 24]}]",
    "gradient": "gradient: [0, 0.5, 1]",
    "options": "options: {density: 0.3}",
    "output": "output: {path: merged}",
    "sites": "sites: {north: {preference: {weights: {animals: 1}}}, south: {}}",
}
_OTHER_FORMS = ("model_type", "dict_type", "tuple_type", "list_type")

_WEIGHTS = "shares of tasks are said as preference: {weights: {animals: 0.7, plants: 0.3}}"

#: What is meant by keys that other programs have, or that belong elsewhere.
_MEANT: Mapping[str, str] = {
    "weight": _WEIGHTS,
    "weights": _WEIGHTS,
    "lambda": "it is called scaling here",
    "models": "the checkpoints are `tasks`, each with a name and a model",
    "merge_method": "it is called method here",
    "parameters": "options belong to `method`, and weights to `preference`",
    "dtype": "the output's is said as output: {dtype: bfloat16}",
    "slices": "a stack of layers is said as layers: [{take: base_model, blocks: [0, 16]}]",
}

#: What a value should be, by pydantic's name of what is wrong, in place of pydantic's words.
_RULES: Mapping[str, str] = {
    "float_type": "be a number",
    "float_parsing": "be a number",
    "finite_number": "be a finite number",
    "int_type": "be a whole number",
    "int_parsing": "be a whole number",
    "int_from_float": "be a whole number",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "dict_type": "be a mapping",
    "tuple_type": "be a list, such as [one, another]",
    "list_type": "be a list, such as [one, another]",
    "string_type": "be text",
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "literal_error": "be {expected}",
    "string_too_short": "not be empty",
    "string_too_long": "have at most {max_length} characters",
    "too_short": "hold at least {min_length}",
    "too_long": "hold at most {max_length}, not {actual_length}",
}

#: Other names of dtypes.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


#: Where pydantic finds what is wrong with a key of a mapping, below that key.
_OF_KEY = "[key]"

#: What to do about a value whose problem says no more.
SEE_SCHEMA = "`hub-magmax schema` prints the values that each key takes"


def conflict(path: KeyPath, message: str, hint: str = "") -> Problem:
    """Return the problem of a value that does not fit others of the recipe."""
    return Problem("conflict", message, key=path, hint=hint)


def told(problem: Problem) -> str:
    """Return what is wrong and what to do, as a clause, cut where it quotes a name of any length."""
    hint = "" if problem.hint == SEE_SCHEMA else problem.hint
    if problem.expected or hint[:1].isupper():
        text = str(RecipeError(problem.message, expected=problem.expected, hint=hint)).rstrip(".")
    else:
        text = "; ".join(part for part in (problem.message, hint) if part)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def together(problems: Sequence[Problem]) -> RecipeError:
    """Return one error of several problems of keys; `in_recipe` adds their places in a file."""
    if len(problems) == 1:
        (problem,) = problems
        return RecipeError(problem.message, key=problem.key, expected=problem.expected, hint=problem.hint)
    lines = "\n  - ".join(f"{problem.place}: {told(problem)}" for problem in problems)
    return RecipeError(f"{len(problems)} problems\n  - {lines}", where="recipe", problems=(*problems,))


def all_problems(
    problems: Iterable[Problem], where: str, places: Mapping[KeyPath, Place | str]
) -> RecipeError:
    """Return one error that lists the problems in the order of the file, each with its place there.

    Args:
        problems: At least one.
        where: Name of the recipe.
        places: Line and column by key path, where known, or the option that gives the value.
    """
    listed = [placed(problem, where, places) for problem in _without_misspelt(problems)]
    listed.sort(key=lambda problem: (problem.line or 0, problem.column or 0))
    if len(listed) == 1:
        place = f"{listed[0].file}, {_place(listed[0])}"
        return RecipeError(told(listed[0]), where=place, problems=(*listed,))
    options = [f"{problem.file}, " if problem.file != where else "" for problem in listed]
    found = [
        f"{option}{_place(problem)}: {told(problem)}" for option, problem in zip(options, listed, strict=True)
    ]
    if len(found) > _SHOWN_PROBLEMS + 1:
        found = [*found[:_SHOWN_PROBLEMS], f"and {len(found) - _SHOWN_PROBLEMS} more"]
    what = f"{len(listed)} problems\n  - " + "\n  - ".join(found)
    return RecipeError(what, where=where, problems=(*listed,))


def _without_misspelt(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield problems, but for missing keys that the hint about an unknown key beside them names."""
    found = tuple(problems)
    meant = {(problem.key[:-1], problem.hint) for problem in found if problem.kind == "unknown_key"}
    for problem in found:
        is_missing = problem.kind == "missing_key" and bool(problem.key)
        if not is_missing or (problem.key[:-1], f"did you mean {problem.key[-1]!r}?") not in meant:
            yield problem


def _place(problem: Problem) -> str:
    return problem.place if problem.key else ", ".join(filter(None, (problem.place, "(top level)")))


def placed(problem: Problem, file: str, places: Mapping[KeyPath, Place | str]) -> Problem:
    """Return a problem with its file, and with the line and column of its key, or of the nearest above.

    In place of the file stands the option that gives the value, or a part of it.
    """
    key = problem.key
    above = (key[:end] for end in range(len(key), 0, -1))
    below = (place for path, place in places.items() if isinstance(place, str) and path[: len(key)] == key)
    found = (*below, *(places[path] for path in above if path in places))
    place = found[0] if key and found else (None, None)
    if isinstance(place, str):
        return replace(problem, file=place)
    return replace(problem, file=file, line=place[0], column=place[1])


def in_recipe(error: HubMagmaxError, file: str, places: Mapping[KeyPath, Place | str]) -> HubMagmaxError:
    """Return an error about a key of the recipe with the key's place in the recipe's file.

    An error that is about no key, or says in which file it is, is returned as it is. The name of a
    checkpoint, or of a part of one, follows.
    """
    problem = error.problems[0]
    if not problem.key or problem.file:
        return error
    if len(error.problems) > 1:
        return all_problems(error.problems, file, places)
    own = error.where if error.where != place_in_recipe(problem.key) else ""
    problem = placed(problem, file, places)
    return error.with_problem(problem, ": ".join(filter(None, (f"{problem.file}, {problem.place}", own))))


# Complex, and flat: a branch for each kind of problem.
def explain(
    error: ValidationError, prefix: KeyPath, known: type[BaseModel] | list[str], owner: str = ""
) -> Iterator[Problem]:
    """Yield pydantic's findings as problems, unknown keys with the nearest valid one.

    Args:
        error: Findings of pydantic.
        prefix: Key path of the values that it checked.
        known: The model, or the valid keys where they are options of `owner`.
        owner: Name of a method or an evaluator.
    """
    unknown = f"{owner} has no option" if owner else "unknown key"
    entries = error.errors()
    for entry in entries:
        path = tuple(entry["loc"])
        if entry["type"] == "extra_forbidden":
            hint = _key_hint(_sought(entry), _known_keys(known, path[:-1]))
            yield Problem("unknown_key", f"{unknown} {shown(path[-1])}", key=prefix + path, hint=hint)
        elif entry["type"] == "missing":
            text = f"the key {path[-1]!r} is required"
            yield Problem("missing_key", text, key=prefix + path, hint=SEE_SCHEMA)
        elif entry["type"] != "too_short" or not any(_is_below(other["loc"], path) for other in entries):
            text, way = _value_text(entry, prefix + path, _known_keys(known, path))
            place = tuple(part for part in prefix + path if part != _OF_KEY)
            yield Problem("value", text, key=place, hint=way or SEE_SCHEMA)


def _is_below(path: KeyPath, above: KeyPath) -> bool:
    """Say whether a value is part of another one, which is too short only for lack of it."""
    return len(path) > len(above) and path[: len(above)] == above


def _sought(entry: Mapping[str, Any]) -> str:
    """Return an unknown key; for a task's weight that stands right below the preference, `weights`."""
    *above, key = entry["loc"]
    is_share = above == ["preference"] and isinstance(entry["input"], int | float)
    return "weights" if is_share else str(key)


def _key_hint(key: str, known: list[str]) -> str:
    if key.isdigit():
        return "decimals are written with a point, such as 0.5"
    return _MEANT.get(key) or nearest(key, known) or _expected(known)


def _expected(known: list[str]) -> str:
    more = "; options of the method are said as options: {density: 0.3}" if "options" in known else ""
    return f"expected one of {', '.join(known)}{more}" if known else ""


# Complex, and flat: a text for each kind of finding.
def _value_text(entry: Mapping[str, Any], path: KeyPath, keys: list[str]) -> tuple[str, str]:
    """Return what is wrong about a value, and how it is written where that can be told.

    Args:
        entry: Finding of pydantic.
        path: Key path of the value.
        keys: Valid keys of the value, if it should be a mapping of those.
    """
    value = entry["input"]
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    is_model = entry["type"] == "model_type"
    if entry["type"] in _OTHER_FORMS and (form := _form(path, value, keys if is_model else [])):
        return f"{shown(value, 60)} has another form than expected", form
    if is_model:
        return f"{shown(value, 60)} should be a mapping", f"its keys are {', '.join(keys)}"
    if entry["type"] == "string_pattern_mismatch" and key in ("name", _OF_KEY):
        rule = "use up to 64 letters, digits, _, . and -, the first a letter or digit"
        return f"{shown(value, 60)} cannot be a name", rule
    text = _rule(entry)
    text = f"{shown(value, 60)} {text}" if text.startswith("should") else text
    return text, f"write {meant}" if (meant := _meant(value, entry)) else ""


# Complex, and flat: a form for each place.
def _form(path: KeyPath, value: Any, keys: list[str]) -> str:
    """Return how a data set, or the last known key of a path, is written; empty where none is known."""
    last = path[-1] if path else ""
    if "dataset" in keys and last not in _FORMS:
        names = value if isinstance(value, list) and value else [value]
        is_named = all(isinstance(name, str) and name.isprintable() for name in names)
        more = "; of several files, name the folder that holds them" if is_named and len(names) > 1 else ""
        return f"write {last}: {{dataset: {names[0] if is_named else f'me/{last}'}}}{more}"
    if last == "tasks" and len(path) > 1:
        return "write tasks: {animals: {dataset: me/animals, split: test}}"
    key = str(next((part for part in reversed(path) if part in _FORMS), ""))
    if key == "preference" and value == "uniform":
        return "leave preference out: then every task counts the same"
    if key == "preference" and isinstance(value, str) and value in _FORMS:
        return f"write preference: {{{_FORMS[value]}}}"
    return f"write {_FORMS[key]}" if key else ""


def _rule(entry: Mapping[str, Any]) -> str:
    """Return what a value should be, in our words where pydantic's are not those of a recipe."""
    if words := _RULES.get(entry["type"]):
        return f"should {words}".format_map({k: _plain(limit) for k, limit in entry.get("ctx", {}).items()})
    text: str = entry["msg"]
    return text.removeprefix("Value error, ").replace("Input should", "should", 1)


def _plain(limit: Any) -> Any:
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _meant(value: Any, entry: Mapping[str, Any]) -> str | None:
    """Return a value that was written in another way, as it is written here; None where it is not known."""
    if not isinstance(value, str):
        return None
    if entry["type"] == "literal_error":
        name = value.lower().removeprefix("torch.")
        name = _DTYPES.get(name, name)
        return name if f"'{name}'" in entry["msg"] else None
    text = value.strip().replace(",", ".")
    if entry["type"] not in ("float_parsing", "int_parsing", "int_from_float"):
        return None
    with suppress(ValueError, OverflowError):
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        return f"{number:.12g}"
    return None


def _known_keys(known: type[BaseModel] | list[str], path: KeyPath) -> list[str]:
    """Return the keys allowed at `path`, following fields to the models they hold."""
    if isinstance(known, list):
        return known
    model = known
    for part in path:
        inner = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        found = next(_models_in(inner.annotation), None) if inner else None
        model = found or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
