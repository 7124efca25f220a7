"""The terminal, for the verbs of the command line: answers, options, errors as a paragraph, progress bars."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import click

from hub_magmax.errors import HubMagmaxError, RecipeError, explained
from hub_magmax.files import from_here
from hub_magmax.text import holds_control, printable, spelled_out, without_secrets


class Answer(NamedTuple):
    """The answer of a verb.

    Attributes:
        values: Printed as JSON, for programs.
        text: Printed for people.
        exit_code: 1 where something that was checked is not as it should be.
    """

    values: Any
    text: str
    exit_code: int = 0


class Verb(click.Command):
    """A command whose function returns an `Answer`, and whose errors are one paragraph each."""

    def invoke(self, ctx: click.Context) -> None:
        as_json, debug = ctx.params.pop("as_json"), ctx.params.pop("debug")
        try:
            _refuse_unprintable(ctx.params)
            _fold(ctx.params, getattr(self.callback, "folded", {}))
            answer: Answer = super().invoke(ctx)
        except BrokenPipeError:
            sys.exit(1)
        except Exception as error:
            told = explained(error)
            if debug or told is None:
                say(traceback.format_exc())
            else:
                _print_error(_placed(told, ctx.params), as_json)
            sys.exit(1)
        shown = json.dumps(answer.values, indent=2, ensure_ascii=False) if as_json else printable(answer.text)
        click.echo(without_secrets(shown))
        if answer.exit_code:
            sys.exit(answer.exit_code)


def verb(function: Callable[..., Answer]) -> Verb:
    """Turn a function into the command of its name; its docstring is the help."""
    function = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(function)
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON value for programs.")(
        function
    )
    return click.command(cls=Verb)(function)


def _fold(arguments: dict[str, Any], folded: Mapping[str, Any]) -> None:
    """Replace the arguments that are fields of a dataclass by one argument that holds them."""
    for name, kind in folded.items():
        found = [field.name for field in fields(kind) if field.name in arguments]
        arguments[name] = kind(**{field: arguments.pop(field) for field in found})


#: Arguments that are texts, not names.
_TEXTS = ("commit_message",)


def _refuse_unprintable(arguments: Mapping[str, Any]) -> None:
    """Raise RecipeError for a name or a path that no terminal shows and no recipe can store.

    Paths are no `click.Path`, which looks for the file before this check.
    """
    for name, value in arguments.items():
        if isinstance(value, str | Path) and name not in _TEXTS and holds_control(str(value)):
            raise RecipeError(
                "this holds control characters, or bytes that are not text",
                where=f"{name.replace('_', '-')} {spelled_out(str(value))}",
                expected="characters that can be shown",
                hint="Check how the shell quotes it, or rename the file or folder.",
            )


def _placed(error: HubMagmaxError, arguments: Mapping[str, Any]) -> HubMagmaxError:
    """Return an error about a key with its line, where the arguments name the recipe."""
    recipe = getattr(arguments.get("asked"), "recipe", arguments.get("recipe"))
    if recipe is None or not error.problems[0].key:
        return error
    from hub_magmax.recipe.loading import with_place

    return with_place(error, recipe)


def _print_error(error: HubMagmaxError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, indent=2, ensure_ascii=False))
    else:
        click.echo(f"Error: {printable(str(error))}", err=True)


def say(line: str) -> None:
    """Print a line for people to stderr."""
    click.echo(without_secrets(printable(line)), err=True)


def quiet(line: str) -> None:
    """Print nothing: `say` of all processes but the first."""


def wrote(paths: Iterable[Path]) -> str:
    """Return a line for each file that was written."""
    return "\n".join(f"wrote {from_here(path)}" for path in paths)


@contextmanager
def progress(total: int, doing: str = "merging") -> Iterator[Callable[[int], None]]:
    """Show bytes written and time left, on a terminal, unless Hub progress bars are switched off."""
    from huggingface_hub.utils import tqdm

    make_bar: Any = tqdm
    bar = make_bar(total=total, unit="B", unit_scale=True, desc=doing, disable=None)
    with bar:
        yield bar.update
