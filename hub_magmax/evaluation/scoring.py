"""Scoring: models run on each task's examples, one outcome per example.

An evaluator knows how to run one kind of model (`evaluators`); everything else (data, which models,
intervals) is the same for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    wanted_columns,
)
from hub_magmax.evaluation.evaluators.examples import check_columns
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.score_cache import Reuse
from hub_magmax.evaluation.scores import MERGED, Score, Scores, make_score, quantized_name
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Evaluation, Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.text import Report

LOG = logging.getLogger(__name__)

#: Examples of a data set, or the name by which an evaluator finds its own.
Examples = Any


def evaluate(
    recipe: Recipe,
    lock: Lock,
    merged: Path | str,
    *,
    models: Mapping[str, ModelPlace] | None = None,
    again: bool = False,
    processes: Processes | None = None,
    report: Report = lambda line: None,
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
    wanted = {name: _asked(name, spec, pinned=models is None) for name in places}
    described = _described(recipe, lock, evaluator, examples, wanted)
    reuse = Reuse(recipe, lock, Path(merged), described, processes, is_on=models is None and not again)
    reuse.find(wanted, report)
    bench = _Bench(evaluator, spec, examples, processes, reuse)
    loading = Loading(recipe, lock, evaluator, is_pinned=models is None, report=report)
    scores: list[Score] = []
    for number, (name, place) in enumerate(places.items(), 1):

        def load(name: str = name, place: ModelPlace = place, number: int = number) -> LoadedModel:
            report(f"scoring {name} ({number} of {len(places)})")
            return loading.load(name, place)

        scores += bench.scores(name, wanted[name], load)
    reuse.done()
    return Scores(
        evaluator.metric,
        evaluator.pipeline_tag,
        tuple(scores),
        described,
        spec.digest,
        evaluator.is_share,
        unit_of(evaluator),
    )


def _asked(name: str, spec: Evaluation, *, pinned: bool) -> list[tuple[str, str]]:
    """Return what to score a model on: its name and a task, then those of its quantised copies."""
    if name in ("base_model", MERGED):
        quantized = spec.quantized if name == MERGED and pinned else ()
        return [(name, task) for task in (*spec.tasks, *spec.guard)] + _quantized(quantized, spec)
    own_only = pinned and spec.cells == "own"
    return [(name, task) for task in spec.tasks if task == name or not own_only]


def _quantized(kinds: Sequence[str], spec: Evaluation) -> list[tuple[str, str]]:
    return [(quantized_name(bits), task) for bits in dict.fromkeys(kinds) for task in spec.tasks]


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
        for task in data
        if task in scored
    }


@dataclass(frozen=True)
class _Bench:
    """The examples of an evaluation, ready to score any model on."""

    evaluator: Evaluator
    spec: Evaluation
    examples: Mapping[str, Examples]
    processes: Processes
    reuse: Reuse

    def scores(
        self, name: str, cells: Sequence[tuple[str, str]], load: Callable[[], LoadedModel]
    ) -> Iterator[Score]:
        """Yield the scores of a model and its quantised copies; it is loaded if one of them is not known."""
        held: dict[str, LoadedModel] = {}
        for label, task in cells:
            found = self.reuse.known.get((label, task))
            if found is None:
                held = held or {name: load()}
                if label not in held:
                    held = {name: held[name], label: _shrunk(held[name], label)}
                found = self.reuse.keep(label, task, self._answers(held[label], task))
            yield make_score(label, task, found, is_share=self.evaluator.is_share)

    def _answers(self, model: LoadedModel, task: str) -> list[Outcome]:
        data, size = self.spec.data[task], self.spec.batch_size
        LOG.debug("scoring on the examples of %s", task)
        return run_evaluator(self.evaluator, model, self.examples[task], data, size, self.processes)


def _shrunk(loaded: LoadedModel, label: str) -> LoadedModel:
    """Return the quantised copy of a model that has this label."""
    from hub_magmax.evaluation.quantizing import rounded

    bits = int(label.removeprefix(quantized_name("int")))
    return replace(loaded, network=rounded(loaded.network, bits))


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
    check_local_data(spec.data.values(), recipe.folder, lock.local_data)
    found = {}
    for task, data in spec.data.items():
        place = pinned(data, lock.datasets)
        found[task] = load_examples(place, recipe.folder, labelled=needs_labels(evaluator))
        check_columns(found[task], wanted_columns(evaluator, data))
    return found


def _describe(data: Data, examples: Examples) -> dict[str, Any]:
    named = {"dataset": data.dataset, "config": data.config, "split": data.split, "revision": data.revision}
    known = {key: value for key, value in named.items() if value is not None}
    if isinstance(examples, str):
        return {"dataset": examples}
    return known | {"examples": len(examples), "fingerprint": fingerprint(examples, examples.column_names)}
