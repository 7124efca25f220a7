"""Completion in shells: recipes, folders, names of methods."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

#: Endings of recipes.
_RECIPES = (".yaml", ".yml")


class FilePath(click.ParamType):  # type: ignore[type-arg]  # generic in later versions of click only
    """A path, which is not looked for; `click.Path` looks for it before it can be refused for its characters.

    Args:
        kind: `file`, `dir` or `recipe`, which shells complete.
    """

    name = "path"

    def __init__(self, kind: str = "file") -> None:
        self.kind = kind

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if self.kind != "recipe":
            return [CompletionItem(incomplete, type=self.kind)]
        folder, _, start = incomplete.rpartition("/")
        where = Path(f"{folder}/") if "/" in incomplete else Path()
        found = sorted(path.name for path in where.glob(f"{start}*") if path.suffix in _RECIPES)
        prefix = incomplete[: len(incomplete) - len(start)]
        # Folders on the way to others come first: click's script for bash forgets what stands before them.
        return [CompletionItem(incomplete, type="dir"), *(CompletionItem(prefix + name) for name in found)]


def complete_method(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the methods whose names start so."""
    from hub_magmax.methods import method_names

    return [CompletionItem(name) for name in method_names() if name.startswith(incomplete)]


def complete_setting(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return `method=NAME` for every method; other values have no names."""
    key, is_set, start = incomplete.partition("=")
    if is_set and key in ("method", "method.name"):
        return [CompletionItem(f"{key}={item.value}") for item in complete_method(context, parameter, start)]
    return [] if is_set else [CompletionItem("method=")] if "method".startswith(key) else []
