"""Judgement of a finished merge: did it merge, what broke, and how bad is the worst.

Nothing is measured anew: scores of every example, metrics of pairs, predictions and blind spots are those
that other calls stored beside the recipe or its merged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from hub_magmax.analysis.merge_history import method_label
from hub_magmax.analysis.predicting_merges import (
    PREDICTIONS_NAME,
    Footing,
    MergePredictions,
    Prediction,
    read_predictions,
)
from hub_magmax.evaluation.assessment import Assessment, assess
from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME, BlindSpots, read_blind_spots
from hub_magmax.evaluation.intervals import Difference, wilson_interval
from hub_magmax.evaluation.scores import MERGED, SCORES_NAME, Score, Scores, read_scores
from hub_magmax.evaluation.tables import Measured, Table, Tabular
from hub_magmax.evaluation.tail_shape import MIN_SCORES, TailComparison, compare_tails
from hub_magmax.evaluation.tails import ExampleLoss, example_loss
from hub_magmax.evaluation.tradeoff import Tradeoff
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.result_files import ResultFiles
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME, Diagnosis, read_diagnosis

Found = TypeVar("Found")

#: Answer to whether the models merged.
Verdict = Literal["yes", "in part", "no"]

#: Shares of its own checkpoint's score that a task has to keep to be called merged, and merged in part.
KEPT, HALF = 0.95, 0.5


@dataclass(frozen=True)
class Broken:
    """What a merge did to the examples of one task.

    Attributes:
        loss: Against the task's own checkpoint, example by example.
        num_of_base: Of the right answers that were lost, those that the base model had right too; None where
            it was not scored, or scores are not right or wrong.
        num_won: Answers that the own checkpoint had wrong and that are right now; None likewise.
    """

    loss: ExampleLoss
    num_of_base: int | None
    num_won: int | None

    @property
    def rank(self) -> tuple[float, float]:
        """Larger for a task that is worse off: by the share of right answers lost, then the score."""
        return (self.loss.flip_rate or 0.0, -self.loss.difference.mean)


@dataclass(frozen=True, repr=False)
class Judgement(Tabular):
    """All that is known of a merge's success.

    Attributes:
        tasks: In order.
        method: As the history of merges calls it.
        scores: Of base model, own checkpoints and merged model; None where nothing was scored.
        assessment: How the merged model does beside the others; None likewise.
        broken: A part for each task whose single outcomes were kept, the worst first.
        tail: Errors of the merged model on the worst task against those of the task's own checkpoint.
        predictions: Made of these tasks from a history of merges.
        diagnosis: Of the checkpoints.
        blind_spots: What samples of the models never solve.
    """

    tasks: tuple[str, ...]
    method: str
    scores: Scores | None = None
    assessment: Assessment | None = None
    broken: tuple[Broken, ...] = ()
    tail: TailComparison | None = None
    predictions: MergePredictions | None = None
    diagnosis: Diagnosis | None = None
    blind_spots: BlindSpots | None = None

    @property
    def kept(self) -> float | None:
        """Mean over the tasks of the merged model's score over the own checkpoint's, as it is predicted."""
        kept = self.assessment.kept if self.assessment else {}
        return sum(kept.values()) / len(kept) if kept else None

    @cached_property
    def verdict(self) -> Verdict | None:
        """Whether the models merged, by the tasks that the preference asks for.

        "no" where one of them keeps less than `HALF` of its own checkpoint's score, or is below the base
        model by more than chance (the 95 % interval over examples; without single outcomes by the score);
        "yes" where each keeps `KEPT`, or, where scores are no shares, is not behind its own checkpoint by
        more than chance; "in part" otherwise. None where a task without a loss lacks the score of its own
        checkpoint, and no other one says "no" or "in part".
        """
        each = set(self._verdicts.values()) or {None}
        return next(one for one in _FROM_WORST if one in each)

    @cached_property
    def _verdicts(self) -> dict[str, Verdict | None]:
        """Verdict of each task that the preference asks for."""
        found = self.assessment
        rows = [row for row in found.rows if row.preference] if found else []
        return {row.task: _verdict_of(row, found.kept.get(row.task)) for row in rows} if found else {}

    @cached_property
    def unmerged(self) -> tuple[Tradeoff, ...]:
        """Tasks for which `verdict` is "no", the one that keeps the least first."""
        if not (found := self.assessment):
            return ()
        failed = [row for row in found.rows if self._verdicts.get(row.task) == "no"]
        return tuple(sorted(failed, key=lambda row: found.kept.get(row.task, 1.0)))

    @cached_property
    def prediction(self) -> Prediction | None:
        """Of all tasks by this method; None where there is none, whatever the reason."""
        return next((found for found in self._own_predictions if len(found.tasks) == len(self.tasks)), None)

    @cached_property
    def pairs(self) -> tuple[Prediction, ...]:
        """Of every pair by this method, where there are more than two tasks."""
        return tuple(found for found in self._own_predictions if len(found.tasks) == 2 < len(self.tasks))

    @property
    def _own_predictions(self) -> Iterator[Prediction]:
        made = self.predictions.predictions if self.predictions else ()
        return (found for found in made if found.method == self.method)

    def footing(self, num_tasks: int) -> Footing | None:
        """Return what predictions of so many tasks by this method stand on."""
        made = self.predictions.footing if self.predictions else ()
        return next((f for f in made if (f.method, f.num_tasks) == (self.method, num_tasks)), None)

    @cached_property
    def lost(self) -> tuple[int, int] | None:
        """Right answers of the own checkpoints that are wrong now, and how many there were, over all tasks.

        None where there was none, or scores are not right or wrong; of the latter, `num_won` is None, too.
        """
        parts = [one.loss for one in self.broken if one.loss.flip_rate is not None]
        right = sum(loss.right_before or 0 for loss in parts)
        return (sum(loss.flipped or 0 for loss in parts), right) if right else None

    @property
    def num_won(self) -> int | None:
        """Answers that the own checkpoints had wrong and that are right now, over all tasks.

        None where no task has answers that are right or wrong.
        """
        counts = [one.num_won for one in self.broken if one.num_won is not None]
        return sum(counts) if counts else None

    def as_table(self) -> Table:
        """Return a row for each task, the worst first."""
        rows = tuple(
            (
                one.loss.task,
                Measured(one.loss.difference.mean, one.loss.difference.low, one.loss.difference.high),
                one.loss.right_before,
                one.loss.flipped,
                share_lost(one.loss),
                one.num_of_base,
                one.num_won,
                *((Measured(t.value, t.low, t.high),) if (t := one.loss.tail(0.9)) else (None,)),
            )
            for one in self.broken
        )
        head = (
            "task",
            "change",
            "right before",
            "lost",
            "share lost",
            "of base model too",
            "won",
            "CVaR 0.9",
        )
        return Table(head, rows, measured=("share lost", "CVaR 0.9"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        told = self.predictions.to_dict() if self.predictions else None
        lost = self.lost
        return {
            "verdict": self.verdict,
            "unmerged": [row.task for row in self.unmerged],
            "kept": self.kept,
            "prediction": asdict(self.prediction) if self.prediction else None,
            "predictions": told,
            "lost": lost and {"count": lost[0], "of": lost[1], "interval": wilson_interval(*lost)},
            "won": self.num_won,
            "tasks": [asdict(one) for one in self.broken],
            "tail": self.tail.to_dict() if self.tail else None,
            "assessment": self.assessment.to_dict() if self.assessment else None,
        }


#: Verdicts on tasks, the one first that decides for all; None is not known.
_FROM_WORST: tuple[Verdict | None, ...] = ("no", "in part", None, "yes")


def _verdict_of(row: Tradeoff, kept: float | None) -> Verdict | None:
    """Return whether one task merged; `kept` is None where scores are no shares."""
    if _is_behind(row.to_base, row.base_difference) or (kept is not None and kept < HALF):
        return "no"
    if row.to_own is None:
        return None
    is_behind = _is_behind(row.to_own, row.own_difference) if kept is None else kept < KEPT
    return "in part" if is_behind else "yes"


def _is_behind(change: float | None, seen: Difference | None) -> bool:
    """Return whether a change is a loss beyond chance; of unknown intervals any loss is, of none none."""
    return seen.high < 0 if seen is not None else change is not None and change < 0


def share_lost(loss: ExampleLoss) -> Measured | None:
    """Return the share of right answers that became wrong; None of none."""
    if loss.flip_rate is None or loss.flip_interval is None:
        return None
    return Measured(loss.flip_rate, *loss.flip_interval)


def judge(recipe: Recipe, locked: Lock, beside: ResultFiles | None = None) -> Judgement:
    """Return what is known of the success of a finished merge.

    Args:
        recipe: What was merged; its scores are in its output folder.
        locked: What it was merged by.
        beside: Where results of the recipe are that were not written into that folder, such as those of
            before the merge. What is of other tasks is left out.

    Raises:
        HubMagmaxError: If a file is damaged.
    """
    tasks, folder = tuple(locked.tasks), recipe.output_path
    places = [ResultFiles(folder), *([beside] if beside else [])]
    scores = read_scores(folder) if (folder / SCORES_NAME).is_file() else None
    broken = _broken(scores, tasks) if scores else ()
    predictions = _first(places, PREDICTIONS_NAME, read_predictions)
    diagnosis = _first(places, DIAGNOSIS_NAME, read_diagnosis)
    return Judgement(
        tasks,
        method_label(locked.method),
        scores,
        assess(scores, locked.preference.shares),
        broken,
        _tail(scores, broken[0].loss.task) if scores and broken else None,
        predictions if predictions and _of_all(predictions) == tasks else None,
        diagnosis if diagnosis and diagnosis.tasks == tasks else None,
        _blind_spots(places, recipe),
    )


def _of_all(predictions: MergePredictions) -> tuple[str, ...]:
    """Return all tasks that were predicted together; none of a recipe of one task."""
    return next((made.tasks for made in predictions.predictions[-1:]), ())


def _blind_spots(places: Sequence[ResultFiles], recipe: Recipe) -> BlindSpots | None:
    """Return blind spots that were measured with the recipe's evaluation."""
    found = _first(places, BLIND_SPOTS_NAME, read_blind_spots)
    asked = recipe.evaluation
    return found if found and asked and found.evaluation == asked.digest else None


def _first(places: Sequence[ResultFiles], name: str, read: Callable[[Path], Found]) -> Found | None:
    paths = (place.path(name) for place in places)
    return next((read(path) for path in paths if path.is_file()), None)


def _broken(scores: Scores, tasks: Sequence[str]) -> tuple[Broken, ...]:
    found = []
    for task in tasks:
        base, own, merged = (scores.get(model, task) for model in ("base_model", task, MERGED))
        if (loss := example_loss(own, merged)) is not None and own and merged:
            found.append(_broken_by(loss, base, own, merged))
    return tuple(sorted(found, key=lambda one: one.rank, reverse=True))


def _broken_by(loss: ExampleLoss, base: Score | None, own: Score, merged: Score) -> Broken:
    if loss.flipped is None:
        return Broken(loss, None, None)
    before, after = (np.asarray(score.outcomes) == 1 for score in (own, merged))
    num_of_base = None
    if base and len(base.outcomes) == len(before):
        num_of_base = int((before & ~after & (np.asarray(base.outcomes) == 1)).sum())
    return Broken(loss, num_of_base, int((~before & after).sum()))


def _tail(scores: Scores, task: str) -> TailComparison | None:
    """Compare the errors of both models on the same examples; None of too few."""
    models = {"merged": scores.get(MERGED, task), "own checkpoint": scores.get(task, task)}
    found = [score for score in models.values() if score and len(score.outcomes) >= MIN_SCORES]
    if len(found) < len(models):
        return None
    errors, is_bounded = _errors(found, scores.is_share)
    return compare_tails(*errors, names=[*models], bounds=(0, 1) if is_bounded else None, paired=True)


def _errors(found: Sequence[Score], is_share: bool) -> tuple[list[list[float]], bool]:
    """Return what lacks to sure right answers, or scores with another sign; and whether they are shares."""
    has_probabilities = all(score.probabilities for score in found)
    values = [np.asarray(score.probabilities if has_probabilities else score.outcomes) for score in found]
    is_bounded = has_probabilities or is_share
    return [((1.0 - own) if is_bounded else -own).tolist() for own in values], is_bounded
