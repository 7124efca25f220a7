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

    from hub_magmax.errors import HubMagmaxError
    from hub_magmax.evaluation.scores import Scores
    from hub_magmax.evaluation.tables import Format
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.result_files import ResultFiles
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

    Scores of another evaluation than the model's own recipe names go beside RECIPE.

    \b
    Example:
      hub-magmax evaluate recipe.yaml
      hub-magmax evaluate recipe.yaml --samples 5
    """
    from hub_magmax.cli.recipe_and_lock import files_beside, linked_card, read_merged
    from hub_magmax.evaluation.data import with_present_data
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.merging.output.evaluation_again import is_new_evaluation, with_new_data
    from hub_magmax.processes import find_processes
    from hub_magmax.recipe.result_files import place_of_scores

    found, locked = read_merged(asked)
    place, is_new = place_of_scores(found, files_beside(asked, found)), is_new_evaluation(found)
    if new_data and place.prefix:
        raise _not_its_own(found)
    processes = find_processes(say)
    if new_data or is_new or place.prefix:
        pin = with_present_data if new_data else with_new_data
        locked = processes.first_decides(partial(pin, found, locked))
    if samples is not None:
        return _shown(found, locked, samples)
    output = found.output_path
    scores = do_evaluate(
        found, locked, output, again=again, processes=processes, report=say, progress=progress
    )
    if not processes.is_first:
        return Answer({}, "")
    _write(scores, place)
    if new_data or is_new:
        _write_evaluation(found, locked, is_new=is_new)
    for card in linked_card(asked, place):
        say(f"wrote {from_here(card)}, with these scores")
    return _assessed(scores, locked, form)


def _not_its_own(recipe: Recipe) -> HubMagmaxError:
    from hub_magmax.errors import RecipeError
    from hub_magmax.recipe.schema import RECIPE_NAME

    return RecipeError(
        "--new-data corrects data of the evaluation that the model's own recipe names, and this is another",
        key=("evaluation",),
        expected=f"the evaluation in {from_here(recipe.output_path / RECIPE_NAME)}",
        hint="Leave out --new-data, and the scores go beside the recipe; or name the model's evaluation.",
    )


def _write(scores: Scores, place: ResultFiles) -> None:
    from hub_magmax.evaluation.scores import SCORES_NAME, write_scores

    write_scores(scores, place.folder, place.prefix)
    if place.prefix:
        wrote = f"wrote {from_here(place.path(SCORES_NAME))}"
        say(f"the model's own recipe names another evaluation, whose scores stay: {wrote}")


def _write_evaluation(recipe: Recipe, locked: Lock, *, is_new: bool) -> None:
    """Have the model's own recipe and lock name the evaluation and its data, and say so."""
    from hub_magmax.merging.output.evaluation_again import write_evaluation_again

    write_evaluation_again(recipe, locked)
    what = "the model's recipe names this evaluation now" if is_new else "the lock names the new data"
    say(f"{what}{_unsigned(recipe.output_path)}")


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
