"""Training of the tasks' checkpoints, as a recipe asks for it: data, length, optimiser, order, rounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hub_magmax.recipe.values import (
    MAX_PLACE_LENGTH,
    MAX_TASKS,
    Bits,
    Data,
    EvaluatorChoice,
    Number,
    Positive,
    Share,
    Spec,
    TaskName,
)

#: Tasks that a round's step has beside the recipe's own: the round's merge, and the step before.
MERGE, MOMENTUM = "round-merge", "round-momentum"


class Alternate(Spec):
    """Rounds of `hub-magmax alternate`: every task from the current model, a merge of all, a step.

    `step` is the share of the way from the current model to the merged one that a round goes; `momentum` is
    the share of the step of the round before in it. Without `keep` only what the last round began at and its
    checkpoints stay.
    """

    rounds: Annotated[int, Field(ge=1, le=10_000)]
    step: Positive = 1.0
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    keep: bool = True

    @property
    def num_kept(self) -> int | None:
        """How many models of earlier rounds a round needs and keeps; None where all stay."""
        return None if self.keep else 2 if self.momentum else 1

    def has_step(self, number: int) -> bool:
        """Say whether the model of a round, which count from 1, is another one than its merge."""
        return self.step != 1 or (self.momentum > 0 and number > 1)


#: A pattern over names of parameters or layers, as transformers gives them.
Glob = Annotated[str, Field(min_length=1, max_length=MAX_PLACE_LENGTH)]


class TrainingData(Data):
    """Examples that a task is trained on: by default the split `train`."""

    split: str = "train"


class Capability(Spec):
    """Examples of what the model shall keep, which take the place of a share of every step's examples."""

    data: TrainingData
    share: Share


class HeldOut(Spec):
    """Examples that a task is not trained on, and whose loss says when its training stops.

    The loss is measured after `every` steps; `patience` is how many measurements without a lower one end the
    training.
    """

    share: Share
    every: Annotated[int, Field(ge=1)] = 20
    patience: Annotated[int, Field(ge=1)] = 3


class Lora(Spec):
    """A LoRA adapter in place of a task's whole checkpoint, trained by PEFT.

    The change of each layer has no more than `rank` directions, and is scaled by `alpha` / `rank`, which is 1
    where `alpha` is not given. `targets` are globs over names of linear layers, by default all but the head.
    """

    rank: Annotated[int, Field(ge=1, le=4096)]
    alpha: Positive | None = None
    targets: tuple[Glob, ...] = ()

    @property
    def scale_alpha(self) -> float:
        """PEFT's `lora_alpha`."""
        return float(self.rank) if self.alpha is None else self.alpha


class Training(Spec):
    """How `hub-magmax finetune` makes the checkpoints of tasks whose folders are not there yet.

    `data` names the examples of each task. `order: sequential` begins each task at the checkpoint of the task
    before it, the first at the base model; `from_base` begins all at the base model. `evaluator` says how
    models read examples, by default as in `evaluation`. A task takes `epochs` passes over its examples, or
    `steps` of `batch_size` examples. AdamW's learning rate rises to `learning_rate` over the share `warmup`
    of the steps, and then follows `schedule`. `clip_norm` is the most that the norm of a gradient may be.
    `frozen` are globs over names of parameters that keep their values. Without `seed` it is the recipe's.
    `checkpoint_every` is the number of steps after which an interrupted training can go on. `capability`
    mixes examples against forgetting into those of every task. `held_out` stops a training early, and keeps
    the weights with the lowest loss on a share of the task's own examples. `quantization_aware` trains by the
    loss of weights that are rounded as `evaluation.quantized` rounds them. `lora` trains adapters.
    `alternate` says how `hub-magmax alternate` trains and merges in rounds.
    """

    data: Annotated[dict[TaskName, TrainingData], Field(min_length=1, max_length=MAX_TASKS)]
    capability: Capability | None = None
    held_out: HeldOut | None = None
    order: Literal["sequential", "from_base"] = "sequential"
    evaluator: EvaluatorChoice | None = None
    epochs: Positive | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[Positive, Field(le=1000)] = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    clip_norm: Positive | None = 1.0
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    frozen: tuple[Glob, ...] = ()
    lora: Lora | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    quantization_aware: Bits | None = None
    alternate: Alternate | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            both = "epochs and steps both say" if self.steps else "nothing says"
            raise ValueError(f"{both} how long a task is trained; write either, such as epochs: 3")
        return self

    @model_serializer(mode="wrap")
    def _with_null(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the null of `clip_norm`, which says something else than no `clip_norm`."""
        values: dict[str, Any] = handler(self)
        return values | {"clip_norm": None} if self.clip_norm is None else values
