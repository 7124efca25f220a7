"""Verbs for a merged model: evaluate, card."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, verb, wrote
from hub_magmax.files import from_here

if TYPE_CHECKING:
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
@click.option(
    "--on-card", is_flag=True, help="Keep scores of another evaluation with the model, and on its card."
)
@format_option
def evaluate(
    asked: RecipeOptions, again: bool, samples: int | None, new_data: bool, on_card: bool, form: Format
) -> Answer:
    """Score RECIPE's merged model, its base model and its tasks.

    Scores of another evaluation than the model's own recipe names go beside RECIPE, or on its card.

    \b
    Example:
      hub-magmax evaluate recipe.yaml
      hub-magmax evaluate recipe.yaml --samples 5
    """
    from hub_magmax.cli.recipe_and_lock import files_beside, linked_card, read_merged, say_outdated
    from hub_magmax.evaluation.scores import FILES
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.processes import find_processes
    from hub_magmax.recipe.result_files import place_of_scores
    from hub_magmax.reporting.card_file import write_own_card

    found, locked = read_merged(asked)
    place, processes = place_of_scores(found, files_beside(asked, found)), find_processes(say)
    if on_card:
        place = replace(place, folder=found.output_path)
    locked = processes.first_decides(partial(_with_data, found, locked, place, new_data))
    if samples is not None:
        return _shown(found, locked, samples)
    processes.first_decides(partial(place.check, FILES))
    output = found.output_path
    scores = do_evaluate(
        found, locked, output, again=again, processes=processes, report=say, progress=progress
    )
    if not processes.is_first:
        return Answer({}, "")
    _store(scores, found, locked, place, new_data=new_data, on_card=on_card)
    if not place.prefix:
        say_outdated(asked)
    cards = linked_card(asked, place)
    if on_card and place.prefix:
        cards = [write_own_card(place.folder)]
    for card in cards:
        say(f"wrote {from_here(card)}, with these scores")
    return _assessed(scores, locked, form)


def _with_data(recipe: Recipe, locked: Lock, place: ResultFiles, new_data: bool) -> Lock:
    """Return the lock of a merged model, with data that it does not name, or that changed where this is said.

    Raises:
        RecipeError: If changed data is that of another evaluation than the model's own.
    """
    from hub_magmax.errors import RecipeError
    from hub_magmax.evaluation.data import with_present_data
    from hub_magmax.merging.output.evaluation_again import is_new_evaluation, with_new_data
    from hub_magmax.recipe.schema import RECIPE_NAME

    if not new_data:
        return with_new_data(recipe, locked) if place.prefix or is_new_evaluation(recipe) else locked
    if not place.prefix:
        return with_present_data(recipe, locked)
    raise RecipeError(
        "--new-data corrects data of the evaluation that the model's own recipe names, and this is another",
        key=("evaluation",),
        expected=f"the evaluation in {from_here(recipe.output_path / RECIPE_NAME)}",
        hint="Leave out --new-data, and the scores go beside the recipe; or name the model's evaluation.",
    )


def _store(
    scores: Scores, recipe: Recipe, locked: Lock, place: ResultFiles, *, new_data: bool, on_card: bool
) -> None:
    """Write the scores; have the model's own recipe and lock name what is new to them: evaluation, data."""
    from hub_magmax.evaluation.scores import SCORES_NAME, write_scores
    from hub_magmax.merging.output.evaluation_again import (
        name_evaluation,
        unsigned,
        write_evaluation_again,
    )

    write_scores(scores, place.folder, place.prefix)
    if place.prefix:
        wrote = f"wrote {from_here(place.path(SCORES_NAME))}"
        hint = "" if on_card else "; --on-card puts them on the model's card"
        say(f"the model's own recipe names another evaluation, whose scores stay: {wrote}{hint}")
    elif new_data:
        write_evaluation_again(recipe, locked)
        say(f"the lock names the new data{unsigned(recipe.output_path)}")
    elif name_evaluation(recipe, locked):
        say(f"the model's recipe names this evaluation now{unsigned(recipe.output_path)}")


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
@click.option(
    "--judgement", is_flag=True, help="Write judgement.html too: did it merge, what broke, how badly?"
)
def card(asked: RecipeOptions, judgement: bool) -> Answer:
    """Write the card of RECIPE's merged model anew.

    --judgement puts all that was measured and predicted of the merge's success
    on one page. Nothing is run for it; what was not measured is named there.

    \b
    Example:
      hub-magmax card recipe.yaml
      hub-magmax card recipe.yaml --judgement
    """
    from hub_magmax.cli.recipe_and_lock import files_beside, read_merged
    from hub_magmax.reporting.card_file import write_stored_card

    found, locked = read_merged(asked)
    if not judgement:
        path = write_stored_card(found, locked)
        return Answer({"card": str(path)}, wrote([path]))
    from hub_magmax.analysis.judgement_page import in_words, write_judgement
    from hub_magmax.analysis.judging import judge

    judged = judge(found, locked, files_beside(asked, found))
    page = write_judgement(judged, found, locked)
    path = write_stored_card(found, locked)  # which links the page
    values = {"card": str(path), "judgement": str(page), **judged.to_dict()}
    return Answer(values, f"{in_words(judged, locked)}\n\n{wrote([path, page])}")
