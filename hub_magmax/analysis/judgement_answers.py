"""Answers of a judgement: will it merge, what broke, how bad is the worst, what next; each with its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hub_magmax.analysis.judgement_before import metric_rows, pairs_told, predicted, short, worth_told
from hub_magmax.analysis.judging import HALF, Broken, Judgement, share_lost
from hub_magmax.evaluation.blind_spots import GRAFT_ONLY, SAMPLED, UNREACHED, BlindSpots
from hub_magmax.evaluation.intervals import Difference, wilson_interval
from hub_magmax.evaluation.scores import Score
from hub_magmax.evaluation.tables import Measured
from hub_magmax.evaluation.tails import LEVELS, ExampleLoss
from hub_magmax.evaluation.tradeoff import Tradeoff
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.reporting.card_rows import measured_on
from hub_magmax.reporting.headline import result
from hub_magmax.reporting.score_formats import Unit, unit_of
from hub_magmax.text import number_of

#: Tasks that have a row; the worst ones of more.
_MOST_ROWS = 8

#: Tasks that are named as the reason of a verdict.
_MOST_REASONS = 3

#: First words of a judgement, by its verdict, and the answer to the first question.
_VERDICTS = {
    "yes": ("Merged well.", "Yes."),
    "in part": ("Merged in part.", "In part."),
    "no": ("Did not merge.", "No."),
    None: ("", ""),
}


@dataclass(frozen=True)
class Part:
    """One question of the page.

    Attributes:
        question: To be answered.
        answer: In a sentence or two.
        facts: Further sentences.
        head, rows: Of a table; empty for none.
        commands: What to do, or what was not measured, each with the command for it.
    """

    question: str
    answer: str
    facts: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


def sentence(found: Judgement, locked: Lock) -> str:
    """Return verdict, tasks below the base model, and what was lost, in a sentence or two."""
    if found.scores is None or found.assessment is None:
        return "Not scored: what this merge lost is not known."
    below, rest = result(found.scores, locked)
    verdict = _VERDICTS[found.verdict][0]
    if found.unmerged:
        verdict, below = f"{verdict.removesuffix('.')}: {_reasons(found)}.", ""
    if found.lost is None:
        return " ".join(filter(None, (verdict, below, rest, _nothing_to_lose(found))))
    lost, right = found.lost
    text = (
        f"It lost {lost:,} of the {right:,} right answers that the tasks' own checkpoints give"
        f" ({_percent(Measured(lost / right, *wilson_interval(lost, right)))})"
    )
    worst = found.broken[0].loss
    if lost and len(found.broken) > 1 and worst.flip_rate is not None:
        text += f", most on {short(worst.task)} ({100 * worst.flip_rate:.0f} %)"
    return " ".join(filter(None, (verdict, below, f"{text}.")))


def _reasons(found: Judgement) -> str:
    """Return why tasks did not merge; of many the first ones."""
    assert found.scores and found.assessment
    unit, told = unit_of(found.scores), list[str]()
    for row in found.unmerged[:_MOST_REASONS]:
        kept, named = found.assessment.kept.get(row.task, 1.0), short(row.task)
        if kept < HALF:
            told.append(f"{named} keeps {100 * kept:.0f} % of its own checkpoint's score")
        elif row.base and row.merged:
            change = f"{unit.value(row.base.value)}{unit.sign} → {unit.value(row.merged.value)}{unit.sign}"
            told.append(f"{named} falls below the base model ({change})")
    if (rest := len(found.unmerged) - _MOST_REASONS) > 0:
        told.append(f"so it is with {number_of(rest, 'more task')}")
    return "; ".join(told)


def _nothing_to_lose(found: Judgement) -> str:
    """Return what was won where no answer could be lost; nothing where answers are not right or wrong."""
    if found.num_won is None:
        return ""
    return f"The own checkpoints have no right answer; {found.num_won:,} wrong ones are right now."


def parts(found: Judgement, locked: Lock) -> tuple[Part, ...]:
    """Return the questions with their answers."""
    return (
        _will_it_merge(found, locked),
        _what_broke(found, locked),
        _worst(found),
        _what_next(found),
        _before(found),
    )


def _will_it_merge(found: Judgement, locked: Lock) -> Part:
    facts, commands = [predicted(found)], []
    if found.predictions is None:
        commands.append(
            _not_measured("a prediction", "hub-magmax predict-merge recipe.yaml --history FOLDER")
        )
    if found.assessment is None:
        commands.append(_not_measured("scores", "hub-magmax evaluate recipe.yaml"))
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = []
    if found.scores and found.assessment:
        unit = unit_of(found.scores)
        head = ("task", "base model", "own checkpoint", "merged", "from base", "from own", "kept of own")
        compared = sorted(found.assessment.rows, key=lambda row: (row.to_own is None, row.to_own or 0.0))
        rows = [_score_row(row, found.assessment.kept.get(row.task), unit) for row in compared]
        if (rest := len(rows) - _MOST_ROWS) > 0:
            facts.append(f"{number_of(rest, 'other task')} lost less, or less is known; scores.json has all.")
    answer = f"{_VERDICTS[found.verdict][1]} {_kept(found, locked)}".strip()
    return Part("Will it merge?", answer, tuple(facts), head, tuple(rows[:_MOST_ROWS]), tuple(commands))


def _not_measured(what: str, command: str) -> tuple[str, str]:
    return f"Not measured: {what}.", command


def _score_row(row: Tradeoff, kept: float | None, unit: Unit) -> tuple[str, ...]:
    def shown(score: Score | None) -> str:
        return "—" if score is None else unit.value(score.value)

    changes = (
        _change(seen, unit) if seen else "—" if change is None else unit.change(change)
        for seen, change in ((row.base_difference, row.to_base), (row.own_difference, row.to_own))
    )
    share = "—" if kept is None else f"{100 * kept:.0f} %"
    return short(row.task), shown(row.base), shown(row.own), shown(row.merged), *changes, share


def _what_next(found: Judgement) -> Part:
    """Return what to do: of merges that lost something, where to look for a better one."""
    question = "What next?"
    if found.verdict is None or found.assessment is None:
        missing = ("Score the merged model beside its base model and the checkpoints:", "evaluate")
        return Part(question, "Not known before it is scored.", commands=(_step(*missing),))
    steps = [
        (f"{short(row.task)}: its own checkpoint is below the base model; is it the right one?", "diagnose")
        for row in found.assessment.own_below_base[:1]
    ]
    if found.verdict == "yes":
        return Part(question, "Nothing has to be mended.", commands=tuple(_step(*step) for step in steps))
    steps.append(("Try every method and scaling on these examples:", "compare"))
    worst = found.assessment.worst
    if worst and len(found.tasks) > 1:
        steps.append(
            (f"See what more weight for {short(worst.task)} would give it, and cost the others:", "sweep")
        )
        steps.append(("Leave to the tasks' own checkpoints what the merged model gets wrong:", "route"))
    answer = "Look for a better merge of these checkpoints; what is still lost can be left to them."
    return Part(question, answer, commands=tuple(_step(*step) for step in steps))


def _step(why: str, verb: str) -> tuple[str, str]:
    return why, f"hub-magmax {verb} recipe.yaml"


def _before(found: Judgement) -> Part:
    """Return what was known of the checkpoints before they were merged."""
    facts, commands = [], []
    if found.predictions is not None:
        facts += [*pairs_told(found), *worth_told(found)]
    if found.diagnosis is not None and found.diagnosis.suspects:
        facts.append(f"Diagnosis: {found.diagnosis.verdict}")
    metrics = found.diagnosis.metrics if found.diagnosis else None
    rows = metric_rows(metrics, found.tasks) if metrics else []
    if rows:
        facts.append(
            "Weights are the published mean coefficients over five methods, for image classifiers. They say "
            "which way a metric pointed there, and predict nothing here."
        )
    else:
        commands.append(_not_measured("metrics of pairs", "hub-magmax diagnose recipe.yaml --metrics"))
    head = ("metric of pairs", "published weight", "mean", "worst pair") if rows else ()
    answer = "What pairs of checkpoints show by themselves." if rows or facts else "Nothing was measured."
    return Part("What was known before?", answer, tuple(facts), head, tuple(rows), tuple(commands))


def _kept(found: Judgement, locked: Lock) -> str:
    """Return what the merge keeps, in the words of the card."""
    if found.scores is None or found.assessment is None:
        return "What it keeps was not measured."
    rest = result(found.scores, locked)[1]
    return f"{rest[:1].upper()}{rest[1:]}"


def _what_broke(found: Judgement, locked: Lock) -> Part:
    question = "What broke?"
    if not found.broken:
        return Part(
            question,
            "Not measured: no task has answers of its own checkpoint and of the merged model.",
            commands=(_not_measured("single answers", "hub-magmax evaluate recipe.yaml"),),
        )
    facts, commands = [*_rest_told(found), *_worst_examples(found, locked)], []
    if found.blind_spots is not None:
        facts += _blind_spots_told(found.blind_spots)
    elif found.scores and found.scores.pipeline_tag == "text-generation":
        commands.append(_not_measured("blind spots", "hub-magmax blindspots recipe.yaml"))
    if found.num_won is None:
        answer = "Scores are not right or wrong: what each task lost is in the table."
        head: tuple[str, ...] = ("task", "change")
        unit = unit_of(found.scores)
        rows: list[tuple[str, ...]] = [
            (short(one.loss.task), _change(one.loss.difference, unit, unit.difference_name))
            for one in found.broken
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
    return Part(question, answer, tuple(facts), head, tuple(rows[:_MOST_ROWS]), tuple(commands))


def _broken_row(one: Broken) -> tuple[str, ...]:
    share, loss = share_lost(one.loss), one.loss
    lost = "—" if share is None else f"{loss.flipped:,}: {_percent(share)}"
    counts = [f"{n:,}" if n is not None else "—" for n in (loss.right_before, one.num_of_base, one.num_won)]
    return (short(loss.task), counts[0], lost, *counts[1:])


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
    yield f"Lost most in {data or short(loss.task)}, examples from 0: {', '.join(numbers)}; {what}."


def _blind_spots_told(found: BlindSpots) -> Iterator[str]:
    """Yield of each task what samples of its own checkpoint reached, and samples of the merge do not."""
    for one in found.moves:
        if one.before == one.task and one.num_sampled:
            grafts, nothing = (one.count(SAMPLED, after) for after in (GRAFT_ONLY, UNREACHED))
            yield (
                f"{short(one.task)}: of {number_of(one.num_sampled, 'item')} that samples solved, "
                f"{grafts} are left to grafts and {nothing} to nothing; {one.by_chance} by chance."
            )


def _worst(found: Judgement) -> Part:
    question = "How bad is the worst?"
    if not found.broken:
        missing = (_not_measured("tails", "hub-magmax evaluate recipe.yaml"),)
        return Part(question, "Not measured: there are no single answers.", commands=missing)
    loss, unit = found.broken[0].loss, unit_of(found.scores)
    shown = _unit_of_losses(loss, unit)
    what = "probability of the right answer" if loss.in_probability else "score"
    change = _change(loss.difference, unit, unit.difference_name)
    answer = f"Worst task: {short(loss.task)}, {change} against its own checkpoint."
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
    head = ("task", *(f"lost by the worst {100 * (1 - level):.0f} %" for level in levels))
    rows = tuple(_tail_row(one.loss, unit, levels) for one in found.broken[:_MOST_ROWS])
    return Part(question, answer, tuple(facts), head, rows)


def _tail_row(loss: ExampleLoss, unit: Unit, levels: Sequence[float]) -> tuple[str, ...]:
    shown = _unit_of_losses(loss, unit)
    tails = [loss.tail(level) for level in levels]
    sign = shown.difference_name
    told = (
        "—" if t is None else f"{shown.value(t.value)}{sign} {_ends(t.low, t.high, shown)}" for t in tails
    )
    return (short(loss.task), *told)


def _unit_of_losses(loss: ExampleLoss, unit: Unit) -> Unit:
    return Unit(is_share=True) if loss.in_probability else unit


def _change(seen: Difference, unit: Unit, name: str = "") -> str:
    """Return a difference with its interval, both with their signs, and the unit's name between."""
    return f"{unit.change(seen.mean)}{name} [{unit.change(seen.low)}, {unit.change(seen.high)}]"


def _ends(low: float, high: float, unit: Unit) -> str:
    return f"[{unit.value(low)}, {unit.value(high)}]"


def _percent(share: Measured) -> str:
    value, low, high = (f"{100 * part:.1f}" for part in (share.value, share.low, share.high))
    return f"{value} % [{low}, {high}]"
