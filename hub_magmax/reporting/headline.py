"""First lines of the card: kind of the model, its sources, and how it does beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hub_magmax.evaluation.assessment import Assessment, assess
from hub_magmax.evaluation.scores import Scores
from hub_magmax.evaluation.tradeoff import Tradeoff, best_single
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.recipe.lockfile import COEFFICIENTS, Lock
from hub_magmax.reporting.model_kind import ModelKind
from hub_magmax.reporting.score_formats import Unit, unit_of
from hub_magmax.text import (
    Markdown,
    at_most,
    code,
    cut_name,
    format_bytes,
    listed,
    number_of,
    one_line,
    weight_in_words,
)

#: Tasks, and characters of their names, in the first lines; the table names all tasks.
_MAX_TASKS, _MAX_NAMES = 6, 120

#: Characters of one name there; the middle of a longer one is left out.
_MAX_NAME = 40

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Dtypes of positions, counters and masks, which are no parameters.
_BUFFERS = ("I64", "U64", "BOOL")

#: Turns a name that others wrote into text: code on a card, itself in a terminal.
Quote = Callable[[str], str]


#: Forms of a model that are no weights.
_FORMS = {"adapter": "LoRA adapter", "selection": "selection, without weights, of a model"}


def model_line(kind: ModelKind, report: MergeReport, *, form: str | None) -> Markdown:
    """Return class, task, size and dtypes of a model as one line; `form` is the recipe's `output.format`."""
    what = _FORMS.get(form or "", "model")
    task = kind.task.replace("-", " ").replace("zero shot", "zero-shot")
    named = f"A {what} for {task}" if task else f"A {what}"
    facts: list[str] = [code(kind.model_class)] if kind.model_class else []
    facts += [f"of {kind.library}"] if kind.library not in ("", "transformers") else []
    return Markdown(f"**{named}**: {', '.join([*facts, _size(report)])}.")


def _size(report: MergeReport) -> str:
    """Return the number of parameters and their dtypes; of earlier reports the size of the weights."""
    if not report.parameters:
        return f"{format_bytes(report.bytes_out)} of weights"
    counts = {dtype: count for dtype, count in report.parameters.items() if dtype not in _BUFFERS}
    dtypes = sorted(counts, key=lambda dtype: -counts[dtype])
    named = listed([_DTYPES.get(dtype) or code(dtype) for dtype in dtypes])
    return f"{count_in_words(sum(counts.values()))} parameters{f' in {named}' if named else ''}"


def count_in_words(count: int) -> str:
    """Return a large number as people say it: 7.24 billion."""
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"


def made_line(lock: Lock, preference: Mapping[str, float], *, ignored: bool, is_copied: bool) -> Markdown:
    """Return base model, method and preference as one sentence, which names the most wanted tasks.

    Args:
        lock: Of the merge.
        preference: How much each task matters.
        ignored: Whether the method ignores it.
        is_copied: Whether nothing was merged: the model is a stack of its sources' layers.
    """
    stack = _stack(lock)
    if is_copied:
        return Markdown(f"{stack} It is no average of equals: nothing was merged.")
    are_adapters = all(source.adapter_config for source in lock.tasks.values())
    kind = "LoRA adapter" if are_adapters else "checkpoint"
    checkpoints = f"{len(preference)} {kind}s" if len(preference) > 1 else f"one {kind}"
    base = lock.base_model
    named = code(base.label if base.commit else base.reference.rstrip("/").rsplit("/", 1)[-1])
    wanted = _asked(lock, preference) + (", which the method ignores" if ignored else "")
    text = f"Merged from {checkpoints} fine-tuned from {named}, by {code(lock.method['name'])} for {wanted}."
    return Markdown(f"{text} {stack}".rstrip())


def _stack(lock: Lock) -> str:
    """Return a sentence about a stack of layers; empty where there is none."""
    if not lock.layers:
        return ""
    count = sum(one.num_blocks for one in lock.layers)
    sources = dict.fromkeys(name for one in lock.layers for name in one.blocks)
    stack = f"A stack of {number_of(count, 'layer')}"
    return f"{stack} of {listed([_name(name, code) for name in sources], _MAX_TASKS)}."


def _asked(lock: Lock, preference: Mapping[str, float]) -> str:
    if lock.preference.kind == COEFFICIENTS:
        numbers = lock.preference.weights
        return f"the coefficients {_most({task: abs(number) for task, number in numbers.items()}, numbers)}"
    if len(set(preference.values())) == 1 and len(preference) > 1:
        return f"the same preference for each of {_most(preference, {})}"
    return f"the preference {_most(preference, preference)}"


def _most(order: Mapping[str, float], numbers: Mapping[str, float]) -> str:
    """Return as many tasks as fit, the largest first, each with its number if it has one."""
    first = sorted(order, key=lambda task: -order[task])
    lengths = [len(_name(task, str)) for task in first]
    fitting = sum(sum(lengths[: place + 1]) <= _MAX_NAMES for place in range(min(_MAX_TASKS, len(first))))
    named = [
        _name(task, code) + (f" {weight_in_words(numbers[task], 3)}" if numbers else "") for task in first
    ]
    return listed(named, max(1, fitting))


def _name(task: str, quote: Quote) -> str:
    return quote(cut_name(task, at_most(_MAX_NAME)))


def result_line(scores: Scores | None, lock: Lock) -> Markdown:
    """Return how the model does, in Markdown: being below the base model stands first."""
    if scores is None:
        return Markdown("Not evaluated: how well it does any task is not known.")
    below, rest = result(scores, lock, code)
    if not rest:
        return Markdown("Not evaluated itself: only other models were scored.")
    return Markdown(" ".join(filter(None, (f"**{below}**" if below else "", rest))))


def result(scores: Scores, lock: Lock, quote: Quote = one_line) -> tuple[str, str]:
    """Return how the merged model does as two sentences, for a card or a terminal.

    Args:
        scores: What was measured.
        lock: Says how much each task matters.
        quote: Turns a name into text.

    Returns:
        Where it is below its base model, and the scores; empty where there is nothing to say.
    """
    found = assess(scores, lock.preference.shares)
    if found is None:
        return "", ""
    unit = unit_of(scores)
    below = [text for text in (_below_mean(found, unit), _below_tasks(found, unit, quote)) if text]
    first = f"Below its base model {' and '.join(below)}." if below else ""
    means = f"{_means(found, quote(scores.metric), unit)}{_kept(found, unit, quote)}."
    more = (_weak(found, unit, quote), _single(found, scores, unit, quote))
    return first, " ".join(filter(None, (means, *more)))


def assessment_of(scores: Scores, lock: Lock) -> dict[str, Any] | None:
    """Return the numbers behind `result` for programs; None where the merged model was not scored."""
    found = assess(scores, lock.preference.shares)
    return found.to_dict() if found else None


def _below_mean(found: Assessment, unit: Unit) -> str:
    if len(found.compared) == 1:
        return ""
    for mean, how in ((found.weighted, "on average"), (found.plain, "on the plain average of the tasks")):
        if mean.is_below_base and mean.merged is not None and mean.base is not None:
            return f"{how} ({_shown(mean.merged, unit)} against {_shown(mean.base, unit)})"
    return ""


# Complex, and flat: a form of the sentence for each case.
def _below_tasks(found: Assessment, unit: Unit, quote: Quote) -> str:
    """Return the tasks below the base model; those that the preference wants apart from those it does not."""
    if not found.below_base:
        return ""
    wanted = [row for row in found.compared if row.preference]
    below = [row for row in found.below_base if row.preference]
    unwanted, count = len(found.compared) - len(wanted), len(found.below_base) - len(below)
    if not (wanted and unwanted):
        return f"on {_counted(found.below_base, len(found.compared), '', unit, quote)}"
    if not below:
        return f"on {_counted(found.below_base, unwanted, ' that it is not for', unit, quote)}"
    others = f"all {count} others" if count == unwanted else f"{count} of {unwanted} others"
    others = "the other one" if unwanted == 1 else others
    text = f"on {_counted(below, len(wanted), ' that it is for', unit, quote)}"
    return f"{text}, and on {others}" if count else text


def _counted(below: Sequence[Tradeoff], of: int, which: str, unit: Unit, quote: Quote) -> str:
    """Return how many of so many tasks are below, and the first of them."""
    worst, count = below[0], len(below)
    change = f"{_name(worst.task, quote)} ({_change(worst, 'base', unit)})"
    if of == 1:
        return f"the task{which}, {change}" if which else change
    counted = f"all {of} tasks{which}" if count == of else f"{count} of {of} tasks{which}"
    return f"{counted}, {'most on ' if count > 1 else ''}{change}"


def _change(row: Tradeoff, before: str, unit: Unit) -> str:
    old = row.base if before == "base" else row.own
    assert old is not None and row.merged is not None
    return f"{_shown(old.value, unit)} → {_shown(row.merged.value, unit)}"


def _means(found: Assessment, metric: str, unit: Unit) -> str:
    """Return the mean scores of all models as the beginning of a sentence."""
    mean, how = found.weighted, "weighted by the preference"
    if mean.merged is None or len({row.preference for row in found.rows}) == 1:
        mean, how = (
            found.plain,
            f"on average over {_tasks(sum(row.merged is not None for row in found.rows))}",
        )
    assert mean.merged is not None, "the merged model was scored on some task"
    others = ((mean.base, "for the base model"), (mean.own, "for each task's own checkpoint"))
    beside = [f"{_shown(value, unit)} {whose}" for value, whose in others if value is not None]
    text = f"{metric} is {_shown(mean.merged, unit)} {how}"
    return text + (f", against {listed(beside)}" if beside else "")


# Complex, and flat: a form of the sentence for each case.
def _kept(found: Assessment, unit: Unit, quote: Quote) -> str:
    """Return how much of the checkpoints' scores is kept, and on which task the least."""
    wanted = [row for row in found.rows if row.preference]
    if wanted and len(wanted) < len(found.rows):
        found = Assessment(tuple(wanted), found.is_share)
    worst = found.worst
    if worst is None:
        return ""
    named, change = _name(worst.task, quote), _change(worst, "own", unit)
    if not found.kept and (worst.to_own or 0.0) >= 0:
        return "; behind its own checkpoint on no task"
    if not found.kept:
        return f"; furthest behind its own checkpoint on {named} ({change})"
    mean, least = sum(found.kept.values()) / len(found.kept), found.kept[worst.task]
    if len(found.kept) == 1:
        return f"; it keeps {100 * least:.0f} % of its own checkpoint's score on {named} ({change})"
    return (
        f"; it keeps {100 * mean:.0f} % of the own checkpoints' scores on average, "
        f"and {100 * least:.0f} % on the worst task, {named} ({change})"
    )


def _single(found: Assessment, scores: Scores, unit: Unit, quote: Quote) -> str:
    """Return that one checkpoint alone does better than the merged model, empty where none does."""
    best = best_single(scores, {row.task: row.preference for row in found.rows})
    mean = found.weighted
    if best is None or mean.merged is None or best[1] <= mean.merged or best[1] == mean.own:
        return ""
    task, value = best
    than = f"{_shown(value, unit)} against {_shown(mean.merged, unit)}"
    return f"The checkpoint of {_name(task, quote)} alone does better on average ({than})."


def _weak(found: Assessment, unit: Unit, quote: Quote) -> str:
    """Return that checkpoints are below the base model on their own tasks, empty where none is."""
    weak = found.own_below_base
    if not weak:
        return ""
    worst = weak[0]
    assert worst.own is not None and worst.base is not None
    change = f"{_shown(worst.base.value, unit)} → {_shown(worst.own.value, unit)}"
    named = _name(worst.task, quote)
    if len(weak) == 1:
        return f"The own checkpoint of {named} is itself below the base model there ({change})."
    return (
        f"The own checkpoints of {len(weak)} tasks are themselves below the base model there, "
        f"most that of {named} ({change})."
    )


def _shown(value: float, unit: Unit) -> str:
    return unit.value(value) + unit.sign


def _tasks(count: int) -> str:
    return number_of(count, "task")
