"""Routers in use: each input answered by the merged model or by the checkpoint of a task, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace, repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.opening import open_model, open_pinned
from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import ArgumentError, EvaluationError
from hub_magmax.evaluation.evaluators import get_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.fleet.predicting import deterministic
from hub_magmax.fleet.routing.measuring import choose
from hub_magmax.fleet.routing.observing import Look, look
from hub_magmax.fleet.routing.record import RouterRecord, merge_digest, read_router
from hub_magmax.fleet.routing.verifier import Verifier
from hub_magmax.fleet.verifying import recipe_and_lock, verify
from hub_magmax.recipe.arguments import checked
from hub_magmax.text import Report

#: Inputs that run together.
_BATCH_SIZE = 32


@dataclass(frozen=True)
class Routed:
    """Answer to one input.

    Attributes:
        label: The class.
        model: `merged`, or the task whose own checkpoint answered.
        why: The choice in words.
        expected: By model, the verifier's probability that its answer is right.
    """

    label: str
    model: str
    why: str
    expected: Mapping[str, float] = field(hash=False)


class Router:
    """A merged model, its verifier, and the tasks' own checkpoints, each loaded when it is first needed.

    Attributes:
        record: How the router was fitted and what it is worth; `record.digest` identifies it.
        threshold: Inputs are escalated whose gain is above it.
    """

    def __init__(
        self, record: RouterRecord, verifier: Verifier, loading: Loading, places: Mapping[str, ModelPlace]
    ):
        self.record, self.threshold = record, record.report.operation.threshold
        self._verifier, self._loading, self._places = verifier, loading, places
        self._models = {MERGED: loading.load(MERGED, places[MERGED])}
        self._turn = Lock()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        folder: Path | None = None,
        report: Report = lambda line: None,
    ) -> Router:
        """Load the router beside a merged model, and check that both belong together.

        Args:
            model: A merged folder, or a repository id.
            revision: Of the repository; the default branch if None.
            folder: Where relative paths of local checkpoints start; the current folder if None.
            report: Called with a line about what is odd in a model.

        Raises:
            EvaluationError: If there is no router, it was changed, or it is that of another merge.
            OutputError, PublishError: If the merged model was changed.
            LockError, SourceError: If the checkpoint of a task was changed, or is not there.
        """
        return _load_router(model, revision=revision, folder=folder, report=report)

    def __call__(self, inputs: Sequence[Any]) -> tuple[Routed, ...]:
        """Return an answer to each text, or to each image of Pillow.

        Raises:
            ArgumentError: If the inputs are no sequence of these.
            EvaluationError: If a model cannot be run on them, or gives values that are not finite.
        """
        self._check(inputs)
        found: list[Routed] = []
        with self._turn, deterministic():
            for start in range(0, len(inputs), _BATCH_SIZE):
                found += self._answered(list(inputs[start : start + _BATCH_SIZE]))
        return tuple(found)

    def _check(self, inputs: Sequence[Any]) -> None:
        from PIL.Image import Image

        kind, expected = (
            (str, "texts") if self.record.evaluator.startswith("text") else (Image, "images of Pillow")
        )
        if (
            isinstance(inputs, str)
            or not isinstance(inputs, Sequence)
            or not all(isinstance(i, kind) for i in inputs)
        ):
            raise ArgumentError(
                f"this is a {type(inputs).__name__}, or holds something else",
                where="inputs of a router",
                expected=f"a list of {expected}",
            )

    def _answered(self, inputs: list[Any]) -> list[Routed]:
        labels, seen = self._run(MERGED, inputs)
        given, read = seen.features.shape[1], len(self._verifier.mean)
        if given != read:
            raise EvaluationError(
                f"it gives {given} features, and the verifier reads {read}",
                where=self._models[MERGED].name,
            )
        probabilities = self._verifier.probabilities(seen.features, seen.answers)
        chosen = choose(probabilities)
        names = self.record.report.models
        goes = [
            int(expert) + 1 if gain > self.threshold else 0
            for expert, gain in zip(chosen.expert, chosen.gain, strict=True)
        ]
        for number in sorted({*goes} - {0}):
            rows = [row for row, model in enumerate(goes) if model == number]
            answers, _ = self._run(names[number], [inputs[row] for row in rows])
            for row, label in zip(rows, answers, strict=True):
                labels[row] = label
        return [
            Routed(
                labels[row],
                names[model],
                self._why(names, probabilities[row], model),
                dict(zip(names, probabilities[row].tolist(), strict=True)),
            )
            for row, model in enumerate(goes)
        ]

    def _why(self, names: Sequence[str], probabilities: Any, model: int) -> str:
        best = model or 1 + int(probabilities[1:].argmax())
        gain = probabilities[best] - probabilities[0]
        side = "above" if model else "not above"
        return (
            f"{names[best]} is expected right with {probabilities[best]:.2f}, the merged model with "
            f"{probabilities[0]:.2f}: a gain of {gain:+.3f}, {side} the threshold {self.threshold:.3f}"
        )

    def _run(self, name: str, inputs: list[Any]) -> tuple[list[str], Look]:
        """Return the classes that a model chooses, and its view of the inputs."""
        model = self._model(name)
        parts, _ = self._loading.evaluator.encode_inputs(model, inputs)  # type: ignore[attr-defined]
        found = look(model, parts)
        names = model.network.config.id2label
        return [str(names[number]) for number in found.answers.tolist()], found

    def _model(self, name: str) -> LoadedModel:
        if name not in self._models:
            self._models[name] = self._loading.load(name, self._places[name])
        return self._models[name]


@checked
def _load_router(model: str, *, revision: str | None, folder: Path | None, report: Report) -> Router:
    commit = None
    if not Path(model).is_dir():
        model, revision = repository_of(model, revision)
        with taken_for_repository(model, Path()):
            commit = resolve_commit(model, revision)
    with closing(open_model(model, commit)) as stored:
        record, verifier = read_router(stored)
        recipe, lock = recipe_and_lock(stored, folder or Path())
    if merge_digest(verify(model, revision=commit)) != record.merge:
        raise EvaluationError(
            "this router is that of another merge, and says nothing about this model",
            where=model,
            hint="Fit one for this model: hub-magmax route RECIPE.",
        )
    with open_pinned(recipe, lock.every_source):
        pass  # a checkpoint that is missing is told before the first input needs it
    loading = Loading(recipe, lock, get_evaluator(record.evaluator).make(), report=report, purpose="routing")
    places = {**model_places(recipe, lock), MERGED: ModelPlace(model, commit)}
    return Router(record, verifier, loading, places)
