"""Options of merge methods and evaluators: declared by a signature, checked by pydantic, stored in a lock."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

Mark = TypeVar("Mark")

#: Recipe options as pydantic field definitions, (annotation, default) by name.
Options = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class AddedLater:
    """Marks an option, in its `Annotated`, that came after locks had been written.

    A lock leaves it out at its default value, so that locks and their digests stay what they were.
    """


@dataclass(frozen=True)
class PerTask:
    """Marks an option, in its `Annotated`, of which every task may have a value of its own.

    A recipe gives one value for all tasks, or a mapping with a value for each. The function gets a tuple of
    values, one per task in order; its default, if it has one, is a tuple of the one value of all.

    Attributes:
        each: Annotation of one value.
    """

    each: Any


class Registered(Protocol):
    """A merge method or an evaluator, as its decorator registers it."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Options: ...


def options_of(function: Callable[..., Any], *, without: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Return a function's keyword-only arguments, or a class's, as options.

    Raises:
        ValueError: If one has no annotation.
    """
    parameters = inspect.signature(function).parameters.values()
    namespace = vars(sys.modules[function.__module__])
    return {
        p.name: _field(function.__name__, namespace, p)
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in without
    }


def _field(owner: str, namespace: dict[str, Any], parameter: inspect.Parameter) -> tuple[Any, Any]:
    default = ... if parameter.default is parameter.empty else parameter.default
    annotation = parameter.annotation
    if annotation is parameter.empty:
        raise ValueError(f"{owner}: option {parameter.name!r} needs an annotation, such as float")
    if isinstance(annotation, str):  # the author's own text, where annotations are postponed
        annotation = eval(annotation, namespace)  # noqa: S307
    if _mark(annotation, PerTask) is not None and default is not ...:
        (default,) = default
    return (annotation, default)


def _mark(annotation: Any, kind: type[Mark]) -> Mark | None:
    """Return the mark of a kind in an annotation, None where there is none."""
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, kind)), None)


def per_task(entry: Registered, options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the options that have a value for each task, by the task's name."""
    return {
        name: options[name]
        for name, (annotation, _) in entry.options.items()
        if isinstance(options.get(name), Mapping) and _mark(annotation, PerTask) is not None
    }


def for_each_task(entry: Registered, options: Mapping[str, Any], num_tasks: int) -> dict[str, Any]:
    """Return options as a function takes them: a tuple with a value for each task, where these may differ.

    Args:
        entry: The method.
        options: As a lock has them; values by task are those of all tasks, in their order.
        num_tasks: Number of tasks.
    """
    found = dict(options)
    for name, (annotation, default) in entry.options.items():
        if _mark(annotation, PerTask) is not None:
            value = options.get(name, default)
            found[name] = tuple(value.values()) if isinstance(value, Mapping) else (value,) * num_tasks
            assert len(found[name]) == num_tasks, "checked with the recipe"
    return found


def locked_options(entry: Registered, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a lock has them: with defaults, without those that were added later and are unset.

    Raises:
        pydantic.ValidationError: With one entry per wrong, missing or unknown option.
    """
    checked = check_options(entry, options)
    left_out = [
        name
        for name, (annotation, default) in entry.options.items()
        if _mark(annotation, AddedLater) is not None and checked[name] == default
    ]
    return {name: value for name, value in checked.items() if name not in left_out}


def check_options(entry: Registered, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with types checked and defaults filled in.

    Raises:
        pydantic.ValidationError: With one entry per wrong, missing or unknown option.
    """
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {
        name: (_expected(annotation, options.get(name)), default)
        for name, (annotation, default) in entry.options.items()
    }
    model = create_model(entry.name, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
    checked: dict[str, Any] = model.model_validate(dict(options)).model_dump()
    return checked


def _expected(annotation: Any, value: Any) -> Any:
    """Return the annotation that a value is checked by: of values by task, where it is a mapping."""
    from pydantic import BeforeValidator

    mark = _mark(annotation, PerTask)
    if mark is None:
        return annotation
    if isinstance(value, list | tuple):
        return Annotated[Any, BeforeValidator(_refuse_list)]
    each: Any = mark.each
    return dict[str, each] if isinstance(value, Mapping) else each


def _refuse_list(value: Any) -> None:
    raise ValueError(
        "should be one value for all tasks, or a value for each by its name, {animals: 0.5, ...}"
    )


def allowed_values(annotation: Any) -> str:
    """Return in words the values that an option takes, such as "a number from 0 to 1"."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    mark = _mark(annotation, PerTask)
    if mark is not None:
        return f"{allowed_values(mark.each)}, or one for each task by its name"
    try:
        *first, last = dict.fromkeys(_worded(TypeAdapter(annotation).json_schema()))
        return f"{', '.join(first)} or {last}" if first else last
    except PydanticUserError:  # a plug-in's own type
        return getattr(annotation, "__name__", str(annotation))


def _worded(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a JSON schema of an option allows; that it may be unset is said with its default."""
    kind = schema.get("type")
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _worded(one)
    elif "enum" in schema or "const" in schema:
        yield from map(str, schema.get("enum", [schema.get("const")]))
    elif kind in _KINDS:
        yield _KINDS[kind] + _range(schema)
    elif kind != "null":
        yield "any value"


#: Kinds of JSON values in words.
_KINDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
}


def _range(schema: Mapping[str, Any]) -> str:
    """Return the limits of a number after its kind: " from 0 to 1", " above 0, at most 1"."""
    if {"minimum", "maximum"} <= schema.keys():
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    found = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return f" {' and '.join(found)}" if found else ""
