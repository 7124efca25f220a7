"""The verb that lists merge methods."""

from __future__ import annotations

import click

from hub_magmax.cli.completing import complete_method
from hub_magmax.cli.terminal import Answer, verb


@verb
@click.argument("name", required=False, shell_complete=complete_method)
def methods(name: str | None) -> Answer:
    """List the merge methods and their options, or those of NAME.

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
            "options": {name: str(default) for name, (_, default) in method.options.items()},
        }
        for method in found
    ]
    width = max(len(method.name) for method in found)
    lines = []
    for method in found:
        lines.append(f"{method.name:<{width}}  {method.summary}")
        options = ", ".join(f"{name}: {default}" for name, (_, default) in method.options.items())
        lines.append(f"{'':<{width}}  scaling: {method.scaling:g}" + (f", {options}" if options else ""))
    return Answer(values, "\n".join(lines))
