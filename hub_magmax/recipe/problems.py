"""Problems of a recipe: key path, line and nearest valid name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)

from hub_magmax.errors import RecipeError
from hub_magmax.text import nearest, shown

#: A key path, and what is wrong there.
KeyPath = tuple[str | int, ...]

Problem = tuple[KeyPath, str]

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
    "tensors": 'tensors: [{match: "lm_head.*", take: base_model}]',
    "output": "output: {path: merged}",
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
    "slices": "all layers are merged; rules for single tensors are `tensors`",
}

#: Other names of dtypes.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def all_problems(problems: list[Problem], where: str, lines: Mapping[KeyPath, int]) -> RecipeError:
    """Return one error that lists the problems, each with its key path and the nearest known line."""

    def place(path: KeyPath) -> str:
        key = ".".join(shown(part).strip("'") for part in path) or "(top level)"
        known = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
        return f"line {known}, {key}" if known else key

    texts = [
        text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..." for _, text in problems
    ]
    found = [f"{place(path)}: {text}" for (path, _), text in zip(problems, texts, strict=True)]
    if len(found) == 1:
        return RecipeError(texts[0], where=f"{where}, {place(problems[0][0])}")
    if len(found) > _SHOWN_PROBLEMS + 1:
        listed = [*found[:_SHOWN_PROBLEMS], f"and {len(found) - _SHOWN_PROBLEMS} more"]
    else:
        listed = found
    return RecipeError(f"{len(found)} problems\n  - " + "\n  - ".join(listed), where=where)


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
            keys = known if isinstance(known, list) else _known_keys(known, path[:-1])
            yield prefix + path, f"{unknown} {shown(path[-1])}; {_key_hint(str(path[-1]), keys)}"
        elif entry["type"] == "missing":
            yield prefix + path, f"the key {path[-1]!r} is required"
        elif entry["type"] != "too_short" or not any(_is_below(other["loc"], path) for other in entries):
            yield prefix + path, _value_text(entry, prefix + path)


def _is_below(path: KeyPath, above: KeyPath) -> bool:
    """Say whether a value is part of another one, which is too short only for lack of it."""
    return len(path) > len(above) and path[: len(above)] == above


def _key_hint(key: str, known: list[str]) -> str:
    if key.isdigit():
        return "decimals are written with a point, such as 0.5"
    return _MEANT.get(key) or nearest(key, known) or f"expected one of {', '.join(known)}"


def _value_text(entry: Mapping[str, Any], path: KeyPath) -> str:
    """Return what is wrong about a value, and how it is written where that can be told."""
    value = entry["input"]
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    if entry["type"] in _OTHER_FORMS and key in _FORMS:
        return f"{shown(value, 60)} has another form than expected; write {_FORMS[key]}"
    if entry["type"] == "string_pattern_mismatch" and key == "name":
        return f"{shown(value, 60)} is no name: up to 64 letters, digits, _, . and -, first a letter or digit"
    text = entry["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
    text = f"{shown(value, 60)} {text}" if text.startswith("should") else text
    return f"{text}; write {meant}" if (meant := _meant(value, entry)) else text


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


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the keys allowed at `path`, following fields to the models they hold."""
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
