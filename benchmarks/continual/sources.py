"""Families of checkpoints to measure, each with its data: made where they are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.data import load_examples
from hub_magmax.preference.features import features, load_feature_model
from hub_magmax.quickstart import Settings, make_family
from hub_magmax.quickstart.settings import DEFAULTS
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset


#: Training examples of all tasks together that statistics are made of, the same number of each task.
NUM_STATISTICS = 1000


@dataclass(frozen=True)
class Family:
    """Checkpoints learned one after the other, and the data to measure them with.

    Attributes:
        name: Such as `t5s0`: five tasks, seed 0.
        seed: What everything drawn for it depends on.
        base_model: Checkpoint that the first task was learned from.
        tasks: Checkpoints by task, in the order they were learned.
        test: Test examples of all tasks, one task after the other.
        owners: Number of the task of each of them.
        columns: Where inputs and labels are.
        evaluator: What a recipe would say.
        kinds: Preferences that can be had, beside `uniform`.
        classes: Labels of each task, for the preference from labels.
        train: Training examples of each task, for the preference by transport.
        features: Features of examples under a checkpoint, for the same.
        num_train: Training examples of all tasks together that it looks at.
        statistics: Training examples of each task that methods with data look at; without them, these methods
            are left out.
        num_statistics: How many there are of each task.
        joint: Checkpoint that was learned from the examples of all tasks together, where there is one.
        unlearned: Globs over tensors that no task changes; merges take them from the base model.
        transported: Methods that get a preference by transport, when corrected merges get none; None for all.
        sources: SHA-256 of the files that the examples come from, by name, where packages bring them.
        recipe: Names the checkpoints, where they were not made here.
        identity: Tells these from all others, where they were not made here.
    """

    name: str
    seed: int
    base_model: Path
    tasks: Mapping[str, Path] = field(hash=False)
    test: Dataset = field(hash=False)
    owners: np.ndarray = field(hash=False)
    columns: Data
    evaluator: Mapping[str, Any] = field(hash=False)
    kinds: tuple[str, ...] = ("labels", "transport", "transport, published")
    classes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict, hash=False)
    train: Mapping[str, Dataset] = field(default_factory=dict, hash=False)
    features: Callable[[Path, Dataset], np.ndarray] | None = field(default=None, hash=False)
    num_train: int = 300
    statistics: Mapping[str, Data] = field(default_factory=dict, hash=False)
    num_statistics: int = 0
    joint: Path | None = None
    unlearned: tuple[str, ...] = ()
    transported: tuple[str, ...] | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    recipe: Recipe | None = None
    identity: str = ""


def digits(
    folder: Path,
    num_tasks: int,
    seed: int,
    *,
    settings: Settings = DEFAULTS,
    report: Callable[[str], None] = lambda line: None,
) -> Family:
    """Return a family of digits, made in `folder` / `t{num_tasks}s{seed}`."""
    name = f"t{num_tasks}s{seed}"
    made = make_family(folder / name, num_tasks=num_tasks, seed=seed, settings=settings, report=report)
    parts = {
        split: {
            task: load_examples(Data(dataset=str(made.data / task), split=split), folder)
            for task in made.tasks
        }
        for split in ("train", "test")
    }
    test, owners = joined(parts["test"])
    each = min(NUM_STATISTICS // num_tasks, *map(len, parts["train"].values()))
    return Family(
        name,
        seed,
        made.base_model,
        made.tasks,
        test,
        owners,
        Data(dataset="-"),
        {"name": "image-classification"},
        classes=made.classes,
        train=parts["train"],
        features=_classifier_features,
        statistics={
            task: Data(dataset=str((made.data / task).absolute()), split=f"train[:{each}]")
            for task in made.tasks
        },
        num_statistics=each,
    )


def joined(parts: Mapping[str, Dataset]) -> tuple[Dataset, np.ndarray]:
    """Return all examples, one task after the other, and the number of each one's task."""
    from datasets import concatenate_datasets

    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    return concatenate_datasets(list(parts.values())), owners


def _classifier_features(checkpoint: Path, examples: Dataset) -> np.ndarray:
    model = load_feature_model(ModelPlace(str(checkpoint)), images=True)
    return features(model, examples, "image")
