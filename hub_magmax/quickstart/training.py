"""Training of the base model and of each task, and checkpoints that `from_pretrained` reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from hub_magmax.errors import CheckpointError
from hub_magmax.quickstart.digits import NAMES, NUM_CLASSES, SOURCE, Examples, Lesson
from hub_magmax.quickstart.settings import Settings, Training, generator_of
from hub_magmax.training.loop import Optimization, fit
from hub_magmax.training.order import seed_of

LOG = logging.getLogger(__name__)

#: Read by AutoImageProcessor. Written by hand because the class that would write it depends on whether
#: torchvision is installed. An image of another size is scaled to 8 by 8.
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": False,
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def make_base(lesson: Lesson, folder: Path) -> str:
    """Train from random weights: first the rotation of all images, then the digits of a few."""
    settings = lesson.settings
    torch.manual_seed(seed_of(lesson.seed, "weights"))
    model = _new_model(settings)
    seen = torch.cat([lesson.pretraining.images, lesson.train.images])
    rotated = torch.cat([torch.rot90(seen, turns, (2, 3)) for turns in range(4)])
    turns = torch.arange(4).repeat_interleave(len(seen))
    _fit(
        _Rotations(model.vit, settings.hidden_size),
        rotated,
        turns,
        settings.pretext,
        generator_of(lesson.seed, "pretext"),
    )
    few = lesson.pretraining
    _fit(_Digits(model), few.images, few.labels, settings.supervised, generator_of(lesson.seed, "supervised"))
    _save(
        model, folder, "the base model", "which way up digits are, and a little about which digits they are"
    )
    return f"accuracy over all ten digits {_accuracy(model, lesson.test):.2f}"


def make_task(lesson: Lesson, task: str, previous: Path, folder: Path) -> str:
    """Learn one task from the checkpoint before it."""
    model = _load(previous)
    digits = lesson.classes[task]
    own = lesson.train.of(digits)
    _fit(
        _Digits(model),
        own.images,
        own.labels,
        lesson.settings.task,
        generator_of(lesson.seed, f"task {task}"),
    )
    shown = ", ".join(NAMES[digit] for digit in digits)
    _save(model, folder, f"`{task}`", f"the digits {shown}, continuing from `{previous.name}`")
    return f"accuracy on its own digits {_accuracy(model, lesson.test.of(digits)):.2f}"


class _Digits(nn.Module):
    """Images to the logits of the ten digits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples 10"]:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


class _Rotations(nn.Module):
    """Images to the logits of four rotations. The head is thrown away afterwards."""

    def __init__(self, transformer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(hidden_size, 4)

    def forward(self, images: Float[Tensor, "examples 1 8 8"]) -> Float[Tensor, "examples 4"]:
        logits: Tensor = self.head(self.transformer(pixel_values=images).last_hidden_state[:, 0])
        return logits


class _Loss(nn.Module):
    """Mean loss of images by the logits of a network."""

    def __init__(self, network: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.network, self._smoothing = network, smoothing

    def forward(
        self, images: Float[Tensor, "examples 1 8 8"], labels: Int64[Tensor, " examples"]
    ) -> Float[Tensor, ""]:
        return cross_entropy(self.network(images), labels, label_smoothing=self._smoothing)


def _new_model(settings: Settings) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        num_channels=1,
        patch_size=2,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        id2label=dict(enumerate(NAMES)),
        label2id={name: digit for digit, name in enumerate(NAMES)},
    )
    model = ViTForImageClassification(config)
    orthonormal = torch.linalg.qr(torch.randn(settings.hidden_size, NUM_CLASSES)).Q.T
    head = {"weight": orthonormal * settings.head_scale, "bias": torch.zeros(NUM_CLASSES)}
    model.classifier.load_state_dict(head)
    model.classifier.requires_grad_(False)
    return model


def _load(folder: Path) -> ViTForImageClassification:
    """Return the model of an earlier step, its head frozen."""
    try:
        model = ViTForImageClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be loaded ({str(error).strip().splitlines()[0]})",
            where=str(folder),
            hint="Delete it and the checkpoints learned after it, and start again.",
        ) from error
    model.classifier.requires_grad_(False)
    return model


def _fit(
    network: nn.Module,
    images: Float[Tensor, "examples 1 8 8"],
    labels: Int64[Tensor, " examples"],
    training: Training,
    order: torch.Generator,
) -> None:
    """Train the parameters of `network` that are not frozen, in place."""
    steps = [
        batch
        for _ in range(training.epochs)
        for batch in torch.split(torch.randperm(len(labels), generator=order), training.batch_size)
    ]
    fit(
        _Loss(network, training.label_smoothing),
        lambda step: (images[steps[step]], labels[steps[step]]),
        Optimization(len(steps), training.learning_rate, weight_decay=training.weight_decay, on_cpu=True),
        report=lambda line: LOG.debug("%s: %s", type(network).__name__.strip("_").lower(), line),
    )


@torch.no_grad()
def _accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the share of examples whose class has the largest of all ten logits."""
    predicted = _Digits(model).eval()(examples.images).argmax(dim=1)
    return float((predicted == examples.labels).double().mean())


def _save(model: ViTForImageClassification, folder: Path, title: str, learned: str) -> None:
    """Write a checkpoint as `from_pretrained` reads it, with its image processor and a card."""
    model.save_pretrained(folder)
    processor = json.dumps(_PROCESSOR, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    (folder / "README.md").write_text(_model_card(model.num_parameters(), title, learned), encoding="utf-8")


def _model_card(num_parameters: int, title: str, learned: str) -> str:
    return f"""---
license: cc-by-4.0
library_name: transformers
pipeline_tag: image-classification
---

# Handwritten digits: {title}

A vision transformer of {num_parameters:,} parameters for images of 8 by 8 grey values.
It learned {learned}.
Its head over the ten digits is orthonormal and was never trained.

{SOURCE}"""
