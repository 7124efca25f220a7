"""Options that several verbs share, and the values that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from hub_magmax.cli.terminal import Answer


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe on the command line: its path, and replacements for its lock and parts of its output."""

    recipe: Path
    lock_path: Path | None = None
    output: Path | None = None
    memory: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class DestinationOptions:
    """How to commit a model to its repository; None where the command line says nothing."""

    private: bool | None
    revision: str | None
    create_pr: bool | None
    commit_message: str | None

    def given(self) -> dict[str, Any]:
        """Return the values that the command line states, by attribute of `commits.Destination`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _send_nothing(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from hub_magmax.hub import offline

        context.with_resource(offline())


from_cache_option = click.option(
    "--from-cache",
    is_flag=True,
    expose_value=False,
    callback=_send_nothing,
    help="Send nothing: take revisions and files from the local cache, as with HF_HUB_OFFLINE=1.",
)

recipe_argument = click.argument("recipe", type=Path)

memory_option = click.option("--memory", help="Most memory of each process, such as 1GB.")
device_option = click.option(
    "--device", help="Merge on cpu, cuda, cuda:1 or mps, by torch, instead of what is fastest on the CPU."
)

faults_option = click.option(
    "--in-spite-of",
    multiple=True,
    metavar="FAULT",
    help="Merge although the checkpoints have this fault, by the name that the error gives; can be repeated.",
)


def recipe_options(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Add the argument RECIPE and its options; the function gets them as `asked`, a `RecipeOptions`."""
    for option in (
        from_cache_option,
        click.option("--output", type=Path, help="Folder to create, instead of the recipe's."),
        click.option(
            "--lock",
            "lock_path",
            type=Path,
            help="Lock to follow; by default the one beside the recipe, if it is there.",
        ),
        recipe_argument,
    ):
        function = option(function)
    return _folding(function, "asked", RecipeOptions)


def destination_options(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Add options of a commit; the function gets them as `to`, a `DestinationOptions`."""
    for option in (
        click.option("--commit-message", help="Title of the commit; `Add merged model`."),
        click.option("--create-pr", is_flag=True, default=None, help="Open a pull request instead."),
        click.option("--revision", help="Branch to commit to."),
        click.option("--private", is_flag=True, default=None, help="Make a new repository private."),
    ):
        function = option(function)
    return _folding(function, "to", DestinationOptions)


def _folding(function: Any, name: str, kind: type) -> Callable[..., Answer]:
    function.folded = {**getattr(function, "folded", {}), name: kind}
    return function  # type: ignore[no-any-return]
