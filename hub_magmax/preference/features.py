"""Features of examples: the inputs of the last layer of a model's head.

That is the hidden state right before the classifier, of any architecture: the normalised class token of
a ViT, the pooled output of a BERT, the average-pooled map of a ResNet. It is caught where it enters the
linear layer that makes the logits, so no table of architectures is needed. Where that layer runs on
every token (decoders), the mean over the tokens that are not padding is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators.classification import ImageClassification, TextClassification
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.recipe.values import Data
from hub_magmax.text import step

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

#: Examples in one forward pass.
BATCH_SIZE = 64


@dataclass(frozen=True)
class FeatureModel:
    """A model that is ready to give features.

    Attributes:
        network: In evaluation mode.
        head: Its linear layer whose input is the feature.
        encode: Turns a list of raw inputs into the network's arguments, in one part or several.
        name: For messages.
    """

    network: Any
    head: Any
    encode: Callable[[list[Any]], list[Any]]
    name: str


def input_column(examples: Dataset, data: Data) -> str:
    """Return the column that holds the inputs: the one named, else `image`, else `text`.

    Raises:
        EvaluationError: If there is neither.
    """
    for column in (data.input_column,) if data.input_column else ("image", "text"):
        if column in examples.column_names:
            return column
    raise EvaluationError(
        "there is no column `image` or `text`",
        where=data.dataset,
        expected=f"one of {', '.join(examples.column_names)}",
        hint="Name one of them with input_column, beside the dataset.",
        key=("input_column",),
    )


def holds_images(examples: Dataset, column: str) -> bool:
    """Say whether the column holds images; otherwise it holds texts.

    Raises:
        EvaluationError: If it holds neither.
    """
    feature = examples.features[column]
    if type(feature).__name__ == "Image":
        return True
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return False
    raise EvaluationError(
        f"the column {column!r} holds neither images nor texts",
        where="preference",
        hint="Name another with input_column.",
    )


def load_feature_model(place: ModelPlace, *, images: bool) -> FeatureModel:
    """Load a checkpoint of an image or text classification model.

    Raises:
        EvaluationError: If it cannot be loaded, or has no linear head.
    """
    kind = ImageClassification() if images else TextClassification()
    model = load_model(place, kind.model_class, kind.processor_class, "comparing features")

    def encode(inputs: list[Any]) -> list[Any]:
        return [part.to(model.device) for part in kind.encode_inputs(model, inputs)[0]]

    return FeatureModel(model.network, find_head(model.network, place.name), encode, place.name)


def find_head(network: Any, name: str) -> Any:
    """Return the last linear layer outside the backbone with one output per class.

    Raises:
        EvaluationError: If there is none.
    """
    from torch import nn

    backbone = getattr(network, getattr(network, "base_model_prefix", "") or "-", None)
    inside = set() if backbone is None or backbone is network else set(backbone.modules())
    heads = [
        module
        for module in network.modules()
        if isinstance(module, nn.Linear)
        and module not in inside
        and module.out_features == network.config.num_labels
    ]
    if not heads:
        raise EvaluationError(
            "the model has no linear layer with one output per class, so its features are not known",
            where=name,
            hint="Use labels, or write the weights by hand.",
        )
    return heads[-1]


def features(model: FeatureModel, examples: Dataset, column: str) -> Float64[np.ndarray, "examples features"]:
    """Return the features of all examples, in order, in batches and without gradients."""
    import torch

    caught: list[Any] = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    rows: list[torch.Tensor] = []
    try:
        with torch.inference_mode(), step(f"running {model.name} for features of {len(examples):,} examples"):
            for start in range(0, len(examples), BATCH_SIZE):
                for part in model.encode(list(examples[start : start + BATCH_SIZE][column])):
                    caught.clear()
                    model.network(**part)
                    rows.append(_one_per_example(caught[-1], part.get("attention_mask")))
    finally:
        handle.remove()
    return torch.cat(rows).double().cpu().numpy()


def _one_per_example(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return (examples, features): the mean over tokens where there is one state per token."""
    if states.ndim == 2:
        return states
    if mask is None or mask.shape != states.shape[:2]:
        return states.flatten(1, -2).mean(dim=1)
    counted = mask.unsqueeze(-1).to(states.dtype)
    return (states * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
