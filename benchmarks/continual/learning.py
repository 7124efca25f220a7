"""Learn tasks one after the other, each from the checkpoint before it; on one process or many, by accelerate.

A finished checkpoint is kept, so that an interrupted run goes on with the task that it was learning.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators.examples import class_lookup, label_names
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model, without_bars
from hub_magmax.evaluation.evaluators.zero_shot import ZeroShotImageClassification
from hub_magmax.quickstart.settings import generator_of, seed_of
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]


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


class Learner(Protocol):
    """Parts that differ between kinds of models."""

    model_class: str
    processor_class: str

    def module(self, model: LoadedModel) -> nn.Module:
        """Return what turns a batch into a loss; only parameters that are learned require gradients."""
        ...

    def collate(self, model: LoadedModel, examples: Dataset) -> Callable[[list[dict[str, Any]]], Batch]:
        """Return what turns examples into a batch."""
        ...

    def finish(self, model: LoadedModel) -> None:
        """Bring the network back to the form that it is saved in."""
        ...


@dataclass(frozen=True)
class ImageLearner:
    """Fine-tunes the image tower and its projection against a frozen head made from the text tower.

    Attributes:
        evaluator: Has classes and templates; all classes are told apart from the first task on.
        columns: Where images and labels are.
    """

    evaluator: ZeroShotImageClassification
    columns: Data
    model_class: str = ZeroShotImageClassification.model_class
    processor_class: str = ZeroShotImageClassification.processor_class

    def module(self, model: LoadedModel) -> nn.Module:
        with torch.no_grad():
            head = self.evaluator.head(model)
        learned = [model.network.vision_model, model.network.visual_projection]
        model.network.requires_grad_(False)
        for part in learned:
            part.requires_grad_(True)
        return _ZeroShot(model.network, head)

    def collate(self, model: LoadedModel, examples: Dataset) -> Callable[[list[dict[str, Any]]], Batch]:
        numbers = {name: number for number, name in enumerate(self.evaluator.classes)}
        to_class = class_lookup(numbers, label_names(examples, self.columns.label_column))
        image, label = self.columns.input_column or "image", self.columns.label_column

        def batch(rows: list[dict[str, Any]]) -> Batch:
            images = [row[image].convert("RGB") for row in rows]
            encoded = model.processor(images=images, return_tensors="pt")
            labels = torch.tensor([to_class(row[label]) for row in rows])
            return {"images": encoded["pixel_values"], "labels": labels}

        return batch

    def finish(self, model: LoadedModel) -> None:
        pass


class _ZeroShot(nn.Module):
    def __init__(self, network: Any, head: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("head", head, persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        seen = normalize(self.network.get_image_features(pixel_values=images).pooler_output, dim=-1)
        return cross_entropy(seen @ self.head.T * self.network.logit_scale.exp(), labels)


@dataclass(frozen=True)
class TextLearner:
    """Fine-tunes a text-to-text model to answer with the label's text.

    Attributes:
        rank: Of the adapters on the attention's queries and values; 0 learns every weight. After each
            task the adapters are added to the weights, so a checkpoint is a whole model, and its task
            vector the sum of the products of all adapters so far.
        alpha: An adapter's product counts alpha / rank times.
    """

    rank: int = 0
    alpha: float = 32.0
    model_class: str = "AutoModelForSeq2SeqLM"
    processor_class: str = "AutoTokenizer"

    def module(self, model: LoadedModel) -> nn.Module:
        if self.rank:
            model.network.requires_grad_(False)
            for linear in _queries_and_values(model.network):
                shape = linear.out_features, linear.in_features
                adapter = _Adapter(*shape, self.rank, self.alpha / self.rank).to(linear.weight)
                parametrize.register_parametrization(linear, "weight", adapter)
        return _TextToText(model.network)

    def collate(self, model: LoadedModel, examples: Dataset) -> Callable[[list[dict[str, Any]]], Batch]:
        def batch(rows: list[dict[str, Any]]) -> Batch:
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            encoded = model.processor([row["text"] for row in rows], **options)
            answers = model.processor([row["label"] for row in rows], **options)
            ignored = answers["attention_mask"] == 0
            return {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": answers["input_ids"].masked_fill(ignored, -100),
            }

        return batch

    def finish(self, model: LoadedModel) -> None:
        if self.rank:
            for linear in _queries_and_values(model.network):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


class _TextToText(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, **batch: Tensor) -> Tensor:
        loss: Tensor = self.network(**batch).loss
        return loss


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
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), dataloader_config=DataLoaderConfiguration(split_batches=True)
    )

    def load(place: ModelPlace) -> LoadedModel:
        return load_model(place, learner.model_class, learner.processor_class, "learning")

    def made(name: str, make: Callable[[], LoadedModel]) -> Path:
        target = folder / name
        if not target.is_dir():
            model = make()
            if accelerator.is_main_process:
                _save(model, target)
                report(f"{name}: learned")
        accelerator.wait_for_everyone()
        return target

    start = previous = made("base", lambda: load(base))
    learned = {}
    for name, examples in tasks.items():

        def make(examples: Dataset = examples, name: str = name, place: Path = previous) -> LoadedModel:
            model = load(ModelPlace(str(place)))
            _learn(learner, model, examples, accelerator, course, seed, name)
            return model

        learned[name] = previous = made(name, make)
    return start, learned


def _learn(
    learner: Learner,
    model: LoadedModel,
    examples: Dataset,
    accelerator: Accelerator,
    course: Course,
    seed: int,
    name: str,
) -> None:
    """Train the model in place."""
    torch.manual_seed(seed_of(seed, f"draws of {name}"))
    module = learner.module(model).train()
    loader = DataLoader(
        examples,
        batch_size=min(course.batch_size, len(examples)),
        shuffle=True,
        generator=generator_of(seed, f"order of {name}"),
        collate_fn=learner.collate(model, examples),
    )
    parameters: Sequence[Tensor] = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=course.learning_rate, weight_decay=course.weight_decay)
    num_steps = course.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(course.warm_up * num_steps), num_steps)
    prepared, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    for _ in range(course.epochs):
        for batch in loader:
            accelerator.backward(prepared(**batch))
            accelerator.clip_grad_norm_(parameters, course.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    learner.finish(model)
    accelerator.free_memory()


def _save(model: LoadedModel, target: Path) -> None:
    unfinished = target.with_name(target.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    with without_bars():
        model.network.eval().save_pretrained(unfinished)
        model.processor.save_pretrained(unfinished)
    unfinished.rename(target)
