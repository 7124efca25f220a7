"""The verb that predicts how much merges keep: predict-merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, metric_options, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, table_and, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


@verb
@recipe_options
@click.option(
    "--history", type=click.Path(path_type=Path), required=True, help="Folder with finished merges."
)
@metric_options
@format_option
def predict_merge(asked: RecipeOptions, history: Path, rank: int, examples: int, form: Format) -> Answer:
    """Predict how much of RECIPE's tasks each method keeps.

    For every pair of tasks, and for all, as share of their own checkpoints'
    scores: by effects of tasks that add up, and by ridge regression on metrics of
    pairs. Both are fitted on finished merges of equal weights, in the history or
    below it: scores, and metrics that `diagnose --metrics` wrote. How well each
    does for a new task is told below. Writes predictions.json.

    \b
    Example:
      hub-magmax predict-merge recipe.yaml --history .
    """
    from hub_magmax.analysis.merge_history import read_history
    from hub_magmax.analysis.predicting_merges import PREDICTIONS_NAME
    from hub_magmax.cli.recipe_and_lock import checked_beside, read_locked
    from hub_magmax.files import write_json
    from hub_magmax.recipe.result_files import place_of_results
    from hub_magmax.studies import predicted

    beside = checked_beside(asked, [PREDICTIONS_NAME])
    known = read_history(history)  # before the lock, which may take minutes
    found, locked = read_locked(asked)
    place = place_of_results(found, locked, beside)
    place.check([PREDICTIONS_NAME])
    predictions = predicted(found, known, locked, rank=rank, examples=examples, report=say, progress=progress)
    values = predictions.to_dict()
    file = write_json(place.path(PREDICTIONS_NAME), values)
    return Answer(values, table_and([file], predictions.table(form), form))
