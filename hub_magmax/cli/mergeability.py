"""The verb that predicts how much merges keep: predict-merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import RecipeOptions, format_option, metric_options, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, verb

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
    does for a new task is told below.

    \b
    Example:
      hub-magmax predict-merge recipe.yaml --history .
    """
    from hub_magmax.analysis.merge_history import read_history
    from hub_magmax.analysis.pair_sums import measured_pairs
    from hub_magmax.analysis.predicting_merges import predict_merges
    from hub_magmax.cli.recipe_and_lock import lock_journal, read_asked
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan

    known = read_history(history)
    found, locked = read_asked(asked)
    locked = locked or lock(found, report=say, progress=progress, journal=lock_journal(asked, found))
    has_metrics = any(merge.metrics for merge in known.merges)
    if not has_metrics:
        say("no merge of the history has metrics, so none are measured")
    planned = make_plan(found, locked)
    metrics = measured_pairs(planned, rank, examples, report=say, progress=progress) if has_metrics else None
    predictions = predict_merges(locked, known, metrics)
    return Answer(predictions.to_dict(), predictions.table(form))
