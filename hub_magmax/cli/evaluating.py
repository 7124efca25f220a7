"""Verbs for a merged model: evaluate, card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, recipe_options
from hub_magmax.cli.terminal import Answer, quiet, say, verb, wrote

if TYPE_CHECKING:
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe


@verb
@recipe_options
@click.option("--again", is_flag=True, help="Score base model and tasks' checkpoints again too.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Show N examples of each task, and what the models make of them; nothing is scored or written.",
)
def evaluate(asked: RecipeOptions, again: bool, samples: int | None) -> Answer:
    """Score RECIPE's merged model, its base model and its tasks.

    \b
    Example:
      hub-magmax evaluate recipe.yaml
      hub-magmax evaluate recipe.yaml --samples 5
    """
    from hub_magmax.cli.asked import read_merged
    from hub_magmax.evaluation.scores import write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.processes import find_processes

    found, locked = read_merged(asked)
    if samples is not None:
        return _shown(found, locked, samples)
    processes = find_processes(say)
    report = say if processes.is_first else quiet
    output = found.output_path
    scores = do_evaluate(found, locked, output, again=again, processes=processes, report=report)
    if not processes.is_first:
        return Answer({}, "")
    write_scores(scores, output)
    return Answer(json.loads(scores.to_json()), scores.table())


def _shown(recipe: Recipe, locked: Lock, count: int) -> Answer:
    from hub_magmax.evaluation.samples import samples, table

    seen = samples(recipe, locked, recipe.output_path, count, report=say)
    return Answer({"samples": [example.to_dict() for example in seen]}, table(seen))


@verb
@recipe_options
def card(asked: RecipeOptions) -> Answer:
    """Write the card of RECIPE's merged model anew.

    \b
    Example:
      hub-magmax card recipe.yaml
    """
    from hub_magmax.cli.asked import read_merged
    from hub_magmax.reporting.card_file import write_stored_card

    path = write_stored_card(*read_merged(asked))
    return Answer({"card": str(path)}, wrote([path]))
