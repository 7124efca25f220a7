"""Score models on each task's examples, one outcome per example.

An evaluator knows how to run one kind of model (`evaluators`); everything else (data, which models,
intervals) is the same for all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.adapter import AdapterSource
from hub_magmax.checkpoints.opening import open_checkpoints, open_model, open_source
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data import check_local_data, fingerprint, load_examples, pinned
from hub_magmax.evaluation.evaluators import Evaluator, Outcome, needs_labels
from hub_magmax.evaluation.evaluators.loading import LoadedModel, ModelPlace, load_model
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.files import digest, write_text
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.references import LocalFolder
from hub_magmax.recipe.schema import Data, Evaluation, Recipe

SCORES_NAME = "scores.json"

#: Beside it: what every model scored on every example.
OUTCOMES_NAME = "outcomes.json"

#: What the merged model is called among the models that are scored.
MERGED = "merged"


def quantized_name(bits: str) -> str:
    """Return what the merged model is called with weights of so many bits, such as `merged:int4`."""
    return f"{MERGED}:{bits}"


Report = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        model: `base_model`, `merged`, the name of the task whose own checkpoint it is, or what
            `quantized_name` says.
        task: Whose examples these are: of a task, or of a guard.
        value: Mean outcome.
        low, high: 95 % interval of the mean: Wilson for shares, Student's t otherwise.
        num_examples: How many examples it is a mean of.
        outcomes: What the model scored on each of them, in order; empty where that was not kept.
        probabilities: Of the right answers, likewise; also empty where the evaluator tells none.
    """

    model: str
    task: str
    value: float
    low: float
    high: float
    num_examples: int
    outcomes: tuple[float, ...] = field(default=(), repr=False)
    probabilities: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Scores:
    """All that was measured.

    Attributes:
        metric: What the values are, such as "accuracy".
        pipeline_tag: The Hub's name for the kind of model.
        scores: Every model on every task that has examples.
        data: By task, the data set, split and revision that were used, and a fingerprint of the examples.
        evaluation_digest: Of the recipe's `evaluation` that asked for them.
        is_share: Values are shares, to be shown in per cent.
    """

    metric: str
    pipeline_tag: str
    scores: tuple[Score, ...]
    data: Mapping[str, Mapping[str, Any]] = field(hash=False)
    evaluation_digest: str = ""
    is_share: bool = True

    def get(self, model: str, task: str) -> Score | None:
        return next((s for s in self.scores if (s.model, s.task) == (model, task)), None)

    def table(self) -> str:
        """Return everything that was measured as text."""
        rows: dict[str, dict[str, float]] = {}
        for score in self.scores:
            rows.setdefault(score.model, {})[score.task] = score.value
        return score_table(self.metric, rows, tuple(self.data))

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def to_json(self) -> str:
        """Return everything but the single outcomes."""
        short = tuple(replace(score, outcomes=(), probabilities=()) for score in self.scores)
        values = asdict(replace(self, scores=short))
        for score in values["scores"]:
            del score["outcomes"], score["probabilities"]
        return json.dumps({"digest": self.digest, **values}, indent=2, ensure_ascii=False) + "\n"

    def outcomes_json(self) -> str:
        """Return the single outcomes, one model and task a line."""
        rows = []
        for score in self.scores:
            row: dict[str, Any] = {"model": score.model, "task": score.task, "outcomes": score.outcomes}
            if score.probabilities:
                row["probabilities"] = score.probabilities
            rows.append(json.dumps(row, ensure_ascii=False))
        return "[\n" + ",\n".join(rows) + "\n]\n"


def write_scores(scores: Scores, folder: Path) -> None:
    """Write the scores and their single outcomes into `folder`."""
    write_text(folder / OUTCOMES_NAME, scores.outcomes_json())
    write_text(folder / SCORES_NAME, scores.to_json())


def score_table(corner: str, rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return scores as text: a row per model, a column per task, a dash where nothing was measured."""
    width = max(len(name) for name in (*rows, corner))
    columns = {task: max(len(task), 5) for task in tasks}
    lines = ["  ".join([f"{corner:<{width}}", *(f"{task:>{c}}" for task, c in columns.items())])]
    for name, values in rows.items():
        cells = (f"{values[task]:>{c}.3f}" if task in values else "-" * c for task, c in columns.items())
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def read_scores(folder: Path) -> Scores:
    """Return the scores that `write_scores` stored in `folder`.

    Raises:
        EvaluationError: If a file is missing, or not what `write_scores` writes.
    """
    try:
        values = json.loads((folder / SCORES_NAME).read_text(encoding="utf-8"))
        rows = json.loads((folder / OUTCOMES_NAME).read_text(encoding="utf-8"))
        single: dict[tuple[str, str], dict[str, Any]] = {
            (row["model"], row["task"]): {
                "outcomes": tuple(row["outcomes"]),
                "probabilities": tuple(row.get("probabilities", ())),
            }
            for row in rows
        }
        stored = values.pop("digest")
        scores = [Score(**score) for score in values.pop("scores")]
        whole = tuple(replace(score, **single[score.model, score.task]) for score in scores)
        found = Scores(scores=whole, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{SCORES_NAME} and {OUTCOMES_NAME} do not hold scores", where=str(folder), hint="Evaluate again."
        ) from error
    if found.digest != stored:
        raise EvaluationError(
            "the digest does not fit the scores, so one of the files was changed",
            where=f"{SCORES_NAME} and {OUTCOMES_NAME} in {folder}",
            hint="Evaluate again.",
        )
    return found


def evaluate(
    recipe: Recipe,
    lock: Lock,
    merged: Path | str,
    *,
    models: Mapping[str, ModelPlace] | None = None,
    processes: Processes | None = None,
    report: Report | None = None,
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
    evaluator = spec.make_evaluator()
    processes = processes or find_processes()
    examples = load_evaluation_data(recipe, lock)
    places = models or {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}
    scores: list[Score] = []
    for name, place in places.items():
        if report:
            report(f"scoring {name}")
        kind = evaluator.model_class, evaluator.processor_class, spec.evaluator.name
        if name == MERGED and recipe.output.is_adapter:
            loaded = _load_merged_adapter(recipe, lock, place, kind)
        elif models is None and name in lock.tasks and lock.tasks[name].adapter_config:
            loaded = _load_adapted(recipe, lock, name, kind)
        else:
            loaded = load_model(place, *kind)
        for label, model, names in _asked(name, loaded, spec, shrink=models is None):
            for task in names:
                data = spec.data[task]
                found = run_evaluator(evaluator, model, examples[task], data, spec.batch_size, processes)
                scores.append(make_score(label, task, found, is_share=evaluator.is_share))
    described = {
        task: _describe(pinned(data, lock.datasets), examples[task])
        for task, data in spec.data.items()
        if any(score.task == task for score in scores)
    }
    return Scores(
        evaluator.metric, evaluator.pipeline_tag, tuple(scores), described, spec.digest, evaluator.is_share
    )


def _asked(
    name: str, loaded: LoadedModel, spec: Evaluation, *, shrink: bool
) -> Iterator[tuple[str, LoadedModel, tuple[str, ...]]]:
    """Yield a model with what it is called and whose examples it is scored on, then its rounded copies."""
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

    A process runs every so many-th batch, so that batches are the same for any number of processes.
    """
    if processes.count == 1 or isinstance(examples, str):
        return evaluator.outcomes(model, evaluator.encode(model, examples, data.columns, batch_size))
    starts = range(0, len(examples), batch_size)
    mine = [i for s in starts[processes.rank :: processes.count] for i in range(s, s + batch_size)]
    share = examples.select([index for index in mine if index < len(examples)])
    found = evaluator.outcomes(model, evaluator.encode(model, share, data.columns, batch_size))
    shares = [iter(outcomes) for outcomes in processes.gather(found)]
    batches = (islice(shares[n % processes.count], batch_size) for n in range(len(starts)))
    return list(chain.from_iterable(batches))


def make_score(model: str, task: str, outcomes: Sequence[Outcome], *, is_share: bool) -> Score:
    """Return the mean outcome with its interval."""
    values = tuple(outcome.score for outcome in outcomes)
    low, high = mean_interval(values, is_share=is_share)
    # Six digits: nobody reads more, and the file is a third as long.
    probabilities = tuple(round(o.probability, 6) for o in outcomes if o.probability is not None)
    if len(probabilities) < len(values):
        probabilities = ()
    return Score(model, task, math.fsum(values) / len(values), low, high, len(values), values, probabilities)


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
    if spec.brings_data:
        return {task: data.dataset for task, data in spec.data.items()}
    check_local_data(spec.data.values(), recipe.folder, lock.local_data)
    labelled = needs_labels(spec.make_evaluator())
    return {
        task: load_examples(pinned(data, lock.datasets), recipe.folder, labelled=labelled)
        for task, data in spec.data.items()
    }


def _load_adapted(recipe: Recipe, lock: Lock, task: str, kind: tuple[str, str, str]) -> LoadedModel:
    """Load the base model with the weights that a task's adapter makes of it."""
    with open_checkpoints(recipe, lock) as sources:
        return _load_over_base(recipe, lock, sources[task], kind)


def _load_merged_adapter(
    recipe: Recipe, lock: Lock, place: ModelPlace, kind: tuple[str, str, str]
) -> LoadedModel:
    """Load the base model with the weights that the merged adapter makes of it; PEFT is not needed."""
    with (
        closing(open_source(recipe, lock.base_model)) as base,
        closing(open_model(place.name, place.revision)) as adapter,
    ):
        return _load_over_base(recipe, lock, AdapterSource(base, adapter), kind)


def _load_over_base(
    recipe: Recipe, lock: Lock, source: TensorSource, kind: tuple[str, str, str]
) -> LoadedModel:
    weights = {
        name: source.read(name, 0, info.num_elements).view(info.shape)
        for name, info in source.index.tensors.items()
    }
    return load_model(model_place(recipe, lock.base_model), *kind).with_weights(weights)


def model_places(recipe: Recipe, lock: Lock) -> dict[str, ModelPlace]:
    """Return where the base model and every task's checkpoint can be loaded from."""
    return {name: model_place(recipe, source) for name, source in lock.sources.items()}


def model_place(recipe: Recipe, source: LockedSource) -> ModelPlace:
    """Return where a pinned checkpoint can be loaded from."""
    reference = recipe.reference(source.reference)
    if isinstance(reference, LocalFolder):
        return ModelPlace(str(reference.path), part=reference.part)
    return ModelPlace(str(source.repo_id), source.commit, source.part or "")


def _describe(data: Data, examples: Examples) -> dict[str, Any]:
    named = {"dataset": data.dataset, "config": data.config, "split": data.split, "revision": data.revision}
    known = {key: value for key, value in named.items() if value is not None}
    if isinstance(examples, str):
        return {"dataset": examples}
    return known | {"examples": len(examples), "fingerprint": fingerprint(examples, examples.column_names)}
