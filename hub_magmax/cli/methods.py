"""The verb that lists merge methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from hub_magmax.cli.completing import complete_method
from hub_magmax.cli.terminal import Answer, verb

if TYPE_CHECKING:
    from hub_magmax.methods.registry import MergeMethod


@verb
@click.argument("name", required=False, shell_complete=complete_method)
def methods(name: str | None) -> Answer:
    """List the merge methods, or the options of NAME.

    \b
    Examples:
      hub-magmax methods
      hub-magmax methods ties
    """
    from hub_magmax.methods import get_method, method_names

    found = [get_method(name) for name in ([name] if name else method_names())]
    values = [
        {
            "name": method.name,
            "summary": method.summary,
            "scaling": method.scaling,
            "source": method.source,
            "uses_preference": method.uses_preference,
            "options": {option.name: option.to_dict() for option in _options(method)},
        }
        for method in found
    ]
    width = max(len(method.name) for method in found)
    lines = []
    for method in found:
        lines.append(f"{method.name:<{width}}  {method.summary}")
        lines += [f"{'':<{width}}  {line}" for line in (_details(method) if name else [_in_short(method)])]
    return Answer(values, "\n".join(lines))


class _Option(NamedTuple):
    """An option of a method, in words."""

    name: str
    allowed: str
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is ...

    @property
    def told_default(self) -> str:
        if self.is_required:
            return "required"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return "not set" if self.default is None else str(self.default)

    def to_dict(self) -> dict[str, Any]:
        default = None if self.is_required else self.default
        return {"allowed": self.allowed, "default": default, "required": self.is_required}


def _options(method: MergeMethod) -> list[_Option]:
    from hub_magmax.options import allowed_values

    return [
        _Option(name, allowed_values(annotation), default)
        for name, (annotation, default) in method.options.items()
    ]


def _in_short(method: MergeMethod) -> str:
    """Return the default of every option, in one line."""
    told = [f"{option.name}: {option.told_default}" for option in _options(method)]
    return ", ".join([f"scaling: {method.scaling:g}", *told])


def _details(method: MergeMethod) -> list[str]:
    """Return a line for each option: its values, and its default."""
    options = [_Option("scaling", "a number, or auto", f"{method.scaling:g}"), *_options(method)]
    width = max(len(option.name) for option in options)
    return [
        f"{option.name:<{width}}  {option.allowed} "
        + ("(required)" if option.is_required else f"(default: {option.told_default})")
        for option in options
    ]
