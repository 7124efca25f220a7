"""What recipes find by name: the package's own table first, then what other packages announce.

Built-in modules are imported when one of their names is looked up, and other packages by their entry
points, so that a recipe is checked without paying for what it does not use.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar

from hub_magmax.errors import RecipeError

#: Recipe options as pydantic field definitions, (annotation, default) by name.
Options = Mapping[str, tuple[Any, Any]]


class Named(Protocol):
    """Something that recipes call by name."""

    @property
    def name(self) -> str: ...


class WithOptions(Named, Protocol):
    """Something that recipes call by name and give options."""

    @property
    def options(self) -> Options: ...


Entry = TypeVar("Entry", bound=Named)


@dataclass(frozen=True)
class Registry(Generic[Entry]):
    """All entries of one kind.

    Attributes:
        noun: What an entry is called in messages.
        group: Entry points in which another package announces its own.
        built_in: Names of the built-in ones, and the module that defines each.
        kind: Class of an entry.
        attribute: Where a decorated function or class keeps its entry.
    """

    noun: str
    group: str
    built_in: Mapping[str, str]
    kind: type[Entry]
    attribute: str

    def names(self) -> tuple[str, ...]:
        """Return all names, the built-in ones first, then those of other packages."""
        return (*self.built_in, *sorted(self.plugins.keys() - self.built_in.keys()))

    def get(self, name: str) -> Entry:
        """Return the entry that recipes call `name`.

        Raises:
            RecipeError: If there is none, with the nearest name, or its package cannot be imported.
        """
        if name in self.built_in:
            module = importlib.import_module(self.built_in[name])
            entries = (getattr(value, self.attribute, None) for value in vars(module).values())
            return next(entry for entry in entries if isinstance(entry, self.kind) and entry.name == name)
        if name in self.plugins:
            return self._load(name)
        nearest = difflib.get_close_matches(name, self.names(), n=1)
        raise RecipeError(
            f"there is no {self.noun} {name!r}",
            expected=f"one of {', '.join(self.names())}",
            hint=f"Did you mean {nearest[0]!r}?" if nearest else "",
        )

    @cached_property
    def plugins(self) -> Mapping[str, Any]:
        """Entry points by name."""
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, name: str) -> Entry:
        try:
            entry = getattr(self.plugins[name].load(), self.attribute, None)
        except MemoryError:
            raise
        except Exception as error:  # whatever importing somebody's package may raise
            raise RecipeError(
                f"the plugin with the {self.noun} {name!r} cannot be imported "
                f"({type(error).__name__}: {error})",
                where=f"entry point in {self.group!r}",
                hint="Repair or uninstall the package that announces it.",
            ) from error
        if not isinstance(entry, self.kind) or entry.name != name:
            raise RecipeError(
                f"the entry point {name!r} in {self.group!r} is not a {self.noun} of that name",
                expected=f"something decorated with @{self.attribute}",
            )
        return entry


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
    return (annotation, default)


def check_options(entry: WithOptions, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with types checked and defaults filled in.

    Raises:
        pydantic.ValidationError: With one entry per wrong, missing or unknown option.
    """
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = dict(entry.options)
    model = create_model(entry.name, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
    checked: dict[str, Any] = model.model_validate(dict(options)).model_dump()
    return checked
