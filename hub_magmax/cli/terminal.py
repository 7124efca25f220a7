"""The terminal, for the verbs of the command line: answers, options, errors as a paragraph, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import click

from hub_magmax import __version__
from hub_magmax.cli.display import LOG, Display, LogOptions, displayed, library_bars_off
from hub_magmax.cli.work import BYTES, Work
from hub_magmax.errors import HubMagmaxError, Problem, RecipeError, explained
from hub_magmax.files import from_here
from hub_magmax.hub import without_cache_advice
from hub_magmax.text import holds_control, printable, spelled_out, without_secrets

#: Exit codes: an error, or something that is not as it should be; wrong usage; a model that regressed.
ERROR, USAGE, REGRESSED = 1, 2, 3

#: Where the context of a verb keeps what shows its progress.
_DISPLAY = "hub_magmax.display"


class Answer(NamedTuple):
    """The answer of a verb.

    Attributes:
        values: Printed as JSON, for programs.
        text: Printed for people.
        exit_code: `ERROR` where something that was checked is not as it should be, `REGRESSED` where a model
            fell behind.
    """

    values: Any
    text: str
    exit_code: int = 0


class TerminatedError(KeyboardInterrupt):
    """The system asks this process to end, which takes the way of Ctrl-C."""


class Verb(click.Command):
    """A command whose function returns an `Answer`, and whose errors are one paragraph each."""

    def invoke(self, ctx: click.Context) -> None:
        as_json, debug = ctx.params.pop("as_json"), ctx.params.pop("debug")
        options = _log_options(ctx)
        with library_bars_off(options), displayed(options, f"hub-magmax {self.name}") as display:
            ctx.meta[_DISPLAY] = display
            shown, code = self._answered(ctx, as_json, debug)
        if shown:
            click.echo(without_secrets(shown))
        if code:
            sys.exit(code)

    def _answered(self, ctx: click.Context, as_json: bool, debug: bool) -> tuple[str, int]:
        """Return the text for stdout, and the exit code."""
        LOG.debug("starting %s (hub-magmax %s)", self.name, __version__)
        try:
            with _termination(ctx.meta[_DISPLAY]):
                _refuse_unprintable(ctx.params)
                _fold(ctx.params, getattr(self.callback, "folded", {}))
                answer: Answer = super().invoke(ctx)
        except BrokenPipeError:
            return "", ERROR
        except KeyboardInterrupt as stopped:
            return _interruption(as_json, stopped)
        except Exception as error:
            told = explained(error)
            if debug or told is None:
                LOG.error("%s", traceback.format_exc())
                return "", ERROR
            if not any("--from-cache" in parameter.opts for parameter in self.params):
                told = without_cache_advice(told)
            return _refusal(_placed(told, ctx.params), as_json), told.exit_code
        if as_json:
            return json.dumps(answer.values, indent=2, ensure_ascii=False), answer.exit_code
        return printable(answer.text), answer.exit_code


#: Options of the log, in the order of the help; `LogOptions` holds their values.
LOG_OPTIONS = (
    click.Option(["-v", "--verbose"], is_flag=True, help="Say more, with times."),
    click.Option(["-q", "--quiet"], is_flag=True, help="Print results and errors only."),
    click.Option(["--log-format"], type=click.Choice(["text", "json"]), help="Form of the lines on stderr."),
)
_COMMON_OPTIONS = (
    click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON value for programs."),
    *LOG_OPTIONS,
    click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
)


def verb(function: Callable[..., Answer]) -> Verb:
    """Turn a function into the command of its name; its docstring is the help.

    A name that Python keeps for itself is written with an underscore at its end, `import_`; elsewhere one
    stands for a hyphen.
    """
    command = click.command(function.__name__.rstrip("_").replace("_", "-"), cls=Verb)(function)
    command.params += _COMMON_OPTIONS
    return command


def _log_options(ctx: click.Context) -> LogOptions:
    """Return the options that stand before or after the verb."""
    before = ctx.parent.params if ctx.parent else {}
    said = {name: ctx.params.pop(name) or before.get(name) for name in ("verbose", "quiet", "log_format")}
    if said["verbose"] and said["quiet"]:
        raise click.UsageError("--verbose and --quiet exclude each other.", ctx)
    return LogOptions(bool(said["verbose"]), bool(said["quiet"]), said["log_format"] or "text")


@contextmanager
def _termination(display: Display) -> Iterator[None]:
    """Let the system's request to end (SIGTERM) take the way of Ctrl-C; a second one ends the process.

    Both say at once what has to be finished first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        with suppress(RuntimeError):  # it came while a line was written
            display.say_what_is_waited_for()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise TerminatedError

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruption(as_json: bool, stopped: KeyboardInterrupt) -> tuple[str, int]:
    """Say that what is finished is kept; return the text for stdout and the exit code."""
    number = signal.SIGTERM if isinstance(stopped, TerminatedError) else signal.SIGINT
    if number == signal.SIGINT and threading.current_thread() is threading.main_thread():
        # Once more, while threads still end: at once, without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    what, hint = "interrupted", "What is finished is kept, and the same command goes on from there."
    if stopped.args:  # a verb says what to do next
        (hint,) = stopped.args
    if os.environ.get("RANK", "0") == "0":
        LOG.error("%s. %s", what.capitalize(), hint)
    return error_json("Interrupted", what, hint=hint) if as_json else "", 128 + number


def error_json(kind: str, what: str, *, where: str = "", hint: str = "") -> str:
    """Return what ends a command, and is none of the package's errors, in the form of those."""
    facts = HubMagmaxError(what, where=where, hint=hint, problems=(Problem(kind, what, hint=hint),)).to_dict()
    return json.dumps({"error": facts | {"kind": kind}}, indent=2, ensure_ascii=False)


def _refusal(error: HubMagmaxError, as_json: bool) -> str:
    """Return an error for programs, or write it for people."""
    if as_json:
        return json.dumps({"error": error.to_dict()}, indent=2, ensure_ascii=False)
    LOG.error("Error: %s", error)
    return ""


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
    """Return an error about a key of the recipe with its place, where the arguments name a recipe."""
    asked = arguments.get("asked")
    return asked.placed(error) if asked is not None and error.problems[0].key else error


def say(line: str) -> None:
    """Write a line for people to stderr; of several processes the first one does."""
    LOG.info("%s", line)


def wrote(paths: Iterable[Path]) -> str:
    """Return a line for each file that was written."""
    return "\n".join(f"wrote {from_here(path)}" for path in paths)


def table_and(files: Iterable[Path], table: str, form: str) -> str:
    """Return a table with the names of files below; in a form for programs alone, and the names on stderr."""
    if form == "text":
        return f"{table}\n{wrote(files)}"
    say(wrote(files))
    return table


@contextmanager
def progress(total: int, doing: str, unit: str = BYTES) -> Iterator[Callable[[int], None]]:
    """Show how much is done, rate and time left, while what this yields is called with each step's size."""
    display: Display = click.get_current_context().meta[_DISPLAY]
    with display.counting(Work(doing, total, unit)) as work:
        yield work.advance
