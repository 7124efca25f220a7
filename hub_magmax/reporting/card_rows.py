"""Rows of the card's tables: the most wanted tasks first, and few enough to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.evaluation.scores import MERGED, Score, Scores
from hub_magmax.evaluation.tradeoff import Tradeoff
from hub_magmax.methods.corrections import SOURCE
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.text import Markdown, code, publishable, quoted, verbatim

#: Rows of a table that stands open; a longer one is folded.
MAX_OPEN = 12

#: Rows of a folded table; whatever is beyond is in the files beside the card.
MAX_FOLDED = 100

#: Of a folded table the first rows stand open, and these further ones.
_FIRST, _WORST = 5, 3


def by_preference(rows: Sequence[Tradeoff]) -> tuple[Tradeoff, ...]:
    """Return the rows of tasks, the most wanted first."""
    return tuple(sorted(rows, key=lambda row: -row.preference))


def telling(rows: Sequence[Tradeoff]) -> tuple[Tradeoff, ...]:
    """Return the rows that stand open: all, or the first ones with those that lost most."""
    if len(rows) <= MAX_OPEN:
        return tuple(rows)
    changes = [(row, row.to_base if row.to_own is None else row.to_own) for row in rows[_FIRST:]]
    lost = sorted(((change, row) for row, change in changes if change is not None), key=lambda pair: pair[0])
    worst = [row for _, row in lost[:_WORST]]
    return (*rows[:_FIRST], *(row for row in rows[_FIRST:] if row in worst))


@dataclass(frozen=True)
class Measured:
    """Data that a task or a guard was measured on.

    Attributes:
        task: Its name.
        dataset: Name on the Hub; of local data the name of the file or folder alone.
        revision: Commit, or the digest of local data; None where neither is known.
        values: Everything else that the scores say of it.
        num_examples: How many there are.
    """

    task: str
    dataset: str | None
    revision: str | None
    values: Mapping[str, Any]
    num_examples: int | None = None


def measured_on(scores: Scores | None, lock: Lock, first: Sequence[str]) -> tuple[Measured, ...]:
    """Return the data of all tasks and guards, in the order `first` as far as it goes.

    Paths of local data are not told: they mean something on one machine only.
    """
    found = scores.data if scores else {}
    counts = {score.task: score.num_examples for score in scores.scores} if scores else {}
    order = dict.fromkeys([*(task for task in first if task in found), *found])
    return tuple(_measured(task, found[task], lock, counts.get(task)) for task in order)


#: Values of `Scores.data` that say how models were asked, and what the card calls them.
_ASKED = {
    "judged": "judged by",
    "choices": "choices",
    "question": "question column",
    "prompt_column": "prompt column",
    "template": "template",
    "prefix": "prefix",
    "class_templates": "texts of a class",
    "few_shot": "few shot",
    "joint": "joined by",
}

#: Of these, the texts that reach the model; the others are names and sentences.
_QUOTED = ("template", "prefix")


def asked(data: Sequence[Measured], lock: Lock) -> tuple[tuple[tuple[str, ...], dict[str, Markdown]], ...]:
    """Return the ways in which models were asked, each with its tasks; none where no evaluator tells.

    Every sign of a template or a joint is shown, because each is a part of what the model reads.
    """
    ways: dict[tuple[tuple[str, Markdown], ...], list[str]] = {}
    for on in data:
        told = {key: _without_places(str(on.values[key]), lock) for key in _ASKED if on.values.get(key)}
        how = tuple(
            (_ASKED[key], verbatim(quoted(text) if key in _QUOTED else text)) for key, text in told.items()
        )
        if how:
            ways.setdefault(how, []).append(on.task)
    return tuple((tuple(tasks), dict(way)) for way, tasks in ways.items())


def _without_places(text: str, lock: Lock) -> str:
    """Return a text in which local data has its name and not its path."""
    for place in sorted(lock.local_data, key=len, reverse=True):
        text = text.replace(place, place.rstrip("/").rsplit("/", 1)[-1])
    return text


def _measured(task: str, values: Mapping[str, Any], lock: Lock, count: int | None) -> Measured:
    dataset, revision = values.get("dataset"), values.get("revision")
    if isinstance(dataset, str) and (dataset in lock.local_data or dataset.startswith((".", "/", "~"))):
        revision = revision or lock.local_data.get(dataset)
        dataset = publishable(dataset).rstrip("/").rsplit("/", 1)[-1]
    return Measured(task, dataset, revision, values, values.get("examples", count))


@dataclass(frozen=True)
class ToldRule:
    """A rule for tensors.

    Attributes:
        tensors: Which ones.
        take: Where they come from, `nothing`, or None where they are merged or a stack of layers tells.
        numbers: By which they are merged.
        factor: What they are multiplied by where they are copied, or None.
    """

    tensors: Markdown
    take: str | None
    numbers: Markdown
    factor: float | None


def told_rules(lock: Lock) -> tuple[ToldRule, ...]:
    """Return the rules for tensors, in their order."""
    return tuple(_told(rule) for rule in lock.rules)


def told_correction(lock: Lock) -> str:
    """Return what is corrected, and how; empty without a correction."""
    found = lock.correction
    if not found:
        return ""
    number = SOURCE.removeprefix("arXiv:")
    return (
        f"by {code(found['name'])} ([{SOURCE}](https://arxiv.org/abs/{number})), ridge {found['ridge']:g}: "
        f"{code(found['tensor'])} was multiplied by the matrix that maps the merged model's representations "
        "of the tasks' examples, weighted by the preference, to those of the tasks' own models"
    )


def _told(rule: Mapping[str, Any]) -> ToldRule:
    first, end = rule.get("layers", (0, 0))
    blocks = f" in the blocks {first} to {end - 1}" if end else ""
    numbers = {key: rule[key] for key in ("weights", "coefficients", "scaling", "options") if key in rule}
    return ToldRule(
        Markdown(f"tensors that match {code(rule['match'])}{blocks} and no earlier rule"),
        rule.get("take"),
        Markdown("; ".join(f"{key} {_numbers(value)}" for key, value in numbers.items())),
        rule.get("factor"),
    )


def _numbers(value: Any) -> str:
    """Return a number of a rule, several by name, or those of a gradient."""
    if not isinstance(value, Mapping):
        return f"{value:.4g}" if type(value) in (int, float) else code(str(value))
    if "gradient" not in value:
        return ", ".join(f"{code(name)} {_numbers(item)}" for name, item in value.items())
    where = "these blocks" if value.get("over") == "layers" else "the blocks"
    return f"{', '.join(map(_numbers, value['gradient']))} over {where}"


def cut_texts(scores: Scores | None) -> tuple[Score, ...]:
    """Return the scores of the merged model for which texts were cut."""
    found = scores.scores if scores else ()
    return tuple(score for score in found if score.num_cut and score.model == MERGED)
