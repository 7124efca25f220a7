"""Lengths of task vectors, and the factors that bring them to a common one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hub_magmax.recipe.merge_values import MergeValues

#: What has a common length: the task vectors of the whole model, those of them that are longer than the mean,
#: or the task vectors of each tensor.
Norms = Literal["equal", "clipped", "equal-by-tensor"]

#: The one of each tensor.
BY_TENSOR = "equal-by-tensor"

#: The one of vectors that are longer than the mean.
CLIPPED = "clipped"


@dataclass(frozen=True)
class Lengths:
    """Lengths of the task vectors, for recipes that scale them to a common one.

    Attributes:
        norms: As the recipe has it.
        whole: By task, over all merged tensors.
        by_tensor: By tensor, one for each task in order; empty where `norms` is `equal`.
    """

    norms: Norms
    whole: Mapping[str, float] = field(hash=False)
    by_tensor: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)

    def of(self, tensor: str) -> tuple[float, ...]:
        """Return the lengths that count for a tensor, one for each task."""
        whole = tuple(self.whole.values())
        return self.by_tensor.get(tensor, (0.0,) * len(whole)) if self.norms == BY_TENSOR else whole

    def factors(self, tensor: str, values: MergeValues) -> tuple[float, ...]:
        """Return what each task vector of a tensor is multiplied by before it is merged.

        All get the mean of their lengths, weighted by the preference: by coefficients without their signs,
        and equally where the method ignores the preference. Tasks that do not count and vectors of length 0
        have no part in it, and the factor 1; so has a task that counts alone, and under `clipped` each vector
        that is no longer than the mean.
        """
        lengths, masses = self.of(tensor), _masses(values)
        counted = [task for task, length in enumerate(lengths) if length and masses[task]]
        if len(counted) < 2:
            return (1.0,) * len(lengths)
        total = math.fsum(masses[task] * lengths[task] for task in counted)
        common = total / math.fsum(masses[task] for task in counted)
        most = 1.0 if self.norms == CLIPPED else math.inf
        return tuple(
            min(common / length, most) if task in counted else 1.0 for task, length in enumerate(lengths)
        )


def _masses(values: MergeValues) -> list[float]:
    """Return how much the length of each task counts in the mean; 0 of tasks that do not count."""
    unread, uses_preference = values.how.unread(values.weights), values.how.uses_preference
    return [
        0.0 if task in unread else abs(weight) if uses_preference else 1.0
        for task, weight in enumerate(values.weights)
    ]
