"""Verbs for a merged model: evaluate, card."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, verb, wrote
from hub_magmax.files import from_here

if TYPE_CHECKING:
    from pathlib import Path

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
    from hub_magmax.cli.recipe_and_lock import linked_card, place_of_scores, read_merged
    from hub_magmax.errors import RecipeError
    from hub_magmax.evaluation.data import with_present_data
    from hub_magmax.evaluation.scores import SCORES_NAME, write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.merging.output.corrected_data import write_lock_again
    from hub_magmax.processes import find_processes

    found, locked = read_merged(asked)
    place = place_of_scores(asked, found)
    if new_data and place.prefix:
        raise RecipeError(
            "--new-data corrects the data of the model's own evaluation, and --set names another one",
            where="evaluate",
            hint="Leave out one of them.",
        )
    processes = find_processes(say)
    if new_data:
        locked = processes.first_decides(partial(with_present_data, found, locked))
    if samples is not None:
        return _shown(found, locked, samples)
    output = found.output_path
    scores = do_evaluate(
        found, locked, output, again=again, processes=processes, report=say, progress=progress
    )
    if not processes.is_first:
        return Answer({}, "")
    write_scores(scores, place.folder, place.prefix)
    if place.prefix:
        say(f"the model's own scores stay; wrote {from_here(place.path(SCORES_NAME))}")
    if new_data:
        write_lock_again(output, locked)
        say(f"the lock names the new data{_unsigned(output)}")
    for card in linked_card(asked, place):
        say(f"wrote {from_here(card)}, with these scores")
    return _assessed(scores, locked, form)


def _unsigned(folder: Path) -> str:
    """Return what to do about a signature that no longer fits, where there is one."""
    from hub_magmax.merging.output.report import SIGNATURE_NAME

    is_signed = (folder / SIGNATURE_NAME).is_file()
    return f": sign again (hub-magmax sign {from_here(folder)} --private-key KEY)" if is_signed else ""


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
    from hub_magmax.cli.recipe_and_lock import read_merged
    from hub_magmax.reporting.card_file import write_stored_card

    path = write_stored_card(*read_merged(asked))
    return Answer({"card": str(path)}, wrote([path]))
