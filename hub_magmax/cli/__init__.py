"""The command line: the table of verbs, and the command that lists them."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from keyword import iskeyword

import click

from hub_magmax import __version__
from hub_magmax.cli.terminal import LOG_OPTIONS, USAGE, error_json
from hub_magmax.text import nearest

#: Each verb and the module of this package that holds its function, imported when the verb is used or listed.
VERBS = {
    "alternate": "training",
    "apply": "fleet",
    "blindspots": "analysing",
    "canary": "fleet",
    "card": "evaluating",
    "compare": "analysing",
    "diagnose": "analysing",
    "doctor": "doctor",
    "evaluate": "evaluating",
    "finetune": "training",
    "fleet": "fleet",
    "history": "fleet",
    "import": "importing",
    "lock": "merging",
    "merge": "merging",
    "methods": "methods",
    "plan": "merging",
    "predict": "decisions",
    "predict-merge": "mergeability",
    "prefer": "recipes",
    "push": "publishing",
    "quickstart": "quickstart",
    "replay": "decisions",
    "rollback": "fleet",
    "route": "routing",
    "run": "merging",
    "schema": "recipes",
    "sign": "fleet",
    "sweep": "analysing",
    "tails": "analysing",
    "validate": "recipes",
    "verify": "fleet",
}


class VerbGroup(click.Group):
    """The commands that `VERBS` names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        name = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"hub_magmax.cli.{VERBS[cmd_name]}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = nearest(args[0], sorted(VERBS))
            raise click.UsageError(f"{error.message} {hint[:1].upper()}{hint[1:]}".strip(), ctx) from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AS_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except KeyboardInterrupt:  # before the verb began
            sys.exit(128 + signal.SIGINT)
        except click.UsageError as error:
            if not ctx.meta[_AS_JSON]:
                raise
            where = error.ctx.command_path if error.ctx else ""
            click.echo(error_json("UsageError", error.format_message(), where=where))
            sys.exit(USAGE)


#: Where the context keeps whether programs read the answer.
_AS_JSON = "hub_magmax.as_json"


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=list(LOG_OPTIONS),
)
@click.version_option(__version__, prog_name="hub-magmax")
def main(verbose: bool, quiet: bool, log_format: str | None) -> None:
    """\b
    Merge fine-tuned models: try `quickstart`; then `validate`, `plan`, `run`.
    Exit codes: 0 done; 1 error; 2 usage; 3 regressed, differs; 130, 143 stopped.
    """
