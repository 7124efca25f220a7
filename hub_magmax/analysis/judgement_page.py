"""Page of a judgement: will it merge, what broke, how bad is the worst; one HTML file without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hub_magmax.analysis.judging import Broken, Judgement, share_lost
from hub_magmax.analysis.predicting_merges import Prediction
from hub_magmax.evaluation.blind_spots import GRAFT_ONLY, SAMPLED, UNREACHED, BlindSpots
from hub_magmax.evaluation.intervals import wilson_interval
from hub_magmax.evaluation.tables import Measured
from hub_magmax.evaluation.tails import LEVELS, ExampleLoss
from hub_magmax.files import write_text
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.card import JUDGEMENT_NAME
from hub_magmax.reporting.card_rows import measured_on
from hub_magmax.reporting.front_matter import model_name
from hub_magmax.reporting.headline import result
from hub_magmax.reporting.pair_metrics import PairMetrics
from hub_magmax.reporting.score_formats import Unit, unit_of
from hub_magmax.text import at_most, cut_name, listed, number_of, spelled_out, without_secrets

TEMPLATE_NAME = "judgement.html.jinja"

#: Tasks that have a row; the worst ones of more.
_MOST_ROWS = 8

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
    PublishedWeight("encoder_gradient_l2_distance_as_published", "distance of gradients", -0.021, 5),
    PublishedWeight("task_vector_l2_distance", "distance of task vectors", -0.008, 2),
    PublishedWeight("right_subspace_overlap_top_k", "overlap of directions", 0.007, 3),
)


@dataclass(frozen=True)
class Part:
    """One question of the page.

    Attributes:
        question: To be answered.
        answer: In a sentence or two.
        facts: Further sentences.
        head, rows: Of a table; empty for none.
        unmeasured: What is not known, with the command that would tell.
    """

    question: str
    answer: str
    facts: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    unmeasured: tuple[tuple[str, str], ...] = ()


def sentence(found: Judgement, locked: Lock) -> str:
    """Return the judgement in a sentence or two, what was lost first."""
    if found.scores is None or found.assessment is None:
        return "Not scored: what this merge lost is not known."
    below, rest = result(found.scores, locked)
    if found.lost is None:
        return " ".join(filter(None, (below, rest, _nothing_to_lose(found))))
    lost, right = found.lost
    text = (
        f"It lost {lost:,} of the {right:,} right answers that the tasks' own checkpoints give"
        f" ({_percent(Measured(lost / right, *wilson_interval(lost, right)))})"
    )
    worst = found.broken[0].loss
    if lost and len(found.broken) > 1 and worst.flip_rate is not None:
        text += f", most on {_name(worst.task)} ({100 * worst.flip_rate:.0f} %)"
    return f"{below} {text}.".strip()


def _nothing_to_lose(found: Judgement) -> str:
    """Return what was won where no answer could be lost; nothing where answers are not right or wrong."""
    if found.num_won is None:
        return ""
    return f"The own checkpoints have no right answer; {found.num_won:,} wrong ones are right now."


def parts(found: Judgement, locked: Lock) -> tuple[Part, ...]:
    """Return the three questions with their answers."""
    return _will_it_merge(found, locked), _what_broke(found, locked), _worst(found)


def in_words(found: Judgement, locked: Lock) -> str:
    """Return the judgement and the three answers as lines."""
    answers = (f"{part.question} {part.answer}" for part in parts(found, locked))
    return "\n".join([sentence(found, locked), "", *answers])


def write_judgement(found: Judgement, recipe: Recipe, locked: Lock) -> Path:
    """Write the page into the folder of the merged model, and return its path."""
    path = recipe.output_path / JUDGEMENT_NAME
    write_text(path, render_judgement(found, locked, model_name(recipe)))
    return path


def render_judgement(found: Judgement, locked: Lock, title: str) -> str:
    """Return the page; all that others wrote is shown as text.

    Args:
        found: What is known.
        locked: Of the merge.
        title: Name of the model.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("hub_magmax.analysis", "")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = template.get_template(TEMPLATE_NAME).render(
        title=spelled_out(title),
        about=f"{number_of(len(found.tasks), 'task')} merged by {spelled_out(found.method)}",
        sentence=spelled_out(sentence(found, locked)),
        parts=[_spelled_out(part) for part in parts(found, locked)],
        scores=found.scores.digest if found.scores else "",
    )
    return without_secrets(page)


def _spelled_out(part: Part) -> dict[str, Any]:
    return {
        "question": part.question,
        "answer": spelled_out(part.answer),
        "facts": [spelled_out(fact) for fact in part.facts],
        "head": part.head,
        "rows": [[spelled_out(cell) for cell in row] for row in part.rows],
        "unmeasured": part.unmeasured,
    }


def _will_it_merge(found: Judgement, locked: Lock) -> Part:
    facts, unmeasured = [], []
    if found.predictions is None:
        unmeasured.append(("a prediction", "hub-magmax predict-merge recipe.yaml --history FOLDER"))
    else:
        facts += [*_pairs_told(found), *_worth_told(found)]
    if found.diagnosis is not None and found.diagnosis.suspects:
        facts.append(f"Diagnosis: {found.diagnosis.verdict}")
    metrics = found.diagnosis.metrics if found.diagnosis else None
    rows = _metric_rows(metrics, found.tasks) if metrics else []
    if not rows:
        unmeasured.append(("metrics of pairs", "hub-magmax diagnose recipe.yaml --metrics"))
    else:
        facts.append(
            "Weights are the published mean coefficients over five methods, for image classifiers. They say "
            "which way a metric pointed there, and predict nothing here."
        )
    if found.assessment is None:
        unmeasured.append(("scores", "hub-magmax evaluate recipe.yaml"))
    head = ("metric of pairs", "published weight", "mean", "worst pair") if rows else ()
    return Part(
        "Will it merge?",
        f"{_predicted(found)} {_kept(found, locked)}".strip(),
        tuple(facts),
        head,
        tuple(rows),
        tuple(unmeasured),
    )


def _predicted(found: Judgement) -> str:
    if found.predictions is None:
        return "Not predicted: no prediction for these tasks was found."
    if (made := found.prediction) is None:
        reasons = dict.fromkeys(_refusals(found.predictions.predictions[-1:]))
        return f"Not predicted: {next(iter(reasons), 'no merge by this method is in the history')}."
    told = [
        f"{100 * one.kept:.0f} % {how}"
        for how, one in (("by metrics", made.by_metrics), ("by tasks", made.by_tasks))
        if one.kept is not None
    ]
    if not told:
        return f"Not predicted: {'; '.join(dict.fromkeys(_refusals([made])))}."
    known = " (this merge itself is in the history)" if made.measured is not None else ""
    return f"Predicted to keep {listed(told)} of its checkpoints' scores{known}."


def _refusals(predictions: Sequence[Prediction]) -> Iterator[str]:
    for made in predictions:
        yield from filter(None, (made.by_metrics.refusal, made.by_tasks.refusal))


def _kept(found: Judgement, locked: Lock) -> str:
    """Return what the merge keeps, in the words of the card."""
    if found.scores is None or found.assessment is None:
        return "What it keeps was not measured."
    rest = result(found.scores, locked)[1]
    return f"{rest[:1].upper()}{rest[1:]}"


# Complex only by count: comprehensions over pairs, and over what is told of one.
def _pairs_told(found: Judgement) -> Iterator[str]:
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
    named = f"{listed([_name(task) for task in pair])} {verb}"
    if len(known) == 1:
        yield f"Only one pair is measured or predicted: {named} {told}."
        return
    are_measured = {one.measured is not None for one in found.pairs if one.tasks in known}
    how = " measured or predicted" if len(are_measured) > 1 else " merged by themselves" * are_measured.pop()
    yield f"Among the {len(known)} pairs{how}, {named} least: {told}."


def _kept_of_pair(made: Prediction) -> float | None:
    options = (made.measured, made.by_metrics.kept, made.by_tasks.kept)
    return next((value for value in options if value is not None), None)


def _worth_told(found: Judgement) -> Iterator[str]:
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


def _metric_rows(metrics: PairMetrics, tasks: Sequence[str]) -> list[tuple[str, ...]]:
    pairs, rows = metrics.pairs(tasks), list[tuple[str, ...]]()
    for one in PUBLISHED_WEIGHTS:
        values = {pair: found[one.metric] for pair, found in pairs.items() if one.metric in found}
        if values:
            worst = (max if one.weight < 0 else min)(values, key=lambda pair: values[pair])
            mean = sum(values.values()) / len(values)
            named = " and ".join(map(_name, worst))
            rows.append((one.words, f"{one.weight:+.3f}", f"{mean:.3g}", f"{values[worst]:.3g}, {named}"))
    return rows


def _what_broke(found: Judgement, locked: Lock) -> Part:
    question = "What broke?"
    if not found.broken:
        return Part(
            question,
            "Not measured: no task has answers of its own checkpoint and of the merged model.",
            unmeasured=(("single answers", "hub-magmax evaluate recipe.yaml"),),
        )
    facts, unmeasured = [*_rest_told(found), *_worst_examples(found, locked)], []
    if found.blind_spots is not None:
        facts += _blind_spots_told(found.blind_spots)
    elif found.scores and found.scores.pipeline_tag == "text-generation":
        unmeasured.append(("blind spots", "hub-magmax blindspots recipe.yaml"))
    if found.num_won is None:
        answer = "Scores are not right or wrong: what each task lost is in the table."
        head: tuple[str, ...] = ("task", "change")
        unit = unit_of(found.scores)
        rows: list[tuple[str, ...]] = [
            (_name(one.loss.task), _change(one.loss, unit)) for one in found.broken
        ]
    else:
        answer = _nothing_to_lose(found)
        if found.lost is not None:
            lost, right = found.lost
            answer = (
                f"{lost:,} of {right:,} right answers of the own checkpoints are wrong now, and "
                f"{found.num_won:,} wrong ones are right."
            )
        head = ("task", "right before", "lost", "of these, base model right", "won")
        rows = [_broken_row(one) for one in found.broken]
    return Part(question, answer, tuple(facts), head, tuple(rows[:_MOST_ROWS]), tuple(unmeasured))


def _broken_row(one: Broken) -> tuple[str, ...]:
    share, loss = share_lost(one.loss), one.loss
    lost = "—" if share is None else f"{loss.flipped:,}: {_percent(share)}"
    counts = [f"{n:,}" if n is not None else "—" for n in (loss.right_before, one.num_of_base, one.num_won)]
    return (_name(loss.task), counts[0], lost, *counts[1:])


def _rest_told(found: Judgement) -> Iterator[str]:
    if (rest := len(found.broken) - _MOST_ROWS) > 0:
        yield f"{number_of(rest, 'other task')} lost less; scores.json has all."
    if missing := len(found.tasks) - len(found.broken):
        yield f"{number_of(missing, 'task')} without scores of the own checkpoint and of the merged model."


def _worst_examples(found: Judgement, locked: Lock) -> Iterator[str]:
    """Yield the examples of the worst task that lost most, by their numbers in its data."""
    loss = found.broken[0].loss
    if not loss.worst:
        return
    data = next((on.dataset for on in measured_on(found.scores, locked, ()) if on.task == loss.task), None)
    what = "probability of the right answer" if loss.in_probability else "score"
    numbers = [f"{one.index} ({one.before:.2f} → {one.after:.2f})" for one in loss.worst]
    yield f"Lost most in {data or _name(loss.task)}, examples from 0: {', '.join(numbers)}; {what}."


def _blind_spots_told(found: BlindSpots) -> Iterator[str]:
    """Yield of each task what samples of its own checkpoint reached, and samples of the merge do not."""
    for one in found.moves:
        if one.before == one.task and one.num_sampled:
            grafts, nothing = (one.count(SAMPLED, after) for after in (GRAFT_ONLY, UNREACHED))
            yield (
                f"{_name(one.task)}: of {number_of(one.num_sampled, 'item')} that samples solved, "
                f"{grafts} are left to grafts and {nothing} to nothing; {one.by_chance} by chance."
            )


def _worst(found: Judgement) -> Part:
    question = "How bad is the worst?"
    if not found.broken:
        missing = (("tails", "hub-magmax evaluate recipe.yaml"),)
        return Part(question, "Not measured: there are no single answers.", unmeasured=missing)
    loss, unit = found.broken[0].loss, unit_of(found.scores)
    shown = _unit_of_losses(loss, unit)
    what = "probability of the right answer" if loss.in_probability else "score"
    answer = f"Worst task: {_name(loss.task)}, {_change(loss, unit)} against its own checkpoint."
    if tail := loss.tail(0.9):
        answer += (
            f" There the worst tenth of the examples lose {shown.value(tail.value)}{shown.difference_name} "
            f"{_ends(tail.low, tail.high, shown)} of {what} on average."
        )
    facts = []
    if found.tail is not None:
        facts.append(f"Is its tail heavier than the checkpoint's, beyond that? {found.tail.verdict}")
    else:
        facts.append("Too few examples to say anything about the shape of its tail.")
    levels = [level for level in LEVELS if any(one.loss.tail(level) for one in found.broken)]
    head = ("task", "change", *(f"worst {100 * (1 - level):.0f} %" for level in levels))
    rows = tuple(_tail_row(one.loss, unit, levels) for one in found.broken[:_MOST_ROWS])
    return Part(question, answer, tuple(facts), head, rows)


def _tail_row(loss: ExampleLoss, unit: Unit, levels: Sequence[float]) -> tuple[str, ...]:
    shown = _unit_of_losses(loss, unit)
    tails = [loss.tail(level) for level in levels]
    told = ("—" if t is None else f"{shown.value(t.value)} {_ends(t.low, t.high, shown)}" for t in tails)
    return (_name(loss.task), _change(loss, unit), *told)


def _unit_of_losses(loss: ExampleLoss, unit: Unit) -> Unit:
    return Unit(is_share=True) if loss.in_probability else unit


def _change(loss: ExampleLoss, unit: Unit) -> str:
    seen = loss.difference
    return f"{unit.change(seen.mean)}{unit.difference_name} {_ends(seen.low, seen.high, unit)}"


def _ends(low: float, high: float, unit: Unit) -> str:
    return f"[{unit.value(low)}, {unit.value(high)}]"


def _percent(share: Measured) -> str:
    value, low, high = (f"{100 * part:.1f}" for part in (share.value, share.low, share.high))
    return f"{value} % [{low}, {high}]"


def _name(task: str) -> str:
    return cut_name(task, at_most(_NAME))
