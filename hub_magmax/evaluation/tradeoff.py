"""Trade-offs: gain or loss of each task by the merge, as the card states and its picture shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hub_magmax.evaluation.intervals import Difference, paired_difference
from hub_magmax.evaluation.scores import MERGED, Score, Scores


@dataclass(frozen=True)
class Tradeoff:
    """One task's three models. A score is None where nothing was measured.

    Attributes:
        task, preference: The task and how much it was asked to matter.
        base: Score of the base model.
        own: Score of the checkpoint that was fine-tuned on this task.
        merged: Score of the merged model.
    """

    task: str
    preference: float
    base: Score | None = None
    own: Score | None = None
    merged: Score | None = None

    @property
    def to_own(self) -> float | None:
        """Score of the merged model minus that of the task's own checkpoint."""
        return self.merged.value - self.own.value if self.merged and self.own else None

    @property
    def to_base(self) -> float | None:
        """Score of the merged model minus that of the base model."""
        return self.merged.value - self.base.value if self.merged and self.base else None

    @cached_property
    def own_difference(self) -> Difference | None:
        """`to_own` with its interval; None unless both models' outcomes were kept."""
        return paired(self.merged, self.own)

    @cached_property
    def base_difference(self) -> Difference | None:
        """`to_base` with its interval; None unless both models' outcomes were kept."""
        return paired(self.merged, self.base)

    @property
    def num_examples(self) -> int | None:
        return next((s.num_examples for s in (self.merged, self.own, self.base) if s is not None), None)


def paired(first: Score | None, second: Score | None) -> Difference | None:
    """Compare two models on the examples that both were scored on, if single outcomes were kept."""
    if not first or not second or not first.outcomes or len(first.outcomes) != len(second.outcomes):
        return None
    return paired_difference(first.outcomes, second.outcomes)


def task_tradeoffs(scores: Scores | None, preference: Mapping[str, float]) -> tuple[Tradeoff, ...]:
    """Return one comparison per task of `preference`, in its order."""
    return tuple(
        Tradeoff(
            task,
            weight,
            *(scores.get(model, task) if scores else None for model in ("base_model", task, MERGED)),
        )
        for task, weight in preference.items()
    )


def weighted_mean(scores: Sequence[Score | None], weights: Sequence[float]) -> float | None:
    """Return Σ w·score over the positive weights, which sum to 1; None if one of these was not measured."""
    wanted = [(weight, score) for weight, score in zip(weights, scores, strict=True) if weight > 0]
    values = [weight * score.value for weight, score in wanted if score is not None]
    return math.fsum(values) if len(values) == len(wanted) else None


def best_single(scores: Scores, preference: Mapping[str, float]) -> tuple[str, float] | None:
    """Return the task whose checkpoint alone has the highest preference-weighted mean, and that mean."""
    weights = tuple(preference.values())
    found = {(score.model, score.task): score for score in scores.scores}  # T² look-ups
    means = {
        model: weighted_mean([found.get((model, task)) for task in preference], weights)
        for model in preference
    }
    measured = {model: mean for model, mean in means.items() if mean is not None}
    return max(measured.items(), key=lambda pair: pair[1], default=None)
