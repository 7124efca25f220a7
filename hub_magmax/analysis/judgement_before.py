"""Answers from before a merge: predictions from finished merges, and metrics of pairs of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hub_magmax.analysis.judging import Judgement
from hub_magmax.analysis.predicting_merges import Prediction
from hub_magmax.reporting.pair_metrics import PairMetrics
from hub_magmax.text import at_most, cut_name, listed, number_of

#: Characters of a task's name.
_NAME = 32


class PublishedWeight(NamedTuple):
    """A metric of pairs, and its weight in the regression of arXiv:2601.22285, fourth version.

    Attributes:
        metric: Its name.
        words: What it measures.
        weight: Mean coefficient over five methods, of the metric scaled to -1 … 1 over the published pairs.
        num_methods: For how many of them it is among the five largest.
    """

    metric: str
    words: str
    weight: float
    num_methods: int


#: Of the gradients, the task vectors and the subspaces the metric with the largest weight.
PUBLISHED_WEIGHTS = (
    PublishedWeight(
        "encoder_gradient_l2_distance_as_published", "published distance of gradients", -0.021, 5
    ),
    PublishedWeight("task_vector_l2_distance", "distance of task vectors", -0.008, 2),
    PublishedWeight("right_subspace_overlap_top_k", "overlap of directions", 0.007, 3),
)


def predicted(found: Judgement) -> str:
    """Return what was predicted of all tasks together, or why nothing was, as a sentence."""
    if found.predictions is None:
        return "Not predicted: no prediction for these tasks was found."
    if (made := found.prediction) is None:
        reasons = dict.fromkeys(_refusals(found.predictions.predictions[-1:]))
        return f"Not predicted: {next(iter(reasons), 'no merge by this method is in the history')}."
    by = {"by tasks": made.by_tasks, "by metrics": made.by_metrics}
    told = [f"{100 * one.kept:.0f} % ({how})" for how, one in by.items() if one.kept is not None]
    if not told:
        return f"Not predicted: {'; '.join(dict.fromkeys(_refusals([made])))}."
    refused = [
        f" {how[:1].upper()}{how[1:]}, refused: {one.refusal}." for how, one in by.items() if one.refusal
    ]
    known = " This merge itself is in the history." if made.measured is not None else ""
    kept = f"; it keeps {100 * found.kept:.0f} %" if found.kept is not None else ""
    return f"Predicted to keep {listed(told)} of its checkpoints' scores{kept}.{''.join(refused)}{known}"


def _refusals(predictions: Sequence[Prediction]) -> Iterator[str]:
    for made in predictions:
        yield from filter(None, (made.by_metrics.refusal, made.by_tasks.refusal))


# Complex only by count: comprehensions over pairs, and over what is told of one.
def pairs_told(found: Judgement) -> Iterator[str]:
    """Yield which pair of tasks keeps least, measured or predicted."""
    known = {made.tasks: value for made in found.pairs if (value := _kept_of_pair(made)) is not None}
    if not known:
        return
    pair = min(known, key=lambda tasks: known[tasks])
    made = next(one for one in found.pairs if one.tasks == pair)
    by, verb = {"": made.measured}, "kept"  # predictions would have been fitted to it
    if made.measured is None:
        by = {" by metrics": made.by_metrics.kept, " by tasks": made.by_tasks.kept}
        verb = "are predicted to keep"
    told = listed([f"{100 * value:.0f} %{how}" for how, value in by.items() if value is not None])
    named = f"{listed([short(task) for task in pair])} {verb}"
    if len(known) == 1:
        yield f"Only one pair is measured or predicted: {named} {told}."
        return
    are_measured = {one.measured is not None for one in found.pairs if one.tasks in known}
    how = " measured or predicted" if len(are_measured) > 1 else " merged by themselves" * are_measured.pop()
    yield f"Among the {len(known)} pairs{how}, {named} least: {told}."


def _kept_of_pair(made: Prediction) -> float | None:
    options = (made.measured, made.by_metrics.kept, made.by_tasks.kept)
    return next((value for value in options if value is not None), None)


def worth_told(found: Judgement) -> Iterator[str]:
    """Yield what predictions of these methods are worth for a task that they have not seen."""
    for size in dict.fromkeys((len(found.tasks), 2)):
        made = found.footing(size)
        by = {"by metrics": made.by_metrics, "by tasks": made.by_tasks} if made else {}
        told = [
            f"{how} {'unknown' if one.r is None else f'{one.r:.2f}'} and {100 * one.error:.0f} points"
            for how, one in by.items()
            if one is not None
        ]
        if made and told:
            yield (
                f"Predictions for {size} tasks, tested on {number_of(made.num_merges, 'merge')} by leaving "
                f"out each task in turn; r between predicted and measured, and mean error: {'; '.join(told)}."
            )


def metric_rows(metrics: PairMetrics, tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each of `PUBLISHED_WEIGHTS`: the weight, the mean over the pairs, the worst pair."""
    pairs, rows = metrics.pairs(tasks), list[tuple[str, ...]]()
    for one in PUBLISHED_WEIGHTS:
        values = {pair: found[one.metric] for pair, found in pairs.items() if one.metric in found}
        if values:
            worst = (max if one.weight < 0 else min)(values, key=lambda pair: values[pair])
            mean = sum(values.values()) / len(values)
            named = " and ".join(map(short, worst))
            rows.append((one.words, f"{one.weight:+.3f}", f"{mean:.3g}", f"{values[worst]:.3g}, {named}"))
    return rows


def short(task: str) -> str:
    """Return a task's name, cut to what fits a row of the page."""
    return cut_name(task, at_most(_NAME))
