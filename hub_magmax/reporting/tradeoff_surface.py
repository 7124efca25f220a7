"""Trade-off surface: scores across the simplex of preferences, and their Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hub_magmax.evaluation.scores import MAX_COLUMNS, Score, deviation, measured
from hub_magmax.evaluation.tables import Format, Table, Tabular
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


@dataclass(frozen=True, repr=False)
class Surface(Tabular):
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
        asked: Index of the point with the recipe's own preference; None where it was not measured.
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
    asked: int | None = None

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
        """Return one line per point: its weights, and score, interval and deviation over the seeds per task.

        The columns are those of `to_frame`. `recipe` is 1 for the recipe's own preference.
        """
        return self.as_table().write("csv") + "\n"

    def table(self, form: Format = "text") -> str:
        """Return the front and the recipe's own point, and what is best for its weights; CSV has all."""
        if form == "csv":
            return self.to_csv().rstrip("\n")
        if form == "text" and len(self.tasks) > MAX_COLUMNS:
            return "\n".join(self.verdict) or f"{len(self.points)} preferences were tried"
        whole = self.as_table()
        shown = dict.fromkeys([*(() if self.asked is None else (self.asked,)), *self.front])
        rows = tuple((self._kind(index), *whole.rows[index][3:]) for index in shown)
        return Table(("point", *whole.head[3:]), rows, lead=self.verdict).write(form)

    def _kind(self, index: int) -> str:
        """Say of a point that it is the recipe's own, or on the front."""
        kinds = {"recipe": index == self.asked, "front": index in self.front}
        return ", ".join(kind for kind, holds in kinds.items() if holds)

    def as_table(self) -> Table:
        """Return a row for each point: its number, if on the front or the recipe's own, weights, scores."""
        front = frozenset(self.front)
        rows = tuple(
            (
                index,
                int(index in front),
                int(index == self.asked),
                *p.weights,
                *(measured(s, p.deviation(s.task)) for s in p.scores),
            )
            for index, p in enumerate(self.points)
        )
        names = (f"weight of {task}" for task in self.tasks)
        head = (
            "point",
            "on front",
            "recipe",
            *names,
            *(f"{self.metric} of {task}" for task in self.evaluated),
        )
        return Table(head, rows, lead=self.verdict, is_drawn=True)

    @property
    def verdict(self) -> tuple[str, ...]:
        """Sentences about the whole: the best preference for the recipe's weights first."""
        found = [] if self.best is None else [self._best_of(self.points[self.best])]
        if len(self.front) < len(self.points):
            found.append(f"{len(self.front)} of {len(self.points)} preferences are on the front")
        if self.hypervolume:
            found.append(f"hypervolume above the base model {self.hypervolume:.6g}")
        return tuple(found)

    def _best_of(self, point: Point) -> str:
        mean, base = (self._mean(scores) for scores in (point.scores, self.base_model))
        best, others = named(self.tasks, point.weights), ""
        if self.best == self.asked:
            best = "the recipe's own"
        elif self.asked is not None:
            others = f"the recipe's own has {self._mean(self.points[self.asked].scores):.3f} and "
        return (
            f"for the recipe's weights ({named(self.tasks, self.wanted)}) the best of {len(self.points)} "
            f"preferences is {best}: mean {self.metric} {mean:.3f} under these weights, where {others}"
            f"the base model has {base:.3f}"
        )

    def _mean(self, scores: Sequence[Score]) -> float:
        """Return the mean under the recipe's own weights of the evaluated tasks."""
        wanted = dict(zip(self.tasks, self.wanted, strict=True))
        weights = np.array([max(wanted[task], 0.0) for task in self.evaluated])
        return float(np.average([score.value for score in scores], weights=weights))


def named(tasks: Sequence[str], weights: Sequence[float]) -> str:
    """Return weights with the names of their tasks; those of zero are left out."""
    return ", ".join(f"{task} {weight:.4g}" for task, weight in zip(tasks, weights, strict=True) if weight)
