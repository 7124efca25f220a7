"""Evaluation of a finished merge that is new, or whose data was corrected: the files that name it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from hub_magmax.evaluation.data import pin_datasets, pin_local_data, with_kept_data
from hub_magmax.files import from_here, write_text
from hub_magmax.merging.output.provenance import PROVENANCE_NAME, provenance
from hub_magmax.merging.output.report import REPORT_NAME, SIGNATURE_NAME, read_report
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, read_lock
from hub_magmax.recipe.result_files import stored_recipe
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe


def is_new_evaluation(recipe: Recipe) -> bool:
    """Say whether the own recipe of the merged model in the output folder names no evaluation.

    Raises:
        RecipeError: If it cannot be read.
    """
    return recipe.evaluation is not None and stored_recipe(recipe).evaluation is None


def with_new_data(recipe: Recipe, locked: Lock) -> Lock:
    """Return the lock of a finished merge with data of the evaluation that it does not name, as it is now.

    Raises:
        EvaluationError: If the data cannot be read, or the Hub has no such data set.
    """
    alone = recipe.model_copy(update=dict.fromkeys(("preference", "compare", "statistics")))
    return replace(
        locked,
        datasets={**locked.datasets, **pin_datasets(alone, locked.datasets)},
        local_data={**locked.local_data, **pin_local_data(alone), **locked.local_data},
    )


def name_evaluation(recipe: Recipe, locked: Lock) -> bool:
    """Have a merged model's own recipe name the evaluation of another one, and say whether it did not before.

    Args:
        recipe: Its output folder holds the model, which was scored by it.
        locked: Its lock, whose data it was scored on, but where the model's own lock names other data.

    Raises:
        RecipeError, LockError: If the model's own cannot be read.
    """
    if recipe.evaluation == stored_recipe(recipe).evaluation:
        return False
    own, scored_on = read_lock(recipe.output_path / LOCK_NAME), with_kept_data(locked, recipe.output_path)
    named = replace(own, datasets=scored_on.datasets, local_data=scored_on.local_data)
    write_evaluation_again(recipe, named)
    return True


def write_evaluation_again(recipe: Recipe, lock: Lock) -> None:
    """Write the recipe of a merged model with another evaluation, its lock, and what depends on them.

    These are the provenance and the hashes in the report. No file that loads the model changes. A signature
    of the folder no longer fits. Between the first file and the last `verify` fails; after an interruption
    the same call writes all of them.

    Args:
        recipe: Its output folder holds the model, and its evaluation is written there.
        lock: The model's own, but for the evaluation's data.
    """
    folder = recipe.output_path
    report = read_report(folder / REPORT_NAME)
    stored = stored_recipe(recipe).model_copy(update={"evaluation": recipe.evaluation})
    texts = {
        LOCK_NAME: lock.to_json(),
        PROVENANCE_NAME: provenance(stored, lock, report),
        RECIPE_NAME: stored.to_yaml(),
    }
    # Reports of earlier versions have the hashes of weights only.
    hashes = {name: _sha256(text) for name, text in texts.items() if name in report.files}
    texts[REPORT_NAME] = replace(report, files={**report.files, **hashes}).to_json()
    # The recipe last: until then the evaluation is new.
    for name in (LOCK_NAME, PROVENANCE_NAME, REPORT_NAME, RECIPE_NAME):
        write_text(folder / name, texts[name])


def unsigned(folder: Path) -> str:
    """Return what to do about a signature that no longer fits, where there is one."""
    is_signed = (folder / SIGNATURE_NAME).is_file()
    return f": sign again (hub-magmax sign {from_here(folder)} --private-key KEY)" if is_signed else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
