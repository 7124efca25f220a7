"""Order of a task's examples in training: which of them each step sees, by seed and number alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch


def seed_of(seed: int, purpose: str) -> int:
    """Return an independent seed for one purpose, so that what is resumed draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


@dataclass
class ExampleOrder:
    """Endless passes over the examples of a task, each in an order of its own.

    A step takes the next `batch_size` examples, the last ones of a pass with the first ones of the next, so
    that all steps have the same size.

    Attributes:
        num_examples: In a pass, at least 1.
        batch_size: In a step.
        seed: Of the orders.
    """

    num_examples: int
    batch_size: int
    seed: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def num_steps(self, epochs: float) -> int:
        """Return the steps of so many passes, rounded up; at least 1."""
        return max(1, math.ceil(epochs * self.num_examples / self.batch_size))

    def batch(self, step: int) -> list[int]:
        """Return the numbers of the examples of a step, which counts from 0."""
        start = step * self.batch_size
        places = (divmod(place, self.num_examples) for place in range(start, start + self.batch_size))
        return [self._order(epoch)[rest] for epoch, rest in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(seed_of(self.seed, f"epoch {epoch}"))
            drawn: list[int] = torch.randperm(self.num_examples, generator=generator).tolist()
            # A step reaches into a pass before the first of its own only where it is longer than one.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = drawn
        return self._orders[epoch]
