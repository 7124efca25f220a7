"""Trade-off surface: scores across the simplex of preferences, and their Pareto front."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hub_magmax.evaluation.scores import Score, deviation
from hub_magmax.reporting.pareto import front, hypervolume

#: Files that a sweep writes, beside the merged model where there is one.
TABLE_NAME, FRONT_PICTURE_NAME, EXPLORER_NAME = "tradeoffs.csv", "tradeoffs.png", "tradeoffs.html"


@dataclass(frozen=True)
class Point:
    """One preference, one weight per task of the recipe, and a score per evaluated task.

    Attributes:
        by_seed: Where the method draws and the sweep names seeds: by evaluated task, the mean score of each
            seed's model. `scores` are then of the mean over the seeds.
    """

    weights: tuple[float, ...]
    scores: tuple[Score, ...]
    by_seed: Mapping[str, Mapping[int, float]] = field(default_factory=dict, hash=False)

    def deviation(self, task: str) -> float | None:
        """Standard deviation of a task's score over the seeds; None where there are fewer than two."""
        return deviation(self.by_seed.get(task, {}))


@dataclass(frozen=True)
class Surface:
    """All that a sweep measured.

    Attributes:
        metric, is_share: What scores are called, and whether they are shares.
        method: As locked: name, scaling coefficient and options.
        walk: How the preferences were chosen.
        tasks: Of the recipe; one weight each.
        evaluated: The tasks that have examples; one score each.
        points: In the order in which they were tried.
        base_model: Its score on every evaluated task.
        own: Each evaluated task's own checkpoint on it.
        unit: Of scores that are no shares.
        wanted: The recipe's own weights of the tasks; empty where it has none.
    """

    metric: str
    is_share: bool
    method: Mapping[str, Any] = field(hash=False)
    walk: str
    tasks: tuple[str, ...]
    evaluated: tuple[str, ...]
    points: tuple[Point, ...]
    base_model: tuple[Score, ...]
    own: tuple[Score, ...]
    unit: str = ""
    wanted: tuple[float, ...] = ()

    @cached_property
    def values(self) -> np.ndarray:
        """Scores, a row per point and a column per evaluated task."""
        return np.array([[score.value for score in point.scores] for point in self.points])

    @cached_property
    def front(self) -> tuple[int, ...]:
        """Indices of the points that no other point beats."""
        return tuple(front(self.values))

    @cached_property
    def best(self) -> int | None:
        """Index of the point with the best mean under the recipe's own weights; None without these."""
        wanted = dict(zip(self.tasks, self.wanted, strict=True)) if self.wanted else {}
        weights = np.array([max(wanted.get(task, 0.0), 0.0) for task in self.evaluated])
        return int((self.values @ weights).argmax()) if weights.any() else None

    @cached_property
    def hypervolume(self) -> float:
        """Volume between the front and the base model, below which no merge is worth having."""
        return hypervolume(self.values, [score.value for score in self.base_model])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs, the front and the hypervolume among them."""
        values = asdict(self)
        rows = (values["base_model"], values["own"], *(point["scores"] for point in values["points"]))
        for score in (score for row in rows for score in row):
            del score["outcomes"], score["probabilities"]
        return values | {"front": list(self.front), "hypervolume": self.hypervolume}

    def to_csv(self) -> str:
        """Return one line per point: weights, and score and interval per task, in the unit of the score."""
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        kinds = ("score", "low", "high")
        measured = [f"{kind}:{task}" for task in self.evaluated for kind in kinds]
        table.writerow(["point", "on_front", *(f"preference:{task}" for task in self.tasks), *measured])
        for index, point in enumerate(self.points):
            numbers = (f"{n:.6g}" for score in point.scores for n in (score.value, score.low, score.high))
            table.writerow([index, int(index in self.front), *(f"{w:g}" for w in point.weights), *numbers])
        return stream.getvalue()

    def table(self) -> str:
        """Return the front as text."""
        width = max(12, *(len(task) for task in (*self.tasks, *self.evaluated)))
        names = [f"{task:>{width}}" for task in (*self.tasks, *self.evaluated)]
        head = "preference".ljust((width + 2) * len(self.tasks)) + self.metric
        lines = [head.rstrip(), "  ".join(names)]
        for index in self.front:
            point = self.points[index]
            shown = [*(f"{w:g}" for w in point.weights), *(f"{score.value:.3f}" for score in point.scores)]
            lines.append("  ".join(f"{text:>{width}}" for text in shown))
        volume = f"hypervolume above the base model {self.hypervolume:.6g}"
        if not self.hypervolume:
            volume += ": none is better than it on every task at once"
        lines.append(f"{len(self.front)} of {len(self.points)} preferences are on the front; {volume}")
        return "\n".join(lines)
