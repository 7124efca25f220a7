"""Order of a task's examples in training: which of them each step sees, by seed and number alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch


def seed_of(seed: int, purpose: str) -> int:
    """Return an independent seed for one purpose, so that what is resumed draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


@dataclass(frozen=True)
class Mixture:
    """Sizes of steps, and how many of their examples are of a capability in place of the task.

    Attributes:
        batch_size: Examples of a step.
        share: Of these, of the capability; from 0, below 1.
    """

    batch_size: int
    share: float = 0.0

    def until(self, step: int) -> tuple[int, int]:
        """Return the examples of the task, and of the capability, in the steps before one, from 0 on."""
        aside = math.floor(self.share * self.batch_size * step)
        return self.batch_size * step - aside, aside

    def num_steps(self, epochs: float, num_examples: int) -> int:
        """Return the steps of so many passes over a task's examples, rounded up; at least 1."""
        return max(1, math.ceil(epochs * num_examples / (self.batch_size * (1 - self.share))))


@dataclass
class ExampleOrder:
    """Endless passes over some examples, each in an order of its own.

    Attributes:
        num_examples: In a pass, at least 1.
        seed: Of the orders.
    """

    num_examples: int
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def between(self, start: int, end: int) -> list[int]:
        """Return the numbers of the examples from place `start` to before `end`, over all passes."""
        places = (divmod(place, self.num_examples) for place in range(start, end))
        return [self._order(epoch)[rest] for epoch, rest in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(seed_of(self.seed, f"epoch {epoch}"))
            drawn: list[int] = torch.randperm(self.num_examples, generator=generator).tolist()
            # Places come in order: of earlier passes, a step needs the one before at most.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = drawn
        return self._orders[epoch]
