"""Rounds of fine-tuning and merging, as a recipe asks for them: number, step, momentum."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hub_magmax.recipe.values import Number, Positive, Spec

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
