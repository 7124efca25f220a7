"""Tiny image classifiers that always give the same answer, so that every score is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from tests.families import recipe_values

CLASSES = ("cat", "dog", "emu")


def write_classifiers(folder: Path, biases: Mapping[str, Sequence[float]]) -> None:
    """Write one ViT per name whose logits are the biases, and `rows.parquet`: 6 cats, 3 dogs, 1 emu."""
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    for name, bias in biases.items():
        with torch.no_grad():
            for parameter in model.vit.parameters():  # a checkpoint of its own; the head does not look at it
                parameter.add_(0.001 * torch.randn_like(parameter))
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(bias))
        model.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    write_rows(folder / "rows.parquet", [0] * 6 + [1] * 3 + [2])


def write_leaning(folder: Path) -> None:
    """Write classifiers of which `a` and `b` lean to a class each, so that the merged model's answer depends
    on who weighs more, and rows of both classes.
    """
    torch.manual_seed(0)
    write_classifiers(folder, {"base": (0.0, 0.0, 0.1), "a": (1.0, 0.0, 0.1), "b": (0.0, 1.0, 0.1)})
    write_rows(folder / "cats.parquet", [0] * 9 + [2])
    write_rows(folder / "dogs.parquet", [1] * 7 + [2] * 3)


def write_rows(path: Path, labels: Sequence[int]) -> None:
    pictures = [PillowImage.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)) for i in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    rows = Dataset.from_dict({"image": pictures, "label": list(labels)}, features=features)
    rows.to_parquet(str(path))


def classifier_recipe(**changes: Any) -> dict[str, Any]:
    """Return a recipe over `base`, `a` and `b`, whose evaluation has no tasks of its own."""
    evaluation = {"evaluator": "image-classification", "tasks": {}}
    return recipe_values(("a", "b"), **{"evaluation": evaluation, **changes})
