"""Options that several verbs share, and the values that they make."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from hub_magmax.cli.completing import FilePath, complete_setting
from hub_magmax.cli.terminal import Answer
from hub_magmax.evaluation.tables import FORMATS

if TYPE_CHECKING:
    from hub_magmax.errors import HubMagmaxError
    from hub_magmax.recipe.changes import Change
    from hub_magmax.recipe.loading import RecipeText


#: What stands for a recipe on standard input.
STDIN = "-"


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe on the command line: its path, and replacements for its lock and for values in it."""

    recipe: Path
    lock_path: Path | None = None
    settings: tuple[str, ...] = ()
    preference: str | None = None
    output: Path | None = None
    memory: str | None = None
    device: str | None = None
    site: str | None = None

    @cached_property
    def text(self) -> RecipeText:
        """The recipe's text, which standard input gives once, and the site whose recipe is meant."""
        from hub_magmax.recipe.foreign import STANDARD_INPUT
        from hub_magmax.recipe.loading import read_text, text_of

        is_stream = str(self.recipe) == STDIN
        found = text_of(sys.stdin.buffer, STANDARD_INPUT, Path()) if is_stream else read_text(self.recipe)
        return replace(found, site=self.site)

    @property
    def named(self) -> Path:
        """The path that names files beside the recipe: `mix.north.yaml` for the site north of `mix.yaml`."""
        if self.site is None:
            return self.recipe
        name = self.recipe.name.removesuffix(".yaml")
        return self.recipe.with_name(f"{name}.{self.site}.yaml")

    def of_site(self, site: str) -> RecipeOptions:
        """Return the same for one site of the recipe, whose text is not read again."""
        found = replace(self, site=site)
        found.__dict__["text"] = self.text.of_site(site)  # a cached property
        return found

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Values in place of the recipe's own."""
        from hub_magmax.recipe.changes import Change, parse_preference, parse_setting

        shares = [parse_preference(self.preference)] if self.preference is not None else []
        path = self.output and str(self.output.absolute())
        options = {
            "path": ("output", path),
            "memory": ("memory", self.memory),
            "device": ("device", self.device),
        }
        return (
            *(parse_setting(text) for text in self.settings),
            *shares,
            *(
                Change(f"--{name} {value}", ("output", key), value)
                for key, (name, value) in options.items()
                if value is not None
            ),
        )

    def placed(self, error: HubMagmaxError) -> HubMagmaxError:
        """Return an error about a key of the recipe with its line, or its option."""
        from hub_magmax.recipe.loading import with_place

        return with_place(error, self.text, self.changes)


class _Stated:
    """Options of which the command line states some; the others are None."""

    def given(self) -> dict[str, Any]:
        """Return the values that are stated, by attribute of what is made of them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class DestinationOptions(_Stated):
    """How to commit a model to its repository, by attribute of `commits.Destination`."""

    private: bool | None
    revision: str | None
    create_pr: bool | None
    commit_message: str | None
    private_key: Path | None


def _send_nothing(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from hub_magmax.hub import offline

        context.with_resource(offline())


from_cache_option = click.option(
    "--from-cache",
    is_flag=True,
    expose_value=False,
    callback=_send_nothing,
    help="Send nothing: read the local cache alone.",
)

recipe_argument = click.argument("recipe", type=FilePath("recipe"))


def from_option(what: str, **more: Any) -> Callable[..., Any]:
    """Return the option `--from`: the folder in which relative paths of something start."""
    text = f"{what} start; the current folder."
    return click.option("--from", "folder", type=FilePath("dir"), help=text, **more)


set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_setting,
    help="A value in place of the recipe's, such as method.scaling=0.4; can be repeated.",
)
site_option = click.option("--site", metavar="NAME", help="One of the recipe's sites.")
preference_option = click.option(
    "--preference",
    metavar="TASK=SHARE,...",
    help="Weights in place of the recipe's preference, or `uniform`.",
)

memory_option = click.option("--memory", help="Most memory of each process, such as 1GB.")
device_option = click.option("--device", help="cpu, cuda, cuda:1 or mps; else what is fastest.")

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Form of the table.",
)

faults_option = click.option(
    "--in-spite-of",
    multiple=True,
    metavar="FAULT",
    help="Accept a fault of checkpoints; can be repeated.",
)


def _adding(
    *options: Callable[..., Any], name: str = "", kind: type | None = None
) -> Callable[[Any], Callable[..., Answer]]:
    """Return a decorator that adds options, the last one first; with a `name`, the function gets a `kind`."""

    def add(function: Any) -> Callable[..., Answer]:
        for option in options:
            function = option(function)
        if kind is not None:
            function.folded = {**getattr(function, "folded", {}), name: kind}
        return function  # type: ignore[no-any-return]

    return add


#: Add RECIPE and values in place of its own; the function gets `asked`, a `RecipeOptions`.
changed_recipe = _adding(
    preference_option, set_option, site_option, recipe_argument, name="asked", kind=RecipeOptions
)


def _of_metrics(ctx: click.Context, parameter: click.Parameter, value: int) -> int:
    """Return the value of an option of metrics; refuse it on a command line that measures none."""
    is_written = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    if is_written and not ctx.params.get("metrics", True):
        raise click.UsageError(f"{parameter.opts[0]} counts for metrics of pairs alone: add --metrics.", ctx)
    return value


#: Add the options of metrics of pairs of tasks; a verb's own flag `--metrics`, if any, is eager.
metric_options = _adding(
    click.option(
        "--examples",
        type=click.IntRange(0),
        default=10,
        callback=_of_metrics,
        help="Of each task, on which metrics run models; 10.",
    ),
    click.option(
        "--rank",
        type=click.IntRange(0),
        default=10,
        callback=_of_metrics,
        help="Directions of each matrix that metrics compare; 10.",
    ),
)

#: Add the argument RECIPE and its options; the function gets them as `asked`, a `RecipeOptions`.
recipe_options = _adding(
    from_cache_option,
    click.option(
        "--output",
        type=FilePath("dir"),
        help="Folder of the merged model, instead of the recipe's; a push goes where the recipe says.",
    ),
    preference_option,
    set_option,
    site_option,
    click.option(
        "--lock",
        "lock_path",
        type=FilePath(),
        help="Lock to follow, instead of the one beside RECIPE.",
    ),
    recipe_argument,
    name="asked",
    kind=RecipeOptions,
)


#: Add options of a commit; the function gets them as `to`, a `DestinationOptions`.
destination_options = _adding(
    click.option("--private-key", type=Path, help="PEM file of a key: sign the model before the push."),
    click.option("--commit-message", help="Title of the commit; Add or Update merged model."),
    click.option("--create-pr", is_flag=True, default=None, help="Open a pull request instead."),
    click.option("--revision", help="Branch to commit to."),
    click.option("--private", is_flag=True, default=None, help="Make a new repository private."),
    name="to",
    kind=DestinationOptions,
)


@dataclass(frozen=True)
class DecodingOptions(_Stated):
    """How answers of a language model are decoded, by attribute of `predicting.Decoding`."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    chat: bool | None


#: Add options of a language model's answers; the function gets them as `how`, a `DecodingOptions`.
decoding_options = _adding(
    click.option("--chat", is_flag=True, default=None, help="Put each text into the chat template."),
    click.option("--seed", type=int, help="Of the first decision; the next has the next number."),
    click.option("--top-p", type=float, help="Draw among the tokens that sum to it; all."),
    click.option("--temperature", type=float, help="Draw tokens; else the most probable ones count."),
    click.option("--max-new-tokens", type=int, help="Where a language model's answer ends; 64."),
    name="how",
    kind=DecodingOptions,
)


@dataclass(frozen=True)
class ChainOptions(_Stated):
    """How chains of a language model are made, by attribute of `chains.ChainProtocol`."""

    layer: float | None
    position: int | None
    grafts: str | None
    answer: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None

    def given(self) -> dict[str, Any]:
        values = super().given()
        if self.grafts is not None:
            values["grafts"] = tuple(kind.strip() for kind in self.grafts.split(","))
        return values


class _Layer(click.ParamType):  # type: ignore[type-arg]  # generic in later versions of click only
    """A whole number, or a share with a point in it."""

    name = "layer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value) if "." in str(value) else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of a layer, such as 26, nor a share, such as 0.75")


#: Add options of sampled and deterministic chains; the function gets them as `how`, a `ChainOptions`.
chain_options = _adding(
    click.option("--top-p", type=float, help="Of sampled chains; 0.9."),
    click.option("--temperature", type=float, help="Of sampled chains; 0.7."),
    click.option("--max-new-tokens", type=int, help="Where an answer ends; 32."),
    click.option("--answer", help="line: an answer's first line (default); final: its last number or mark."),
    click.option("--grafts", metavar="KIND,...", help="Kinds, in place of all but gaussian."),
    click.option("--position", type=int, help="Token of the prompt, -1 the last."),
    click.option("--layer", type=_Layer(), help="Block, such as 26, or share of the depth; 0.75."),
    name="how",
    kind=ChainOptions,
)
