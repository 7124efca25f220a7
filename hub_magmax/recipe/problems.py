"""Problems of a recipe: key path, line and nearest valid name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    for entry in error.errors():
        path = tuple(entry["loc"])
        if entry["type"] == "extra_forbidden":
            keys = known if isinstance(known, list) else _known_keys(known, path[:-1])
            hint = nearest(str(path[-1]), keys) or f"expected one of {', '.join(keys)}"
            yield prefix + path, f"{unknown} {shown(path[-1])}; {hint}"
        elif entry["type"] == "missing":
            yield prefix + path, f"the key {path[-1]!r} is required"
        else:
            text = entry["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
            yield prefix + path, f"{shown(entry['input'], 60)} {text}" if text.startswith("should") else text


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
