"""Scoring: models run on each task's examples, one outcome per example.

An evaluator knows how to run one kind of model (`evaluators`); everything else (data, which models,
intervals) is the same for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import check_local_data, fingerprint, pinned, with_kept_data
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    Outcome,
    brings_data,
    check_direction,
    columns_of,
    described_examples,
    described_inputs,
    evaluator_of,
    unit_of,
)
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.evaluators.plugins import answers
from hub_magmax.evaluation.journal import Outcomes
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.rounding import Rounding, quantized_cells
from hub_magmax.evaluation.score_cache import Reuse
from hub_magmax.evaluation.scores import MERGED, Score, Scores, make_score, scores_for
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import Lock, LockLike, as_lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import ProgressBar, Report, step, unseen

LOG = logging.getLogger(__name__)

#: Examples of a data set, or the name by which an evaluator finds its own.
Examples = Any

#: Steps in which the examples of a task are run at least, if there are as many.
NUM_STEPS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """An evaluation with its examples loaded and described, before any model runs.

    Attributes:
        recipe, lock: What is evaluated.
        spec: The recipe's evaluation.
        merged: Folder or repository id of the merged model.
        evaluator: How models run.
        examples: Of every task and guard.
        places: The models that are scored, by name.
        wanted: By model, what it is scored on: names of models, quantised ones too, and tasks.
        described: By task, facts about the examples, as `Scores.data` has them.
        is_pinned: The models are those of recipe and lock, and not others that were named.
        rounding: Makes the quantised copies of models.
    """

    recipe: Recipe
    lock: Lock
    spec: Evaluation
    merged: Path | str
    evaluator: Evaluator
    examples: Mapping[str, Examples]
    places: Mapping[str, ModelPlace]
    wanted: Mapping[str, Sequence[tuple[str, str]]]
    described: Mapping[str, Mapping[str, Any]]
    is_pinned: bool
    rounding: Rounding


@step("preparing to score")
def prepare(
    recipe: Recipe, lock: Lock, merged: Path | str, models: Mapping[str, ModelPlace] | None = None
) -> Prepared:
    """Load the examples of an evaluation, and return all that is known before a model runs.

    Args and errors are those of `evaluate`.
    """
    spec = recipe.evaluation
    if spec is None:
        raise EvaluationError(
            "the recipe has no `evaluation`, so there is nothing to measure",
            where="recipe",
            hint="Name an evaluator and each task's examples under `evaluation`.",
        )
    evaluator = evaluator_of(spec)
    check_direction(evaluator, spec.evaluator.name)
    examples = load_evaluation_data(recipe, lock)
    places = models or {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}
    wanted = {name: _asked(name, spec, pinned=models is None) for name in places}
    described = _described(recipe, lock, evaluator, examples, wanted)
    is_pinned = models is None
    return Prepared(
        recipe,
        lock,
        spec,
        merged,
        evaluator,
        examples,
        places,
        wanted,
        described,
        is_pinned,
        Rounding.find(recipe, lock, evaluator),
    )


@checked
def evaluate(
    recipe: RecipeLike,
    lock: LockLike,
    merged: Path | str,
    *,
    models: Mapping[str, ModelPlace] | None = None,
    again: bool = False,
    processes: Processes | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Scores:
    """Score the merged model, the base model and every task's own checkpoint on every task.

    The merged model is also scored with rounded weights, where the recipe asks for it, and on the guards,
    as is the base model.

    What base model and tasks' checkpoints answered in an earlier evaluation is not measured again while they,
    the examples, the evaluator and the software are the same (`reuse`).

    Under `accelerate launch` every process runs its share of the batches, and all of them return the
    same scores, which do not depend on how many they are.

    Args:
        recipe: Its `evaluation` names the data and the evaluator.
        lock: Pins the checkpoints that are scored, and the data.
        merged: Folder (or repository id) of the merged model.
        models: Score these instead, by name, and none of them with rounded weights; always anew.
        again: Measure everything, whatever is known from earlier.
        processes: Which of how many processes this is; found from the launcher by default.
        report: Called with a line before each model.
        progress: Called with each model's examples, what is done and the unit; opens what is called with the
            examples of each batch.

    Raises:
        EvaluationError: If the recipe names no data, or a model or data set cannot be used.
        LockError: If local data is no longer what was locked.
    """
    prepared = prepare(as_recipe(recipe), as_lock(lock), merged, models)
    return score(prepared, again=again, processes=processes, report=report, progress=progress)


def scores_asked(
    recipe: Recipe, lock: Lock, report: Report, processes: Processes, progress: ProgressBar
) -> Scores | None:
    """Return the scores that a recipe asks for, if it does: those of an earlier run, or new ones."""
    if recipe.evaluation is None:
        return None
    stored = processes.first_decides(lambda: scores_for(recipe))
    if stored is not None:
        return stored
    output = recipe.output_path
    kept = with_kept_data(lock, output)
    return evaluate(recipe, kept, output, processes=processes, report=report, progress=progress)


@step("scoring the models")
def score(
    prepared: Prepared,
    *,
    again: bool = False,
    processes: Processes | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Scores:
    """Run the models of an evaluation on its examples; arguments are those of `evaluate`."""
    recipe, lock, evaluator, spec = prepared.recipe, prepared.lock, prepared.evaluator, prepared.spec
    processes = processes or find_processes()
    is_on = prepared.is_pinned and not again
    reuse = Reuse(recipe, lock, Path(prepared.merged), prepared.described, processes, is_on=is_on)
    wanted = prepared.wanted
    reuse.find(wanted, report)
    bench = _Bench(recipe, evaluator, spec, prepared.examples, processes, reuse, progress, prepared.rounding)
    loading = Loading(recipe, lock, evaluator, is_pinned=prepared.is_pinned, report=report)
    scores: list[Score] = []
    run = [name for name in prepared.places if not reuse.known.keys() >= {*wanted[name]}]
    for name, place in prepared.places.items():

        def load(name: str = name, place: ModelPlace = place) -> LoadedModel:
            report(f"scoring the model {name} ({run.index(name) + 1} of {len(run)})")
            with step(f"loading {name}"):
                return loading.load(name, place)

        scores += bench.scores(name, wanted[name], load)
    reuse.done()
    return Scores(
        evaluator.metric,
        evaluator.pipeline_tag,
        tuple(scores),
        prepared.described,
        spec.digest,
        evaluator.is_share,
        unit_of(evaluator),
    )


def _asked(name: str, spec: Evaluation, *, pinned: bool) -> list[tuple[str, str]]:
    """Return what to score a model on: its name and a task, then those of its quantised copies."""
    if name in ("base_model", MERGED):
        found = [(name, task) for task in (*spec.tasks, *spec.guard)]
    else:
        found = [(name, task) for task in (spec.own_cells(name) if pinned else spec.tasks)]
    return found + (quantized_cells(name, spec) if pinned else [])


def _described(
    recipe: Recipe,
    lock: Lock,
    evaluator: Evaluator,
    examples: Mapping[str, Examples],
    wanted: Mapping[str, Sequence[tuple[str, str]]],
) -> dict[str, dict[str, Any]]:
    """Return facts about the examples of every task that a model is scored on."""
    scored = {task for cells in wanted.values() for _, task in cells}
    data = recipe.evaluation.data if recipe.evaluation else {}
    return {
        task: _describe(pinned(data[task], lock.datasets), examples[task])
        | described_inputs(evaluator, data[task])
        | described_examples(evaluator, examples[task], data[task])
        for task in data
        if task in scored
    }


@dataclass(frozen=True)
class _Bench:
    """The examples of an evaluation, ready to score any model on."""

    recipe: Recipe
    evaluator: Evaluator
    spec: Evaluation
    examples: Mapping[str, Examples]
    processes: Processes
    reuse: Reuse
    progress: ProgressBar
    rounding: Rounding

    def scores(
        self, name: str, cells: Sequence[tuple[str, str]], load: Callable[[], LoadedModel]
    ) -> list[Score]:
        """Return the scores of a model and its quantised copies; it is loaded if one of them is not known."""
        missing = [cell for cell in cells if cell not in self.reuse.known]
        found = {**self.reuse.known, **dict(zip(missing, self._measured(name, missing, load), strict=True))}
        return [make_score(*cell, found[cell], is_share=self.evaluator.is_share) for cell in cells]

    def _measured(
        self, name: str, cells: Sequence[tuple[str, str]], load: Callable[[], LoadedModel]
    ) -> Iterator[Outcomes]:
        """Yield what a model and its quantised copies answer, one list for each cell."""
        if not cells:
            return
        held = {name: load()}
        with self._counting(name, [task for _, task in cells]) as advance:
            for label, task in cells:
                if label not in held:
                    held = {name: held[name], label: self.rounding.copy(held[name], label)}
                LOG.debug("scoring on the examples of %s", task)
                outcomes = self._outcomes(held[label], task, advance)
                yield self.reuse.keep(label, task, outcomes)

    def _counting(
        self, name: str, tasks: Sequence[str]
    ) -> AbstractContextManager[Callable[[int], None] | None]:
        """Show the examples that are done; how many an evaluator brings is not known."""
        total = sum(0 if isinstance(self.examples[task], str) else len(self.examples[task]) for task in tasks)
        doing = f"scoring the model {name}"
        return opened(self.progress, total, doing, "examples") if total else step(doing)

    def _outcomes(
        self, model: LoadedModel, task: str, advance: Callable[[int], None] | None
    ) -> list[Outcome]:
        data = self.spec.data[task]
        with about_data(self.recipe, data):
            return run_evaluator(
                self.evaluator,
                model,
                self.examples[task],
                data,
                self.spec.batch_size,
                self.processes,
                task,
                advance,
            )


def run_evaluator(
    evaluator: Evaluator,
    model: LoadedModel,
    examples: Examples,
    data: Data,
    batch_size: int,
    processes: Processes,
    task: str,
    advance: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Return one outcome per example, in order, the same list in every process.

    Process r of n runs batches r, r + n, r + 2n …, so batches are the same for any number of processes.
    `advance` is called with the examples of all processes' batches that are likely done.
    """
    if isinstance(examples, str):
        encoded = evaluator.encode(model, examples, columns_of(data), batch_size)
        return answers(evaluator, model, encoded, task, None)
    batch_size = size_of_batches(len(examples), batch_size)
    if processes.count == 1:
        encoded = evaluator.encode(model, examples, columns_of(data), batch_size)
        seen = counted(encoded, len(examples), batch_size, advance)
        return answers(evaluator, model, seen, task, len(examples))
    share = examples.select(_share(len(examples), batch_size, processes))
    encoded = evaluator.encode(model, share, columns_of(data), batch_size)
    at_once = processes.count * batch_size
    found = answers(evaluator, model, counted(encoded, len(examples), at_once, advance), task, len(share))
    shares = [iter(outcomes) for outcomes in processes.gather(found)]
    num_batches = -(-len(examples) // batch_size)
    batches = (islice(shares[n % processes.count], batch_size) for n in range(num_batches))
    return list(chain.from_iterable(batches))


def size_of_batches(num_examples: int, most: int) -> int:
    """Return how many examples are run at a time: `most`, or an eighth of few, to show that they go on."""
    return min(most, max(1, -(-num_examples // NUM_STEPS)))


def _share(count: int, batch_size: int, processes: Processes) -> list[int]:
    """Return the numbers of the examples that this process runs."""
    starts = range(processes.rank * batch_size, count, processes.count * batch_size)
    return [index for start in starts for index in range(start, min(start + batch_size, count))]


def counted(
    batches: Iterable[T], total: int, at_once: int, advance: Callable[[int], None] | None
) -> Iterator[T]:
    """Yield batches, and call `advance` with `at_once` examples when the next is asked for, up to `total`."""
    for batch in batches:
        yield batch
        if advance is not None:
            advance(min(at_once, total))
        total -= min(at_once, total)


def load_evaluation_data(recipe: Recipe, lock: Lock) -> dict[str, Examples]:
    """Return the examples of tasks and guards; called before a merge too, so that a wrong name shows early.

    Raises:
        EvaluationError: If they cannot be loaded, or lack a column that the evaluator reads.
        LockError: If local files are not those that were locked.
    """
    spec = recipe.evaluation
    if spec is None:
        return {}
    evaluator = evaluator_of(spec)
    if brings_data(evaluator):
        return {task: data.dataset for task, data in spec.data.items()}
    check_local_data(spec.data.values(), recipe, lock.local_data)
    found = {}
    for task, data in spec.data.items():
        found[task] = examples_for(evaluator, data, recipe, lock.datasets)
    return found


def _describe(data: Data, examples: Examples) -> dict[str, Any]:
    named = {"dataset": data.dataset, "config": data.config, "split": data.split, "revision": data.revision}
    known = {key: value for key, value in named.items() if value is not None}
    if isinstance(examples, str):
        return {"dataset": examples}
    return known | {"examples": len(examples), "fingerprint": fingerprint(examples, examples.column_names)}
