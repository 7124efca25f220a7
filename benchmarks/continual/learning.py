"""Learn tasks one after the other, each from the checkpoint before it, by the loop of `hm.finetune`.

A finished checkpoint is kept, so that an interrupted run goes on with the task that it was learning.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators import Evaluator
from hub_magmax.evaluation.evaluators.generation import TextToText
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model, without_bars
from hub_magmax.evaluation.evaluators.zero_shot import ZeroShotImageClassification
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.training import Training, TrainingData
from hub_magmax.recipe.values import Data
from hub_magmax.training.loop import frozen_parameters, train
from hub_magmax.training.order import seed_of
from hub_magmax.training.states import TrainingFolder
from hub_magmax.training.step_examples import step_examples_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Course:
    """Settings for learning each task: AdamW, warm-up and a cosine to zero; the paper's numbers for images.

    Attributes:
        epochs: Passes over a task's examples.
        batch_size: Of all processes together.
        learning_rate: At its peak.
        weight_decay: AdamW's.
        warm_up: Share of the steps.
        clip: Largest norm of the gradient.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warm_up: float = 0.1
    clip: float = 1.0

    def training(self, task: str, columns: Data) -> Training:
        """Return the same for one task, as a recipe has it."""
        data = TrainingData(**columns.model_dump(exclude={"split"}))
        return Training(
            data={task: data},
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warm_up,
            clip_norm=self.clip,
            checkpoint_every=2**62,  # an unfinished task is begun anew
        )


@dataclass(frozen=True)
class Learner:
    """Parts that differ between kinds of models.

    Attributes:
        evaluator: Encodes examples, and gives each a loss.
        columns: Where inputs and labels are.
        frozen: Globs over names of parameters that keep their values.
        rank: Of adapters on the attention's queries and values; 0 learns the weights themselves. After each
            task the adapters are added to the weights, so a checkpoint is a whole model, and its task
            vector the sum of the products of all adapters so far.
        alpha: An adapter's product counts alpha / rank times.
    """

    evaluator: Evaluator
    columns: Data
    frozen: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 32.0

    def load(self, place: ModelPlace) -> LoadedModel:
        return load_model(place, self.evaluator.model_class, self.evaluator.processor_class, "learning")

    def prepare(self, model: LoadedModel) -> None:
        """Let only what is learned require gradients."""
        frozen_parameters(model, self.frozen)
        if self.rank:
            model.network.requires_grad_(False)
            for linear in _queries_and_values(model.network):
                shape = linear.out_features, linear.in_features
                adapter = _Adapter(*shape, self.rank, self.alpha / self.rank).to(linear.weight)
                parametrize.register_parametrization(linear, "weight", adapter)

    def finish(self, model: LoadedModel) -> None:
        """Bring the network back to the form that it is saved in."""
        if self.rank:
            for linear in _queries_and_values(model.network):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def image_learner(evaluator: ZeroShotImageClassification, columns: Data) -> Learner:
    """Return what fine-tunes CLIP's image tower and its projection.

    The head is made from the frozen text tower; all classes are told apart from the first task on.
    """
    return Learner(evaluator, columns, ("text_model.*", "text_projection.*", "logit_scale"))


def text_learner(rank: int = 0) -> Learner:
    """Return what fine-tunes a text-to-text model to answer with the label's text."""
    return Learner(TextToText(), Data(dataset="-"), rank=rank)


class _Adapter(nn.Module):
    """W + factor · B A with B zero at first, so that learning starts from W."""

    def __init__(self, rows: int, columns: int, rank: int, factor: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(rank, columns) / math.sqrt(columns))
        self.second = nn.Parameter(torch.zeros(rows, rank))
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * (self.second @ self.first)


def _queries_and_values(network: nn.Module) -> list[nn.Linear]:
    found = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("q", "v", "q_proj", "v_proj")
    ]
    assert found, "no attention with linear layers called q and v"
    return found


def learn_sequence(
    learner: Learner,
    base: ModelPlace,
    tasks: Mapping[str, Dataset],
    folder: Path,
    *,
    course: Course,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Path, dict[str, Path]]:
    """Return the folders of the base model and of the checkpoint after each task.

    Args:
        learner: What is particular to the kind of model.
        base: Where learning starts; copied, so that all checkpoints have the same tensors.
        tasks: Training examples by task, in order.
        folder: Checkpoints that are there already are kept.
        course: How each task is learned.
        seed: Of the order of the examples and all else that is drawn.
        report: Called with a line of text after each task.
    """
    processes, place = find_processes(), base
    made = {}
    for name, examples in {"base": None, **tasks}.items():
        made[name] = target = folder / name
        if not processes.first_decides(target.is_dir):
            model = learner.load(place)
            if examples is not None:
                _learn(learner, model, examples, course, seed, target, processes)
            if processes.is_first:
                _save(model, target)
                report(f"{name}: learned")
        processes.wait()
        place = ModelPlace(str(target))
    return made.pop("base"), made


def _learn(
    learner: Learner,
    model: LoadedModel,
    examples: Dataset,
    course: Course,
    seed: int,
    target: Path,
    processes: Processes,
) -> None:
    """Train the model of the checkpoint `target` in place."""
    name = target.name
    torch.manual_seed(seed_of(seed, f"draws of {name}"))
    learner.prepare(model)
    spec = course.training(name, learner.columns)
    step_examples = step_examples_of(spec, name, [examples], learner.evaluator, seed)
    num_steps = step_examples.mixture.num_steps(course.epochs, len(examples))
    folder = TrainingFolder(target)
    train(model, step_examples, spec, num_steps, folder, processes, lambda line: None, None)
    learner.finish(model)


def _save(model: LoadedModel, target: Path) -> None:
    unfinished = target.with_name(target.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with without_bars():
        model.network.eval().save_pretrained(unfinished)
        model.processor.save_pretrained(unfinished)
    unfinished.rename(target)
