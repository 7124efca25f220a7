"""Assessment of a merged model beside its base model and the tasks' own checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.evaluation.tradeoff import Tradeoff, task_tradeoffs, weighted_mean


@dataclass(frozen=True)
class Mean:
    """Mean scores over the same tasks; None where a model was not scored on all of them.

    Attributes:
        merged, base, own: Of the merged model, the base model, and each task's own checkpoint.
    """

    merged: float | None
    base: float | None
    own: float | None

    @property
    def is_below_base(self) -> bool:
        return self.merged is not None and self.base is not None and self.merged < self.base


@dataclass(frozen=True)
class Assessment:
    """How a merged model does beside the models that it is made of.

    Attributes:
        rows: One per task, with the scores that were measured.
        is_share: Scores are shares, of which one can be a part of another.
    """

    rows: tuple[Tradeoff, ...]
    is_share: bool

    @cached_property
    def weighted(self) -> Mean:
        """Means weighted by the preference."""
        return self._mean([row.preference for row in self.rows])

    @cached_property
    def plain(self) -> Mean:
        """Means in which each task that the merged model was scored on counts the same."""
        return self._mean([float(row.merged is not None) for row in self.rows])

    def _mean(self, weights: Sequence[float]) -> Mean:
        total = math.fsum(weights) or 1.0
        columns: tuple[list[Score | None], ...] = (
            [row.merged for row in self.rows],
            [row.base for row in self.rows],
            [row.own for row in self.rows],
        )
        return Mean(*(weighted_mean(column, [weight / total for weight in weights]) for column in columns))

    @cached_property
    def compared(self) -> tuple[Tradeoff, ...]:
        """Tasks on which the merged model and the base model were scored."""
        return tuple(row for row in self.rows if row.to_base is not None)

    @cached_property
    def below_base(self) -> tuple[Tradeoff, ...]:
        """Tasks on which the merged model scores less than the base model, the worst first."""
        below = (row for row in self.compared if row.to_base is not None and row.to_base < 0)
        return tuple(sorted(below, key=lambda row: row.to_base or 0.0))

    @cached_property
    def own_below_base(self) -> tuple[Tradeoff, ...]:
        """Tasks whose own checkpoint scores less on them than the base model, the worst first."""
        found = [(row.own.value - row.base.value, row) for row in self.rows if row.own and row.base]
        return tuple(
            row for _, row in sorted((pair for pair in found if pair[0] < 0), key=lambda pair: pair[0])
        )

    @property
    def is_below_base(self) -> bool:
        """Whether it scores less than its base model on any task, or on average."""
        return bool(self.below_base) or self.weighted.is_below_base or self.plain.is_below_base

    @cached_property
    def kept(self) -> dict[str, float]:
        """By task, the share of its own checkpoint's score that is kept; empty unless scores are shares."""
        return {
            row.task: row.merged.value / row.own.value
            for row in self.rows
            if self.is_share and row.merged and row.own and row.own.value > 0
        }

    @cached_property
    def worst(self) -> Tradeoff | None:
        """The task that keeps the least of its own checkpoint's score."""
        if self.kept:
            return min(
                (row for row in self.rows if row.task in self.kept), key=lambda row: self.kept[row.task]
            )
        losing = [row for row in self.rows if row.to_own is not None]
        return min(losing, key=lambda row: row.to_own or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        kept = list(self.kept.values())
        return {
            "is_below_base": self.is_below_base,
            "below_base": {row.task: row.to_base for row in self.below_base},
            "tasks_compared_with_base": len(self.compared),
            "own_below_base": {
                row.task: row.own.value - row.base.value
                for row in self.own_below_base
                if row.own and row.base
            },
            "weighted_means": vars(self.weighted),
            "plain_means": vars(self.plain),
            "share_kept": {"mean": math.fsum(kept) / len(kept), "least": min(kept)} if kept else None,
            "worst_task": self.worst.task if self.worst else None,
        }


def assess(scores: Scores | None, preference: Mapping[str, float]) -> Assessment | None:
    """Return how the merged model does, by scores of it and others; None where it was not scored.

    Args:
        scores: What was measured.
        preference: How much each task matters; sums to 1.
    """
    rows = task_tradeoffs(scores, preference)
    if scores is None or not any(row.merged for row in rows):
        return None
    return Assessment(rows, scores.is_share)
