"""Verbs for a merged model: evaluate, card."""

from __future__ import annotations

import json

import click

from hub_magmax.cli.options import RecipeOptions, recipe_options
from hub_magmax.cli.terminal import Answer, quiet, say, verb, wrote


@verb
@recipe_options
@click.option("--again", is_flag=True, help="Score base model and tasks' checkpoints again too.")
def evaluate(asked: RecipeOptions, again: bool) -> Answer:
    """Score RECIPE's merged model, its base model and its tasks.

    \b
    Example:
      hub-magmax evaluate recipe.yaml
    """
    from hub_magmax.cli.asked import read_merged
    from hub_magmax.evaluation.scores import write_scores
    from hub_magmax.evaluation.scoring import evaluate as do_evaluate
    from hub_magmax.processes import find_processes

    found, locked = read_merged(asked)
    processes = find_processes(say)
    report = say if processes.is_first else quiet
    output = found.output_path
    scores = do_evaluate(found, locked, output, again=again, processes=processes, report=report)
    if not processes.is_first:
        return Answer({}, "")
    write_scores(scores, output)
    return Answer(json.loads(scores.to_json()), scores.table())


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
