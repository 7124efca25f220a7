"""Pushes that need the whole model first, for scores or a signature, and keep no folder afterwards."""

from __future__ import annotations

import shutil
from contextlib import closing, suppress
from pathlib import Path

from hub_magmax.checkpoints.storage.hub import open_hub
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.scores import Scores, stored_scores
from hub_magmax.files import os_errors
from hub_magmax.merging.output.report import SIGNATURE_NAME, MergeReport
from hub_magmax.planning.plan import Plan
from hub_magmax.publishing.commits import Destination, Published
from hub_magmax.publishing.streaming_push import published_already
from hub_magmax.recipe.schema import Recipe


def is_streamed(recipe: Recipe, destination: Destination | None) -> bool:
    """Say whether files go to the Hub while the others are merged, and no folder is made."""
    return destination is not None and not recipe.needs_folder and destination.private_key is None


def pushed_before(
    plan: Plan, destination: Destination
) -> tuple[MergeReport, Published, Scores | None] | None:
    """Return report, commit and scores of this very merge if the destination holds all that is asked for."""
    found = published_already(destination, plan)
    if found is None:
        return None
    report, published = found
    with closing(open_hub(published.repo_id, published.commit)) as source:
        if destination.private_key is not None and SIGNATURE_NAME not in source.sizes:
            return None
        scores: Scores | None = None
        with suppress(EvaluationError):
            scores = stored_scores(source)
    wanted = plan.recipe.evaluation
    if wanted is not None and (scores is None or scores.evaluation_digest != wanted.digest):
        return None
    return report, published, scores


def remove_folder(folder: Path) -> None:
    """Remove the merged folder, once the Hub holds what is in it."""
    with os_errors(folder):
        if folder.is_dir():
            shutil.rmtree(folder)
