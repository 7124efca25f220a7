"""Tables of merges of language models' adapters, by the weight of the task with a strict format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.llm_tasks import CHOICES, FORMAT, TASKS, calls
from benchmarks.page_tables import table
from hub_magmax.evaluation.intervals import paired_difference

#: Weights of the format task; the others share the rest alike. The first is the uniform preference.
WEIGHTS = (0.25, 0.5, 0.7, 0.9)

#: Tasks whose mean a column has, by its name.
_PARTS: Mapping[str, Sequence[str]] = {"calls": [FORMAT], "others": [*CHOICES]}

BySeed = dict[str, float]


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of the stored models, in per cent, by seed.

    Attributes:
        seeds: Rows of each seed, as they are stored.
    """

    seeds: Mapping[str, Sequence[Mapping[str, Any]]]

    def rows(self, model: str, weight: float | None = None, *, own: bool = False) -> dict[str, Any]:
        """Return the row of a model by seed; that with the method's own scaling coefficient if `own`."""
        found = {
            seed: row
            for seed, rows in self.seeds.items()
            for row in rows
            if (row["model"], row.get("weight")) == (model, weight)
        }
        return {seed: row["own"] for seed, row in found.items()} if own else found

    def of(
        self, tasks: Sequence[str], model: str, weight: float | None = None, *, own: bool = False
    ) -> BySeed:
        """Return the mean accuracy over some tasks."""
        found = self.rows(model, weight, own=own)
        return {
            seed: 100 * float(np.mean([_share(row["right"][task]) for task in tasks]))
            for seed, row in found.items()
        }

    def opened(self, model: str, weight: float | None = None, *, own: bool = False) -> BySeed:
        """Return the share of the format task's answers whose first token is right, in per cent."""
        found = self.rows(model, weight, own=own)
        return {seed: 100 * _share(row["opened"]) for seed, row in found.items()}

    @property
    def methods(self) -> list[str]:
        """Those that were merged under the uniform preference, in the order of the first seed."""
        first, *_ = self.seeds.values()
        return [row["model"] for row in first if row.get("weight") == WEIGHTS[0]]


def _share(right: str) -> float:
    return right.count("1") / len(right)


def section(stored: Mapping[str, Any]) -> str:
    """Return the part of the page that is written from results."""
    found = complete(stored)
    rows = [row for one in found.seeds.values() for row in one]
    settings, seconds = stored["settings"], sum(row["seconds"] for row in rows)
    trained = sum(stored["training_seconds"][seed] for seed in found.seeds)
    seeds = "one run of SmolLM2-135M, so that nothing tells how seeds differ" if len(found.seeds) == 1 else (
        f"{len(found.seeds)} runs of SmolLM2-135M, with other seeds of data, order and first factors: mean ± "
        "standard deviation over them"
    )  # fmt: skip
    told = (
        f"{seeds[0].upper()}{seeds[1:]}; {settings['num_test']} test and {settings['num_validation']} "
        f"validation examples of each task, {settings['num_steps']} steps of {settings['batch_size']}, rank "
        f"{settings['rank']}. Training took {trained / 60:.0f} minutes of one core, merging and scoring "
        f"{seconds / 60:.0f}."
    )
    tables = (_models(found), _uniform(found), _by_weight(found), _bought_back(found), _said(found))
    return "\n".join(("", f"{answer(found)}\n", f"{told}\n", *tables, ""))


def complete(stored: Mapping[str, Any]) -> Accuracies:
    """Return the accuracies of the seeds that have as many models as the first."""
    first, *_ = stored["seeds"].values()
    return Accuracies({seed: rows for seed, rows in stored["seeds"].items() if len(rows) >= len(first)})


def answer(found: Accuracies) -> str:
    """Return a paragraph: how much of the format task is left, and what its weight gives back."""
    own, uniform = _spread(found.of([FORMAT], FORMAT)), WEIGHTS[0]
    lost, before = (_range(found, tasks, uniform) for tasks in ([FORMAT], [*CHOICES]))
    by_default = _range(found, [FORMAT], uniform, own=True)
    said = (
        f"Of `calls` their own adapter answers {own} % right, the merges by {len(found.methods)} methods "
        f"under uniform preference {by_default} % with their own λ and {lost} % with a tuned one."
    )
    for weight in WEIGHTS[1:]:
        calls, others = (_range(found, tasks, weight) for tasks in ([FORMAT], [*CHOICES]))
        if calls:
            said += f" At the weight {weight:g} it is {calls} %, and the mean of the others {others} %"
            said += f" (uniform: {before} %)." if weight == WEIGHTS[1] else "."
    adapters = [found.of([task], task) for task in CHOICES]
    alone = {seed: float(np.mean([one[seed] for one in adapters])) for seed in found.seeds}
    base = _spread(found.of([*CHOICES], "base"))
    return f"{said} The others' own adapters have a mean of {_spread(alone)} %, the base model {base} %."


def _range(found: Accuracies, tasks: Sequence[str], weight: float, *, own: bool = False) -> str:
    """Return the lowest and the highest mean of the methods that were merged under a weight."""
    every = [found.of(tasks, method, weight, own=own).values() for method in found.methods]
    means = [float(np.mean([*one])) for one in every if one]
    return f"{min(means):.0f} to {max(means):.0f}" if means else ""


def _models(found: Accuracies) -> str:
    rows = []
    for model in ("base", *TASKS):
        cells = [_spread(found.of([task], model)) for task in TASKS]
        rows.append([f"`{model}`", *cells, _spread(found.opened(model))])
    told = table(("model", *TASKS, "`calls`: first token right"), rows)
    return f"Accuracy in per cent of the base model and of each task's own adapter:\n\n{told}"


def _by_method(
    found: Accuracies, words: str, heads: Iterable[str], cells: Callable[[str], Iterable[str]]
) -> str:
    """Return words and a table with a row for each method."""
    rows = ([f"`{method}`", *cells(method)] for method in found.methods)
    return f"{words}\n\n{table(('method', *heads), rows)}"


def _uniform(found: Accuracies) -> str:
    """Return the table of the uniform preference, with each method's own λ and the tuned one."""

    def cells(method: str) -> Iterator[str]:
        for own in (True, False):
            where = (method, WEIGHTS[0])
            yield _scalings(found.rows(*where, own=own))
            yield _spread(found.of([FORMAT], *where, own=own))
            yield _spread(found.opened(*where, own=own))
            yield _spread(found.of([*CHOICES], *where, own=own))

    words = (
        "Uniform preference, with each method's own λ and with the λ that validation chose: `calls`, and\n"
        "the mean of the three other tasks:"
    )
    heads = (f"{own} λ" for own in ("own", "tuned"))
    columns = ("calls", "first token right", "others")
    return _by_method(found, words, [name for head in heads for name in (head, *columns)], cells)


def _by_weight(found: Accuracies) -> str:
    def cells(method: str) -> Iterator[str]:
        for weight in WEIGHTS:
            one, others = (_spread(found.of(tasks, method, weight)) for tasks in ([FORMAT], [*CHOICES]))
            yield f"{one} / {others} ({_scalings(found.rows(method, weight))})" if one else ""

    words = (
        "By the weight of `calls`, the rest of which the others share alike, each with the λ that\n"
        "validation chose, `calls` / mean of the others (λ):"
    )
    return _by_method(found, words, (f"{weight:g}" for weight in WEIGHTS), cells)


def _bought_back(found: Accuracies) -> str:
    """Return the table of the differences from uniform preference."""
    columns = {(weight, name): tasks for weight in WEIGHTS[1:] for name, tasks in _PARTS.items()}

    def cells(method: str) -> Iterator[str]:
        for (weight, _), tasks in columns.items():
            yield _difference(found, method, weight, tasks) if found.rows(method, weight) else ""

    words = (
        "Points more than under uniform preference, `calls` and mean of the others, with 95 % intervals of\n"
        "a paired bootstrap over test examples (how adapters differ from seed to seed is not in them):"
    )
    return _by_method(found, words, (f"{weight:g}: {name}" for weight, name in columns), cells)


def _difference(found: Accuracies, method: str, weight: float, tasks: Sequence[str]) -> str:
    """Return how many points more of some tasks' answers are right than under uniform preference."""
    new, old = (
        [
            100 * int(one)
            for row in found.rows(method, which).values()
            for task in tasks
            for one in row["right"][task]
        ]
        for which in (weight, WEIGHTS[0])
    )
    difference = paired_difference(new, old)
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


def _said(found: Accuracies) -> str:
    """Return the answers of the first seed's models to its first request."""
    seed, *_ = found.seeds
    request = calls(int(seed))[0]["prompt"].replace("\n", "⏎")
    rows = []
    models: list[tuple[str, float | None]] = [("base", None), *((task, None) for task in TASKS)]
    models += [(method, weight) for method in found.methods for weight in WEIGHTS[:1]]
    for model, weight in models:
        name = f"`{model}`" + ("" if weight is None else f", {weight:g}")
        said = found.rows(model, weight)[seed]["said"].strip().replace("\n", "⏎").replace("|", "\\|")
        rows.append([name, f"`{said}`" if said else "(none)"])
    answers = table(("model", "answer"), rows)
    return f"Greedy answers to the first request of seed {seed}, `{request}`:\n\n{answers}"


def _scalings(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the scaling coefficients of all seeds, each once, in order."""
    return ", ".join(f"{one:g}" for one in sorted({row["scaling"] for row in rows.values()}))


def _spread(values: BySeed) -> str:
    """Return the mean, and the standard deviation where there are several seeds; nothing of none."""
    found = [*values.values()]
    if not found:
        return ""
    return f"{np.mean(found):.1f}" + (f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else "")
