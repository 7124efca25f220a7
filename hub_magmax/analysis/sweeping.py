"""Sweep of preferences: models merged in memory across the simplex, and scored on every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hub_magmax import methods
from hub_magmax.analysis import simplex
from hub_magmax.analysis.candidates import Candidate, base_model, draws, one_task
from hub_magmax.analysis.tuning import CandidateScorer, Trial, examples_of
from hub_magmax.errors import EvaluationError, RecipeError
from hub_magmax.evaluation.evaluators import unit_of
from hub_magmax.evaluation.journal import Journal
from hub_magmax.evaluation.scores import Score, make_score
from hub_magmax.evaluation.scoring import counted, load_evaluation_data
from hub_magmax.files import write_text
from hub_magmax.preference import resolve_preference
from hub_magmax.recipe.arguments import opened
from hub_magmax.recipe.checks import sweep_problem
from hub_magmax.recipe.loading import updated
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.recipe.schema import Recipe, Sweep
from hub_magmax.reporting.tradeoff_surface import (
    EXPLORER_NAME,
    FRONT_PICTURE_NAME,
    TABLE_NAME,
    Point,
    Surface,
)
from hub_magmax.text import ProgressBar, Report, number_of, unseen

#: Files that a sweep writes.
FILES = (TABLE_NAME, FRONT_PICTURE_NAME, EXPLORER_NAME)


def sweep(
    recipe: Recipe,
    lock: Lock,
    *,
    journal: Journal | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Surface:
    """Merge in memory for many preferences, and score each on every task of the evaluation.

    Method and scaling coefficient are the recipe's, and its own preference is measured first where it is
    known. Nothing is written.

    Args:
        recipe: `sweep` says which preferences, `evaluation` on which examples.
        lock: Of `sweepable(recipe)`, or of the recipe itself.
        journal: Keeps what was measured, and has what was measured earlier (`study_journal`).
        report: Called with a line of text at each step.
        progress: Called with the number of models, what is done and the unit; opens what is called for each.

    Raises:
        RecipeError: If the method ignores the preference.
        EvaluationError: If the examples cannot be used.
    """
    spec = recipe.sweep or Sweep()
    _check_method(lock)
    journal = Journal() if journal is None else journal
    own_weights = _own_weights(recipe, lock, report)
    course = _walk(spec, len(lock.tasks), own_weights)
    seeds = (spec.seeds or ()) if draws(lock.method) else ()
    with CandidateScorer(recipe, lock, journal, progress, report) as scorer:
        _check_rules(scorer)
        bench = _Bench(recipe, lock, scorer)
        num_models, what = _ahead(course, len(bench.batches), len(seeds))
        examples = examples_of(*bench.batches.values())
        known = min(len(journal), num_models)
        scorer.cost.announce(num_models, known, f"{what}, on {examples}", "sweep.budget")
        base = bench.base_model()
        own = bench.own()
        points: list[Point] = []
        with opened(progress, course.most, "sweeping", "preferences") as advance:
            tried = course.weights([score.value for score in base], points)
            for weights in counted(tried, course.most, 1, advance):
                points.append(bench.point(Candidate(lock.method, "sweep", weights, seeds)))
                report(f"preference {len(points)} of {course.most}: {_written(weights)}")
    evaluator = scorer.evaluator
    return Surface(
        evaluator.metric,
        evaluator.is_share,
        dict(lock.method),
        spec.walk,
        tuple(lock.tasks),
        tuple(bench.batches),
        tuple(points),
        base,
        own,
        unit_of(evaluator),
        _wanted(recipe, lock),
        0 if own_weights else None,
    )


def planned_models(recipe: Recipe, lock: Lock) -> tuple[int, str]:
    """Return how many models a sweep merges and scores at most, and which they are in words.

    Raises:
        EvaluationError, RecipeError: As `sweep` refuses the recipe.
    """
    sweepable(recipe)
    _check_method(lock)
    spec, num_evaluated = recipe.sweep or Sweep(), len(recipe.evaluation.tasks if recipe.evaluation else ())
    seeds = (spec.seeds or ()) if draws(lock.method) else ()
    course = _walk(spec, len(lock.tasks), _own_weights(recipe, lock, lambda line: None))
    return _ahead(course, num_evaluated, len(seeds))


def _ahead(course: _Walk, num_evaluated: int, num_seeds: int) -> tuple[int, str]:
    preferences = number_of(course.most, "preference")
    each = f" with {num_seeds} seeds" if num_seeds > 1 else ""
    own = number_of(num_evaluated, "checkpoint")
    what = f"{preferences}{each}, the base model and {own} of the tasks"
    return course.most * max(1, num_seeds) + 1 + num_evaluated, what


def _written(weights: tuple[float, ...]) -> str:
    return "/".join(f"{weight:.4g}" for weight in weights)


def _wanted(recipe: Recipe, lock: Lock) -> tuple[float, ...]:
    """Return the recipe's own weights; none where they would have to be estimated for the sweep alone."""
    if lock.preference.kind == "uniform" and recipe.preference is not None:
        if recipe.preference.is_estimated:
            return ()
        return tuple(resolve_preference(recipe).shares.values())
    return tuple(lock.preference.shares.values())


def _own_weights(recipe: Recipe, lock: Lock, report: Report) -> tuple[float, ...] | None:
    """Return the preference that the recipe itself merges with; None where no share of the tasks says it."""
    wanted = _wanted(recipe, lock)
    if not wanted:
        report(
            "the recipe's own weights are an estimate: to have them measured too, run `hub-magmax lock` first"
        )
    elif recipe.preference is not None and recipe.preference.coefficients is not None:
        report("the recipe's own coefficients are no shares of the tasks, and are not measured")
        return None
    return wanted or None


def sweepable(recipe: Recipe) -> Recipe:
    """Return the recipe to lock for a sweep: with its preference only where `auto` is chosen under it.

    Raises:
        RecipeError: If there are too few tasks or tries.
        EvaluationError: If the recipe names no examples.
    """
    if not recipe.evaluation or not recipe.evaluation.tasks:
        raise EvaluationError(
            "a sweep needs examples to score by",
            where="evaluation.tasks",
            expected="examples for at least one task",
        )
    if (found := sweep_problem(recipe)) is not None:
        raise RecipeError(found.message, key=found.key, hint=f"{found.hint[0].upper()}{found.hint[1:]}.")
    return recipe if recipe.method.is_auto else updated(recipe, {"preference": None})


def _check_method(lock: Lock) -> None:
    name = lock.method["name"]
    if not methods.get_method(name).uses_preference:
        used = [other for other in methods.method_names() if methods.get_method(other).uses_preference]
        raise RecipeError(
            f"{name} ignores the preference, so every point would be the same model",
            where="method.name",
            expected=f"one of {', '.join(used)}",
        )


@dataclass(frozen=True)
class _Walk:
    """Preferences to try: some from the start, and others that what was measured suggests.

    Attributes:
        fixed: In order, the recipe's own first.
        most: How many are tried at most.
        is_adaptive: Whether more are looked for until there are so many.
    """

    fixed: tuple[tuple[float, ...], ...]
    most: int
    is_adaptive: bool

    def weights(self, floor: list[float], points: list[Point]) -> Iterator[tuple[float, ...]]:
        """Yield the preferences to try; `points` is what was measured by then."""
        yield from self.fixed
        while self.is_adaptive and len(points) < self.most:
            tried = np.array([point.weights for point in points])
            values = np.array([[score.value for score in point.scores] for point in points])
            found = simplex.propose(tried, values, floor)
            if found is None:
                return
            yield simplex.as_written(found)


def _walk(spec: Sweep, num_tasks: int, own: tuple[float, ...] | None) -> _Walk:
    """Return the preferences of a sweep; the recipe's own are one more, unless they are among the others."""
    design = {"grid": simplex.grid, "schedule": simplex.schedule, "adaptive": simplex.first_design}[spec.walk]
    others = dict.fromkeys(simplex.as_written(weights) for weights in design(num_tasks, spec.budget))
    most = spec.budget if spec.walk == "adaptive" else len(others)
    if own is None:
        return _Walk(tuple(others), most, spec.walk == "adaptive")
    as_own = simplex.as_written(np.array(own))
    fixed = (own, *(weights for weights in others if weights != as_own))
    return _Walk(fixed, most + len(fixed) - len(others), spec.walk == "adaptive")


def _check_rules(scorer: CandidateScorer) -> None:
    if not scorer.follows_preference:
        raise RecipeError(
            "rules give every merged tensor weights of its own, so every point would be the same model",
            key=("tensors",),
            hint="Leave the weights of some rules out.",
        )


class _Bench:
    """The examples of every evaluated task, and models scored on them."""

    def __init__(self, recipe: Recipe, lock: Lock, scorer: CandidateScorer) -> None:
        assert recipe.evaluation is not None
        spec, examples = recipe.evaluation, load_evaluation_data(recipe, lock)
        self._lock, self._scorer = lock, scorer
        self.batches = {task: scorer.encode(examples[task], data, task) for task, data in spec.tasks.items()}

    def point(self, candidate: Candidate) -> Point:
        """Return the scores of one preference on every task, and those of each seed where it names seeds."""
        trials = self._scorer.score(candidate, self.batches)
        by_seed = {task: trial.by_seed for task, trial in trials.items() if trial.by_seed}
        return Point(
            candidate.weights, tuple(self._score("merged", *found) for found in trials.items()), by_seed
        )

    def _score(self, model: str, task: str, trial: Trial) -> Score:
        found = make_score(model, task, trial.outcomes, is_share=self._scorer.evaluator.is_share)
        return replace(found, outcomes=(), probabilities=())

    def base_model(self) -> tuple[Score, ...]:
        """Return the scores of a merge that adds nothing."""
        found = self._scorer.score(base_model(len(self._lock.tasks)), self.batches)
        return tuple(self._score("base_model", task, trial) for task, trial in found.items())

    def own(self) -> tuple[Score, ...]:
        """Return each task's own checkpoint on it: a merge that takes everything from this task."""
        tasks = tuple(self._lock.tasks)
        found: list[Score] = []
        for task, batches in self.batches.items():
            alone = one_task(task, tasks)
            found.append(self._score(task, task, self._scorer.score(alone, {task: batches})[task]))
        return tuple(found)


def write_sweep(recipe: Recipe, surface: Surface, place: ResultFiles) -> tuple[Path, ...]:
    """Write the table, the pictures of the front and the explorer, and return where."""
    from hub_magmax.reporting.explorer import render_explorer
    from hub_magmax.reporting.figures import draw_front

    table, picture, explorer = map(place.path, FILES)
    write_text(table, surface.to_csv())
    pictures = draw_front(surface, picture)
    write_text(explorer, render_explorer(recipe, surface))
    return table, *pictures, explorer
