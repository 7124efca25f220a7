"""Scoring: models run on each task's examples, one outcome per example.

An evaluator knows how to run one kind of model (`evaluators`); everything else (data, which models,
intervals) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data import check_local_data, fingerprint, load_examples, pinned
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    Outcome,
    brings_data,
    check_direction,
    columns_of,
    described_inputs,
    evaluator_of,
    needs_labels,
    unit_of,
)
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.scores import MERGED, Score, Scores, make_score, quantized_name
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Evaluation, Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report


def evaluate(
    recipe: Recipe,
    lock: Lock,
    merged: Path | str,
    *,
    models: Mapping[str, ModelPlace] | None = None,
    processes: Processes | None = None,
    report: Report = lambda line: None,
) -> Scores:
    """Score the merged model, the base model and every task's own checkpoint on every task.

    The merged model is also scored with rounded weights, where the recipe asks for it, and on the guards,
    as is the base model.

    Under `accelerate launch` every process runs its share of the batches, and all of them return the
    same scores, which do not depend on how many they are.

    Args:
        recipe: Its `evaluation` names the data and the evaluator.
        lock: Pins the checkpoints that are scored, and the data.
        merged: Folder (or repository id) of the merged model.
        models: Score these instead, by name, and none of them with rounded weights.
        processes: Which of how many processes this is; found from the launcher by default.
        report: Called with a line before each model.

    Raises:
        EvaluationError: If the recipe names no data, or a model or data set cannot be used.
        LockError: If local data is no longer what was locked.
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
    processes = processes or find_processes()
    examples = load_evaluation_data(recipe, lock)
    places = models or {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}
    scores: list[Score] = []
    loading = Loading(recipe, lock, evaluator, is_pinned=models is None, report=report)
    for number, (name, place) in enumerate(places.items(), 1):
        report(f"scoring {name} ({number} of {len(places)})")
        loaded = loading.load(name, place)
        for label, model, names in _asked(name, loaded, spec, shrink=models is None):
            for task in names:
                data = spec.data[task]
                found = run_evaluator(evaluator, model, examples[task], data, spec.batch_size, processes)
                scores.append(make_score(label, task, found, is_share=evaluator.is_share))
        del loaded, model  # one at a time is in memory
    scored = {score.task for score in scores}
    described = {
        task: _describe(pinned(data, lock.datasets), examples[task]) | described_inputs(evaluator, data)
        for task, data in spec.data.items()
        if task in scored
    }
    return Scores(
        evaluator.metric,
        evaluator.pipeline_tag,
        tuple(scores),
        described,
        spec.digest,
        evaluator.is_share,
        unit_of(evaluator),
    )


def _asked(
    name: str, loaded: LoadedModel, spec: Evaluation, *, shrink: bool
) -> Iterator[tuple[str, LoadedModel, tuple[str, ...]]]:
    """Yield a model with its name and the tasks to score it on, then its quantised copies."""
    guarded = tuple(spec.guard) if name in ("base_model", MERGED) else ()
    yield name, loaded, (*spec.tasks, *guarded)
    if name == MERGED and shrink:
        from hub_magmax.evaluation.quantizing import rounded

        for bits in dict.fromkeys(spec.quantized):
            shrunk = replace(loaded, network=rounded(loaded.network, int(bits.removeprefix("int"))))
            yield quantized_name(bits), shrunk, tuple(spec.tasks)


def run_evaluator(
    evaluator: Evaluator,
    model: LoadedModel,
    examples: Examples,
    data: Data,
    batch_size: int,
    processes: Processes,
) -> list[Outcome]:
    """Return one outcome per example, in order, the same list in every process.

    Process r of n runs batches r, r + n, r + 2n …, so batches are the same for any number of processes.
    """
    if processes.count == 1 or isinstance(examples, str):
        return evaluator.outcomes(model, evaluator.encode(model, examples, columns_of(data), batch_size))
    starts = range(0, len(examples), batch_size)
    mine = [i for s in starts[processes.rank :: processes.count] for i in range(s, s + batch_size)]
    share = examples.select([index for index in mine if index < len(examples)])
    found = evaluator.outcomes(model, evaluator.encode(model, share, columns_of(data), batch_size))
    shares = [iter(outcomes) for outcomes in processes.gather(found)]
    batches = (islice(shares[n % processes.count], batch_size) for n in range(len(starts)))
    return list(chain.from_iterable(batches))


#: Examples of a data set, or the name by which an evaluator finds its own.
Examples = Any


def load_evaluation_data(recipe: Recipe, lock: Lock) -> dict[str, Examples]:
    """Return the examples of tasks and guards; called before a merge too, so that a wrong name shows early.

    Raises:
        EvaluationError: If they cannot be loaded.
        LockError: If local files are not those that were locked.
    """
    spec = recipe.evaluation
    if spec is None:
        return {}
    if brings_data(evaluator_of(spec)):
        return {task: data.dataset for task, data in spec.data.items()}
    check_local_data(spec.data.values(), recipe.folder, lock.local_data)
    labelled = needs_labels(evaluator_of(spec))
    return {
        task: load_examples(pinned(data, lock.datasets), recipe.folder, labelled=labelled)
        for task, data in spec.data.items()
    }


def _describe(data: Data, examples: Examples) -> dict[str, Any]:
    named = {"dataset": data.dataset, "config": data.config, "split": data.split, "revision": data.revision}
    known = {key: value for key, value in named.items() if value is not None}
    if isinstance(examples, str):
        return {"dataset": examples}
    return known | {"examples": len(examples), "fingerprint": fingerprint(examples, examples.column_names)}
