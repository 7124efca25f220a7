"""First sentence of the card: models, method, preference, and the change of the scores."""

from __future__ import annotations

from collections.abc import Sequence

from hub_magmax.evaluation.scores import Scores
from hub_magmax.evaluation.tradeoff import Tradeoff
from hub_magmax.recipe.lockfile import COEFFICIENTS, Lock
from hub_magmax.reporting.score_formats import Unit
from hub_magmax.text import Markdown, code, listed

#: Tasks named in the first sentence; the table names all of them.
_MAX_NAMED = 6


def headline(
    lock: Lock, rows: Sequence[Tradeoff], scores: Scores | None, unit: Unit, *, ignored: bool
) -> Markdown:
    """Return models, method, preference and change of the scores as one sentence."""
    checkpoints = f"{len(rows)} checkpoints" if len(rows) > 1 else "One checkpoint"
    wanted = _asked(lock, rows) + (", which the method ignores" if ignored else "")
    cost = _cost(rows, scores.metric, unit) if scores else "what it cost was not evaluated"
    base = code(lock.base_model.label)
    return Markdown(
        f"{checkpoints} fine-tuned from {base}, merged by {code(lock.method['name'])} for {wanted}; {cost}."
    )


def _asked(lock: Lock, rows: Sequence[Tradeoff]) -> str:
    if lock.preference.kind == COEFFICIENTS:
        numbers = [f"{code(task)} {number:.4g}" for task, number in lock.preference.weights.items()]
        return f"the coefficients {listed(numbers, _MAX_NAMED)}"
    if len({row.preference for row in rows}) == 1 and len(rows) > 1:
        return f"the same preference for each of {listed([code(row.task) for row in rows], _MAX_NAMED)}"
    first = sorted(rows, key=lambda row: -row.preference) if len(rows) > _MAX_NAMED else rows
    return f"the preference {listed([f'{code(row.task)} {row.preference:.4g}' for row in first], _MAX_NAMED)}"


def _cost(rows: Sequence[Tradeoff], metric: str, unit: Unit) -> str:
    for attribute, reference in (("to_own", "each task's own checkpoint"), ("to_base", "the base model")):
        changes = [(row, getattr(row, attribute)) for row in rows if getattr(row, attribute) is not None]
        if changes:
            return _change(changes, f"compared with {reference}", metric, unit)
    values = [row.merged.value for row in rows if row.merged]
    if not values:
        return "the merged model was not evaluated"
    mean = unit.value(sum(values) / len(values)) + unit.sign
    return f"{code(metric)} over {_tasks(len(values))} {mean} on average"


def _change(changes: Sequence[tuple[Tradeoff, float]], compared: str, metric: str, unit: Unit) -> str:
    mean = sum(change for _, change in changes) / len(changes)
    row, most = max(changes, key=lambda pair: abs(pair[1]))
    assert row.merged is not None
    before, after = (unit.value(value) + unit.sign for value in (row.merged.value - most, row.merged.value))
    return (
        f"{compared}, {code(metric)} changes by {unit.change(mean)}{unit.difference_name} on average over "
        f"{_tasks(len(changes))}, most on {code(row.task)} ({before} → {after})"
    )


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"
