"""Studies of a recipe from Python, and runs of all its sites: preference, diagnosis, comparison, sweep.

Each locks the recipe itself where no lock is given. Nothing is written. Results have `table()` for people,
`to_frame()` for pandas, and are shown as tables by notebooks; `picture` draws them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from hub_magmax.analysis import comparing, diagnosing, sweeping
from hub_magmax.analysis.merge_history import MergeHistory, read_history
from hub_magmax.analysis.pair_sums import RANK, measured_pairs
from hub_magmax.analysis.predicting_merges import MergePredictions, predict_merges
from hub_magmax.analysis.study_journal import study_journal
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import ArgumentError, HubMagmaxError, RecipeError
from hub_magmax.evaluation.journal import Journal
from hub_magmax.evaluation.scores import Scores
from hub_magmax.fleet.merge_records import copy_records
from hub_magmax.merging.output.folder import advise_site, refuse_taken
from hub_magmax.pipeline import Run, carry_out, destination_of, lock, plan
from hub_magmax.planning.findings.finding import refuse_faults
from hub_magmax.preference import resolve_preference
from hub_magmax.processes import Processes, find_processes
from hub_magmax.publishing.commits import Destination
from hub_magmax.publishing.preflight import Begun, begin, check_room_together
from hub_magmax.publishing.scored_push import is_streamed
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.loading import RecipeLike, as_recipe, site_recipes
from hub_magmax.recipe.lockfile import Lock, LockLike, ResolvedPreference, as_lock
from hub_magmax.recipe.model_names import is_folder
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.diagnosis import Diagnosis
from hub_magmax.reporting.figures.writing import Picture
from hub_magmax.reporting.tradeoff_surface import Surface
from hub_magmax.text import ProgressBar, Report, step, unseen

LOG = logging.getLogger(__name__)


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
    rank: int | None = None,
    examples: int = 0,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Diagnosis:
    """Read all checkpoints once, and return what is odd about them before they are merged.

    Args:
        recipe: What would be merged.
        locked: Its lock; made now where it is not given.
        rank: Measure pairs of tasks too, with so many directions of each matrix; 0 without any.
        examples: Of each task, on which pairs of models run then.
        report: Called with a line of text at each long step.
        progress: Called with the bytes of the output, or the pairs of tasks, what is done and the unit; opens
            what is called with those that are done since the last call.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        NonFiniteError: At a NaN or infinity in a checkpoint.
        ArgumentError: If `rank` or `examples` is negative, or there are `examples` without a `rank`.
    """
    _check_counts(rank=rank or 0, examples=examples)
    if rank is None and examples:
        hint = "Give a rank too: rank=0 measures pairs without directions of matrices."
        raise ArgumentError(f"examples is {examples}, and without a rank no pair is measured", hint=hint)
    recipe = as_recipe(recipe)
    planned = plan(recipe, locked or lock(recipe, report=report))
    with opened(progress, planned.bytes_out, "diagnosing", "bytes") as advance:
        found = diagnosing.diagnose(planned, progress=advance or (lambda num_bytes: None))
    if rank is None:
        return found
    return replace(found, metrics=measured_pairs(planned, rank, examples, report=report, progress=progress))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ArgumentError(f"{name} is {value}", expected="a number from 0")


@checked
def predict_merge(
    recipe: RecipeLike,
    history: Path | str,
    locked: LockLike | None = None,
    *,
    rank: int = RANK,
    examples: int = 10,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> MergePredictions:
    """Predict how much of its tasks each method keeps, from finished merges, by two models side by side.

    Args:
        recipe: Names the tasks; every pair of them is predicted, and all.
        history: Folder with finished merges in it or below it, scored and with equal weights; or what else
            `fleet` takes, such as a user or an organisation on the Hub.
        locked: Lock of the recipe; made now where it is not given.
        rank: Directions of each matrix that metrics of pairs compare; 0 for none.
        examples: Of each task, on which metrics run models; 0 for none.
        report: Called with a line of text at each long step.
        progress: Called with a total, what is done and the unit; opens what is called with each step's size.

    Raises:
        OutputError: If the history holds no finished merge.
        SourceError: If the Hub does not answer, or has no such model.
        MismatchError: If the checkpoints do not fit each other.
        ArgumentError: If `rank` or `examples` is negative.
    """
    _check_counts(rank=rank, examples=examples)
    recipe, known = as_recipe(recipe), find_history(history, report=report)
    locked = as_lock(locked) or lock(recipe, report=report, progress=progress)
    return predicted(recipe, known, locked, rank=rank, examples=examples, report=report, progress=progress)


def find_history(history: Path | str, *, report: Report = lambda line: None) -> MergeHistory:
    """Return the finished merges of a folder, or of a fleet; see `predict_merge`."""
    if is_folder(Path(history)):
        return read_history(Path(history))
    with TemporaryDirectory(prefix="hub_magmax_") as place:
        copy_records(str(history), Path(place), report)
        return read_history(Path(place))


def predicted(
    recipe: Recipe,
    known: MergeHistory,
    locked: Lock,
    *,
    rank: int,
    examples: int,
    report: Report,
    progress: ProgressBar,
) -> MergePredictions:
    """Predict from a history that was read; see `predict_merge`."""
    if not any(merge.metrics for merge in known.merges):
        report("no merge of the history has metrics, so none are measured")
        return predict_merges(locked, known, None)
    planned = plan(recipe, locked)
    return predict_merges(
        locked, known, measured_pairs(planned, rank, examples, report=report, progress=progress)
    )


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


@checked
def run_sites(
    recipe: RecipeLike,
    *,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
    processes: Processes | None = None,
    push_anyway: bool = False,
    in_spite_of: Iterable[str] = (),
) -> dict[str, Run | HubMagmaxError]:
    """Carry out the recipe of every site, and return what `run` would, or why it failed, by site.

    The checkpoints are read once for all sites that are merged into a folder (`merging.sites`); evaluation,
    card and push follow for one after the other, and scores of checkpoints are measured once. What fails for
    one site leaves the others whole, in a single process; called again, what is missing is done.

    Args:
        recipe: With `sites`.
        report, progress, processes, push_anyway, in_spite_of: As `run`.

    Raises:
        RecipeError: If the recipe has no sites.
        SourceError, CheckpointError: What is wrong with the checkpoints, and so for every site.
    """
    recipe = as_recipe(recipe)
    if not recipe.sites:
        raise RecipeError("the recipe has no sites", key=("sites",), hint="`run` carries it out.")
    recipes = site_recipes(recipe)
    processes = processes or find_processes(report)
    places = {site: destination_of(own) for site, own in recipes.items()}
    return run_together(
        recipes, {}, places, report, progress, processes, push_anyway=push_anyway, in_spite_of=in_spite_of
    )


# Complex only by count: locks, plans, merges, and what follows, for each site.
def run_together(
    recipes: Mapping[str, Recipe],
    locks: Mapping[str, Lock],
    destinations: Mapping[str, Destination | None],
    report: Report,
    progress: ProgressBar,
    processes: Processes,
    *,
    push_anyway: bool,
    in_spite_of: Iterable[str],
) -> dict[str, Run | HubMagmaxError]:
    """Carry out recipes of the same checkpoints, by site; see `run_sites`.

    Args:
        locks: Locks of sites, by name. Others are made, with the checkpoints that the first one pins.
        destinations: Where models of sites go on the Hub.
    """
    from hub_magmax.merging.execution import plan_unfinished
    from hub_magmax.merging.sites import merge_sites  # loads torch

    cache, done = SourceCache(), dict[str, Run | HubMagmaxError]()
    begun, finished = dict[str, Begun](), set[str]()

    def note(site: str, error: HubMagmaxError) -> None:
        advise_site(error, site)
        LOG.warning("%s: %s The others go on.", site, error)
        done[site] = error

    first = next(iter(locks.values()), None)
    for site, own in recipes.items():
        with processes.failing(partial(note, site)):
            make = partial(lock, own, report=report, progress=progress, cache=cache, earlier=first)
            locked = locks.get(site) or processes.first_decides(make)
            first = first or locked
            planned, is_old = plan_unfinished(own, locked, cache, processes, in_spite_of)
            if processes.is_first and not is_old:
                refuse_taken(own.output_path)
            begun[site] = begin(planned, destinations[site], processes)
            finished |= {site} if is_old else set()
    if processes.is_first:
        check_room_together([one.plan for one in begun.values()])
    together = {
        site: one.plan for site, one in begun.items() if not is_streamed(one.plan.recipe, one.destination)
    }
    total = sum(made.progress_bytes for site, made in together.items() if site not in finished)
    with opened(progress, total, "merging", "bytes") as advance:
        merged = merge_sites(together, progress=advance, processes=processes, cache=cache) if together else {}
    for site, one in begun.items():
        with processes.failing(partial(note, site), of_all=()), step(f"finishing {site}", report):
            if isinstance(found := merged.get(site), HubMagmaxError):
                raise found
            ended = carry_out(one, report, progress, processes, cache, push_anyway=push_anyway, merged=found)
            done[site] = replace(ended, merged_before=site in finished)
    return {site: done[site] for site in recipes}


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
    planned = plan(prepared, locked, in_spite_of=in_spite_of)
    refuse_faults(planned.findings, planned.in_spite_of)
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
