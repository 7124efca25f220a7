"""The verb that lists merge methods."""

from __future__ import annotations

from hub_magmax.cli.terminal import Answer, verb


@verb
def methods() -> Answer:
    """List the merge methods and their options.

    \b
    Example:
      hub-magmax methods
    """
    from hub_magmax.methods import get_method, method_names

    found = [get_method(name) for name in method_names()]
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
