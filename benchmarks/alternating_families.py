"""Base models with the tasks that `benchmarks/alternating.py` trains in rounds: digits, and definitions.

Definitions are those of `benchmarks/wordnet.py`, the short ones alone, which MiniLM reads; its two uppermost
layers learn. What the layers below make of the test texts is computed once for all models of a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import wordnet
from benchmarks.continual.scoring import RefilledModel
from benchmarks.sentence_classifiers import LEARNING_RATE, make_base, unlearned
from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import get_evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.quickstart import make_family
from hub_magmax.quickstart.digits import load_examples, prepare
from hub_magmax.quickstart.settings import DEFAULTS
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.schema import Recipe

#: Words that a definition has at most.
MAX_WORDS = 12

#: Short definitions of each class: to learn from, and at most to test with.
NUM_TRAIN, NUM_TEST = 16, 30

#: Name of the examples of all tasks together.
JOINT = "joint"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Test examples of one task, as a network takes them, and their classes."""

    inputs: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Family:
    """A base model and its tasks, with what all runs share.

    Attributes:
        base_model: Its checkpoint.
        data: Data set of each task, in order, and of `JOINT`.
        batches: Test examples of each task, which no model is trained on.
        training: Values of a recipe's `training` but for data and length.
        epochs: Of each task, in all rounds together.
        seed: Of data and runs.
        model: Takes the weights of any of its models.
    """

    base_model: Path
    data: Mapping[str, Path]
    batches: Mapping[str, Sequence[Batch]]
    training: Mapping[str, Any]
    epochs: int
    seed: int
    model: RefilledModel

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.batches)

    @property
    def sizes(self) -> list[int]:
        """Test examples of each task."""
        return [sum(len(batch.labels) for batch in own) for own in self.batches.values()]

    @cached_property
    def base(self) -> Weights:
        return load_file(self.base_model / "model.safetensors")

    def right(self, weights: Weights) -> list[int]:
        """Return how many test examples of each task a model answers well, over the classes of all tasks."""
        network = self.model.with_weights(weights).network
        with torch.inference_mode():
            return [sum(_num_right(network, batch) for batch in own) for own in self.batches.values()]

    def recipe(
        self, run: Path, tasks: Sequence[str], method: str, weights: Sequence[float], rounds: int
    ) -> Recipe:
        """Return a recipe of rounds whose checkpoints and model are in the folder `run`."""
        run.mkdir(parents=True, exist_ok=True)
        training = {
            **self.training,
            "order": "from_base",
            "data": {task: {"dataset": str(self.data[task].absolute())} for task in tasks},
            "epochs": self.epochs / rounds,
            "checkpoint_every": 10_000,
            "alternate": {"rounds": rounds, "keep": False},
        }
        values = {
            "schema": 1,
            "base_model": str(self.base_model.absolute()),
            "tasks": [{"name": task, "model": f"./tasks/{task}"} for task in tasks],
            "training": training,
            "method": method,
            "tensors": [{"match": glob, "take": "base_model"} for glob in self.training["frozen"]],
            "preference": {"weights": dict(zip(tasks, weights, strict=True))},
            "output": {"path": "./merged"},
            "seed": self.seed,
        }
        return parse_recipe(values, folder=run)


def _num_right(network: Any, batch: Batch) -> int:
    return int((network(**batch.inputs).logits.argmax(1) == batch.labels).sum())


def digits(folder: Path, seed: int, epochs: int) -> Family:
    """Return a family of digits, which is made in the folder if it is not there."""
    made = make_family(folder / f"digits-{seed}", seed=seed, report=print)
    test = prepare(load_examples(), made.classes, DEFAULTS, seed).test
    parts = {task: test.of(classes) for task, classes in made.classes.items()}
    task = DEFAULTS.task
    training = {
        "evaluator": "image-classification",
        "batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "label_smoothing": task.label_smoothing,
        "frozen": ["classifier.*"],
    }
    return Family(
        made.base_model,
        {name: made.data / name for name in made.tasks} | {JOINT: made.data / "all"},
        {name: [Batch({"pixel_values": part.images}, part.labels)] for name, part in parts.items()},
        training,
        epochs,
        seed,
        RefilledModel(_loaded(made.base_model, "image-classification")),
    )


def definitions(folder: Path, seed: int, epochs: int, encoder: Path, nouns: Path) -> Family:
    """Return a family of definitions, whose base model and data are made if they are not there.

    Args:
        folder: Of families.
        seed: Of the parts of the data, and of the runs.
        epochs: Of each task.
        encoder, nouns: MiniLM and data.noun, as `benchmarks/wordnet.py` says.
    """
    place, texts = folder / f"rounds-definitions-{seed}", wordnet.read(nouns, seed)
    base = place / "base"
    if not base.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        make_base(encoder, texts.head, base)
    loaded, frozen = _loaded(base, "text-classification"), unlearned(base)
    training = {
        "evaluator": "text-classification",
        "batch_size": 16,
        "learning_rate": LEARNING_RATE,
        "frozen": [*frozen],
    }
    return Family(
        base,
        _written(place / "data", texts.train),
        {task: _encoded(loaded, texts.test, classes) for task, classes in wordnet.TASKS.items()},
        training,
        epochs,
        seed,
        RefilledModel(loaded, _matching(load_file(base / "model.safetensors"), frozen)),
    )


def _written(folder: Path, texts: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Write the short definitions that each task learns from, and all of them; return the files by name."""
    parts = {JOINT: wordnet.CLASSES} | {task: tuple(own) for task, own in wordnet.TASKS.items()}
    for part, classes in parts.items():
        rows = {name: _short(texts[name])[:NUM_TRAIN] for name in classes}
        wordnet.write_rows(folder / f"{part}.jsonl", rows)
    return {part: folder / f"{part}.jsonl" for part in parts}


def _matching(weights: Weights, globs: Sequence[str]) -> Weights:
    return {name: value for name, value in weights.items() if any(fnmatchcase(name, glob) for glob in globs)}


def _loaded(checkpoint: Path, evaluator: str) -> LoadedModel:
    kind = get_evaluator(evaluator).make()
    return load_model(ModelPlace(str(checkpoint)), kind.model_class, kind.processor_class, "alternating")


def _short(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if len(text.split()) <= MAX_WORDS]


def _encoded(model: LoadedModel, texts: Mapping[str, Sequence[str]], classes: Iterable[str]) -> list[Batch]:
    """Return short definitions of some classes as one batch; they need little padding."""
    numbers = model.network.config.label2id
    pairs = [(text, numbers[name]) for name in classes for text in _short(texts[name])[:NUM_TEST]]
    encoded = model.processor([text for text, _ in pairs], padding=True, return_tensors="pt")
    return [Batch(dict(encoded), torch.tensor([label for _, label in pairs]))]
