"""Models observed on examples: features and answers of the merged model, and which models are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import columns_of
from hub_magmax.evaluation.evaluators.classification import ImageClassification, TextClassification
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading
from hub_magmax.evaluation.scores import MERGED, Scores
from hub_magmax.evaluation.scoring import Prepared, score
from hub_magmax.fleet.decision_inputs import digest_of
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.recipe.arguments import opened
from hub_magmax.text import ProgressBar, Report, step

#: Evaluators whose models a router can choose between.
CLASSIFIERS = (ImageClassification, TextClassification)


#: Attributes of `Observed` that are arrays.
_ARRAYS = ("tasks", "labels", "answers", "features", "agrees", "right")


@dataclass(frozen=True)
class Observed:
    """What is known of every example.

    Attributes:
        tasks: Number of the task that an example is of, from 0 by the order of the recipe's tasks.
        labels: Number of the right class, by the merged model's numbers.
        answers: Number of the class that the merged model chooses.
        contents: Digest of each input.
        features: Of the merged model.
        agrees: Whether the base model names the same class.
        right: Whether the merged model is right, then each task's own checkpoint.
    """

    tasks: Int64[np.ndarray, " examples"]
    labels: Int64[np.ndarray, " examples"]
    answers: Int64[np.ndarray, " examples"]
    contents: tuple[str, ...]
    features: Float64[np.ndarray, "examples features"]
    agrees: Bool[np.ndarray, " examples"]
    right: Bool[np.ndarray, "examples models"]

    def joined(self, other: Observed) -> Observed:
        """Return these examples, and then others of the same models."""
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return Observed(contents=self.contents + other.contents, **arrays)

    def at(self, indices: Int64[np.ndarray, " chosen"]) -> Observed:
        """Return some of the examples."""
        arrays = {name: getattr(self, name)[indices] for name in _ARRAYS}
        return Observed(contents=tuple(self.contents[index] for index in indices), **arrays)


@dataclass(frozen=True)
class Look:
    """A classifier's view of some inputs.

    Attributes:
        features: Means over tokens, or places, of the hidden states in its middle and at its end, where it
            returns any; the logarithmic probabilities of its classes; and its confidence, the logit of the
            largest.
        log_probabilities: Of its classes.
    """

    features: Float64[np.ndarray, "inputs features"]
    log_probabilities: Float64[np.ndarray, "inputs classes"]

    @property
    def answers(self) -> Int64[np.ndarray, " inputs"]:
        """Numbers of the classes that it chooses."""
        found: np.ndarray = self.log_probabilities.argmax(axis=1)
        return found


def look(model: LoadedModel, parts: Sequence[Any]) -> Look:
    """Run a classifier on encoded inputs.

    Raises:
        EvaluationError: If it gives values that are not finite.
    """
    hidden, logits = [], []
    with torch.inference_mode():
        for part in parts:
            moved = part.to(model.device)
            output = model.output(**moved, output_hidden_states=True)
            logits.append(output.logits.double().log_softmax(-1))
            hidden.append(_pooled(output, moved.get("attention_mask")))
    log_probabilities: np.ndarray = torch.cat(logits).cpu().numpy()
    pooled: np.ndarray = torch.cat(hidden).cpu().numpy()
    features = np.column_stack([pooled, log_probabilities, _confidence(log_probabilities)])
    if count := int((~np.isfinite(features)).any(axis=1).sum()):
        raise EvaluationError(
            f"it gives values that are not finite on {count:,} of {len(features):,} inputs",
            where=model.name,
            hint="A model that does so is broken, or its dtype too narrow: merge it again, with output.dtype "
            "float32.",
        )
    return Look(features, log_probabilities)


def _confidence(log_probabilities: np.ndarray) -> np.ndarray:
    """Return the logit of each row's largest probability, at most that of 1 - 1e-12."""
    largest = log_probabilities.max(axis=1)
    found: np.ndarray = largest - np.log(np.maximum(-np.expm1(largest), 1e-12))
    return found


def _pooled(output: Any, mask: Tensor | None) -> Tensor:
    """Return means of hidden states over tokens or places: (inputs, widths), float64."""
    states = getattr(output, "hidden_states", None)
    if not states:
        return torch.zeros((len(output.logits), 0), dtype=torch.float64, device=output.logits.device)
    return torch.cat([_mean(states[len(states) // 2], mask), _mean(states[-1], mask)], dim=1)


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    exact: Tensor = states.double()
    if exact.dim() == 4:  # of convolutions: inputs, channels, rows, columns
        return exact.mean(dim=(2, 3))
    if mask is None or mask.shape != exact.shape[:2]:
        return exact.mean(dim=1)
    weights = mask[:, :, None].double()
    return (exact * weights).sum(dim=1) / weights.sum(dim=1)


def observe(prepared: Prepared, report: Report, progress: ProgressBar) -> Observed:
    """Run base model, tasks' checkpoints and merged model on all examples.

    What checkpoints answered in an earlier evaluation is not measured again.
    """
    own = {name: place for name, place in prepared.places.items() if name not in ("base_model", MERGED)}
    wanted = {name: [(name, task) for task in prepared.spec.tasks] for name in own}
    scores = score(replace(prepared, places=own, wanted=wanted), report=report, progress=progress)
    loading = Loading(prepared.recipe, prepared.lock, prepared.evaluator, report=report)
    seen = {}
    for name in (MERGED, "base_model"):
        report(f"looking at {name}")
        with step(f"loading {name}"):
            model = loading.load(name, prepared.places[name])
        seen[name] = _seen(model, prepared, name, progress)
    merged, base = seen[MERGED], seen["base_model"]
    tasks = [*prepared.spec.tasks]
    sizes = [len(prepared.examples[task]) for task in tasks]
    rights = [merged.answers == merged.labels, *(_right(scores, name, tasks) for name in own)]
    return Observed(
        np.repeat([[*own].index(task) for task in tasks], sizes),
        merged.labels,
        merged.answers,
        _contents(prepared),
        merged.features,
        merged.names == base.names,
        np.stack(rights, axis=1),
    )


@dataclass(frozen=True)
class _Seen:
    features: Float64[np.ndarray, "examples features"]
    labels: Int64[np.ndarray, " examples"]
    answers: Int64[np.ndarray, " examples"]
    names: np.ndarray


def _seen(model: LoadedModel, prepared: Prepared, name: str, progress: ProgressBar) -> _Seen:
    """Return a model's views of all examples, their classes, and those that it chooses, with their names."""
    looks, labels = [], []
    total = sum(len(prepared.examples[task]) for task in prepared.spec.tasks)
    with opened(progress, total, f"looking at {name}", "examples") as advance:
        for task, data in prepared.spec.tasks.items():
            with about_data(prepared.recipe, data):
                batches = prepared.evaluator.encode(
                    model, prepared.examples[task], columns_of(data), prepared.spec.batch_size
                )
                for parts, classes, _ in batches:
                    looks.append(look(model, parts))
                    labels += classes
                    if advance is not None:
                        advance(len(classes))
    chosen = np.concatenate([one.answers for one in looks])
    names = np.array([str(model.network.config.id2label[number]) for number in chosen.tolist()])
    features = np.concatenate([one.features for one in looks])
    return _Seen(features, np.array(labels), chosen, names)


def _right(scores: Scores, model: str, tasks: Sequence[str]) -> Bool[np.ndarray, " examples"]:
    """Return whether a model is right on the examples of all tasks, one task after the other."""
    found = []
    for task in tasks:
        own = scores.get(model, task)
        assert own is not None
        found.append(np.array(own.outcomes) == 1)
    return np.concatenate(found)


def _contents(prepared: Prepared) -> tuple[str, ...]:
    """Return a digest of the input of each example."""
    found: list[str] = []
    for task, data in prepared.spec.tasks.items():
        column = data.input_column or prepared.evaluator.input_column  # type: ignore[attr-defined]
        found += [digest_of(value) for value in prepared.examples[task][column]]
    return tuple(found)
