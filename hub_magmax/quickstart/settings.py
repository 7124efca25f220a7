"""Settings of the checkpoints: training of each, and seeds of all draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hub_magmax.training.order import seed_of


@dataclass(frozen=True)
class Training:
    """One training run: AdamW, ten per cent warm-up, cosine to zero, gradient norm at most 1.

    Attributes:
        epochs: Passes over the examples.
        learning_rate: At its peak.
        batch_size: Examples in a step; the last step of an epoch may have fewer.
        weight_decay: AdamW's.
        label_smoothing: Share of a target that is spread over all classes. With none, a task of few
            classes drives the others so far away that MAGMAX falls below the base model.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.01
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the checkpoints, besides the number of tasks and the seed.

    Attributes:
        hidden_size: Width of the transformer.
        num_layers: Its depth.
        head_scale: Length of each class's vector in the frozen head.
        num_supervised: Examples per digit that only the base model's supervised training sees.
        pretext: Which of four rotations; an epoch has every image four times.
        supervised: All ten digits, few examples.
        task: The digits of one task.
    """

    hidden_size: int = 96
    num_layers: int = 3
    head_scale: float = 4.0
    num_supervised: int = 20
    pretext: Training = Training(epochs=5, learning_rate=1e-3, batch_size=64)
    supervised: Training = Training(epochs=9, learning_rate=5e-4, batch_size=64)
    task: Training = Training(epochs=16, learning_rate=8e-5, batch_size=32, label_smoothing=0.05)


#: Settings of the quickstart.
DEFAULTS = Settings()


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Return a generator with the seed of one purpose."""
    return torch.Generator().manual_seed(seed_of(seed, purpose))
