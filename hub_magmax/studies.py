"""Studies of a recipe from Python: its preference, a diagnosis, a comparison and a sweep.

Each locks the recipe itself where no lock is given. Nothing is written. Results have `table()` for people,
`to_frame()` for pandas, and are shown as tables by notebooks; `picture` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hub_magmax.analysis import comparing, diagnosing, sweeping
from hub_magmax.analysis.study_journal import study_journal
from hub_magmax.evaluation.journal import Journal
from hub_magmax.evaluation.scores import Scores
from hub_magmax.pipeline import check_faults, lock, plan
from hub_magmax.preference import resolve_preference
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import Lock, LockLike, ResolvedPreference, as_lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.figures.writing import Picture
from hub_magmax.reporting.tradeoff_surface import Surface
from hub_magmax.text import ProgressBar, Report, unseen


@checked
def prefer(recipe: RecipeLike, *, report: Report = lambda line: None) -> ResolvedPreference:
    """Return the weights that the recipe's preference stands for, by task.

    Weights and schedules are computed; `labels`, `transport` and other estimates read their data, and
    checkpoints where they need features.

    Args:
        recipe: Its `preference` says how; without one all tasks weigh alike.
        report: Called with a line of text at each long step.

    Raises:
        RecipeError, EvaluationError, SourceError: As `lock`.
    """
    recipe = as_recipe(recipe)
    estimated = recipe.preference is not None and recipe.preference.is_estimated
    return lock(recipe, report=report).preference if estimated else resolve_preference(recipe)


@checked
def diagnose(
    recipe: RecipeLike,
    locked: LockLike | None = None,
    *,
    report: Report = lambda line: None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Diagnosis:
    """Read all checkpoints once, and return what is odd about them before they are merged.

    Args:
        recipe: What would be merged.
        locked: Its lock; made now where it is not given.
        report: Called with a line of text at each long step.
        progress: Called with the bytes of the output that the tensors read since the last call stand for.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        NonFiniteError: At a NaN or infinity in a checkpoint.
    """
    recipe = as_recipe(recipe)
    return diagnosing.diagnose(plan(recipe, locked or lock(recipe, report=report)), progress=progress)


@checked
def compare(
    recipe: RecipeLike,
    locked: LockLike | None = None,
    *,
    journal: Path | None = None,
    in_spite_of: Iterable[str] = (),
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> comparing.Comparison:
    """Try methods, scaling coefficients and preferences in memory, chosen and reported on different examples.

    Args:
        recipe: Names what to try and the two samples under `compare`, and the evaluator under `evaluation`.
        locked: Lock of the recipe; made now where it is not given.
        journal: File that keeps what was measured: an interrupted call goes on, the same again runs no model.
        in_spite_of: Names of faults of the checkpoints that are accepted (`Finding.name`).
        report: Called with a line of text at each step.
        progress: Called with the number of models, what is done and the unit; opens what is called for each.

    Raises:
        MismatchError: If the checkpoints do not fit each other, or have faults that are not accepted.
        EvaluationError: If a sample is missing, too small, or cannot be used.
    """
    recipe = as_recipe(recipe)
    prepared = comparing.comparable(recipe)
    with study(recipe, prepared, locked, journal, in_spite_of, report, progress) as (found, kept):
        return comparing.compare(recipe, found, journal=kept, report=report, progress=progress)


@checked
def sweep(
    recipe: RecipeLike,
    locked: LockLike | None = None,
    *,
    journal: Path | None = None,
    in_spite_of: Iterable[str] = (),
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Surface:
    """Merge in memory for many preferences, and score each of them on every task of the evaluation.

    Args:
        recipe: `sweep` says which preferences, `evaluation` on which examples.
        locked: Lock of the recipe; made now where it is not given.
        journal: File that keeps what was measured: an interrupted call goes on, the same again runs no model.
        in_spite_of: Names of faults of the checkpoints that are accepted (`Finding.name`).
        report: Called with a line of text at each step.
        progress: Called with the number of models, what is done and the unit; opens what is called for each.

    Raises:
        MismatchError: If the checkpoints do not fit each other, or have faults that are not accepted.
        RecipeError: If the method ignores the preference, or there are too few tasks or tries.
        EvaluationError: If the examples cannot be used.
    """
    recipe = as_recipe(recipe)
    prepared = sweeping.sweepable(recipe)
    with study(recipe, prepared, locked, journal, in_spite_of, report, progress) as (found, kept):
        return sweeping.sweep(recipe, found, journal=kept, report=report, progress=progress)


@contextmanager
def study(
    recipe: Recipe,
    prepared: Recipe,
    locked: LockLike | None,
    journal: Path | None,
    in_spite_of: Iterable[str],
    report: Report,
    progress: ProgressBar = unseen,
) -> Iterator[tuple[Lock, Journal]]:
    """Yield the lock of a comparison or a sweep and its open journal.

    Args:
        recipe: What is studied.
        prepared: The recipe to lock for it (`comparable`, `sweepable`).
        locked: Its lock; made now where it is not given.
        journal: File of the journal; None keeps none.
        in_spite_of: Names of faults of the checkpoints that are accepted (`Finding.name`).
        report, progress: As `compare`.

    Raises:
        MismatchError: If the checkpoints do not fit each other, or have faults that are not accepted.
    """
    beside = journal.with_suffix(".lock.journal") if journal else None
    locked = as_lock(locked) or lock(prepared, report=report, progress=progress, journal=beside)
    check_faults(prepared, locked, in_spite_of)
    with study_journal(journal, recipe, locked, report) as kept:
        yield locked, kept


@checked
def picture(
    result: Scores | comparing.Comparison | Surface | Diagnosis, preference: Mapping[str, float] | None = None
) -> Picture:
    """Return the picture of a result, as notebooks show it: `picture(scores).png` are its bytes.

    Args:
        result: Scores of an evaluation, a comparison, a sweep, or a diagnosis.
        preference: Of scores: the weights to show beside them, by task; by default all tasks weigh alike.
    """
    from hub_magmax.reporting import figures

    if isinstance(result, Scores):
        shown = preference or dict.fromkeys(result.data, 1 / len(result.data))
        return Picture.of(figures.tradeoff_figure(result, shown), "Scores by task")
    if isinstance(result, comparing.Comparison):
        scale = figures.Scale(result.metric, result.is_share, result.unit)
        rows = comparing.comparison_rows(result)
        return Picture.of(figures.comparison_figure(rows, scale), "Ways to merge that were compared")
    if isinstance(result, Surface):
        return Picture.of(figures.front_figure(result), "Models by the weight of each task")
    return Picture.of(figures.cosines_figure(result), "Similarity of every two task vectors")
