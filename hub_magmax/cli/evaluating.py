"""Verbs for a merged model: evaluate, card."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, recipe_options
from hub_magmax.cli.terminal import Answer, say, verb, wrote

if TYPE_CHECKING:
    from hub_magmax.evaluation.scores import Scores
    from hub_magmax.evaluation.tables import Format
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe

LOG = logging.getLogger(__name__)


@verb
@recipe_options
@click.option("--again", is_flag=True, help="Score base model and tasks' checkpoints again too.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Show N examples of each task, and what the models make of them; nothing is scored or written.",
)
@click.option(
    "--new-data", is_flag=True, help="Score on data that changed since the merge; its lock says so."
)
@format_option
def evaluate(asked: RecipeOptions, again: bool, samples: int | None, new_data: bool, form: Format) -> Answer:
    """Score RECIPE's merged model, its base model and its tasks.

    \b
    Example:
      hub-magmax evaluate recipe.yaml
      hub-magmax evaluate recipe.yaml --samples 5
    """
    from hub_magmax.cli.asked import read_merged
    from hub_magmax.evaluation.data import with_present_data
    from hub_magmax.evaluation.scores import write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.merging.output.relocking import write_lock_again
    from hub_magmax.processes import find_processes

    found, locked = read_merged(asked)
    locked = with_present_data(found, locked) if new_data else locked
    if samples is not None:
        return _shown(found, locked, samples)
    processes = find_processes(say)
    output = found.output_path
    scores = do_evaluate(found, locked, output, again=again, processes=processes, report=say)
    if not processes.is_first:
        return Answer({}, "")
    write_scores(scores, output)
    if new_data:
        write_lock_again(output, locked)
    return _assessed(scores, locked, form)


def _assessed(scores: Scores, locked: Lock, form: Format) -> Answer:
    """Return the scores and how the model does by them; warn of one that is below its base model."""
    from hub_magmax.reporting.headline import assessment_of, result

    below, rest = result(scores, locked)
    if below:
        LOG.warning("%s", below)
    values = {**json.loads(scores.to_json()), "assessment": assessment_of(scores, locked)}
    sentences = " ".join(filter(None, (below, rest))) if form == "text" else ""
    return Answer(values, "\n\n".join(filter(None, (scores.table(form), sentences))))


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
