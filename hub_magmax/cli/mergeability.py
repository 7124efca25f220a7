"""The verb that predicts how much merges keep: predict-merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, metric_options, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, table_and, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


@verb
@recipe_options
@click.option("--history", required=True, help="Folder of finished merges, or a user on the Hub.")
@metric_options
@format_option
def predict_merge(asked: RecipeOptions, history: str, rank: int, examples: int, form: Format) -> Answer:
    """Predict how much of RECIPE's tasks each method keeps.

    For every pair of tasks, and for all, as share of their own checkpoints'
    scores: by effects of tasks that add up, and by ridge regression on metrics of
    pairs. Both are fitted on finished merges of equal weights, in the folder or
    below it, or in the repositories: scores, and metrics that `diagnose --metrics` wrote. How well each
    does for a new task is told below. Writes predictions.json.

    \b
    Example:
      hub-magmax predict-merge recipe.yaml --history .
    """
    from hub_magmax.analysis.predicting_merges import PREDICTIONS_NAME
    from hub_magmax.cli.recipe_and_lock import checked_beside, read_locked
    from hub_magmax.files import write_json
    from hub_magmax.recipe.result_files import place_of_results
    from hub_magmax.studies import find_history, predicted

    beside = checked_beside(asked, [PREDICTIONS_NAME])
    known = find_history(history, report=say)  # before the lock, which may take minutes
    found, locked = read_locked(asked)
    place = place_of_results(found, locked, beside)
    place.check([PREDICTIONS_NAME])
    predictions = predicted(found, known, locked, rank=rank, examples=examples, report=say, progress=progress)
    values = predictions.to_dict()
    file = write_json(place.path(PREDICTIONS_NAME), values)
    return Answer(values, table_and([file], predictions.table(form), form))
