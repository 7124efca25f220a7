"""Questions about merging, answered by numbers with intervals from the stored results of one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.continual.claims import BLIND, Measure
from benchmarks.continual.formats import difference, probability, table
from benchmarks.continual.rows import Key, Results, by_seed, is_measured, mean, preference_of
from benchmarks.continual.significance import paired
from benchmarks.continual.verdicts import NOT_IN_FULL

OURS, AGREEMENT, TOP_N = "tunable_magmax algorithm-1", "agreement", "tunable_magmax top-n"

#: Methods published in 2024 to 2026, none of which sees training examples.
RECENT = (
    "tsv",
    "iso_c",
    "iso_cts",
    "cart",
    "wudi",
    "actmat",
    "opcm",
    "ram",
    "ram_plus",
    "localize_stitch",
    "pcb",
)


#: Between numbers in one cell.
_BETWEEN = "<br>"


@dataclass(frozen=True)
class Question:
    """A question, and how stored results answer it.

    Attributes:
        text: Question.
        about: Meaning of the numbers.
        answer: Returns words with numbers from families of one data set and number of tasks, and their
            tables; nothing where these were not measured. None where there is `elsewhere`.
        elsewhere: Page of this repository that answers it.
    """

    text: str
    about: str
    answer: Callable[[Results, Mapping[str, Any]], str] | None = None
    elsewhere: str = ""


def answers(
    parts: Mapping[tuple[str, str], tuple[Results, Mapping[str, Any]]], *, is_own: bool = False
) -> str:
    """Return a table of questions, with the answers of each data set and number of tasks.

    Args:
        parts: Families, and their tables.
        is_own: Leave out the questions that other pages of this repository answer.
    """
    body = []
    for question in QUESTIONS:
        if is_own and question.elsewhere:
            continue
        text = f"**{question.text}** {question.about}".strip()
        text += f" See {question.elsewhere}." if question.elsewhere else ""
        answer = question.answer
        found = [answer(*values) or "not measured" if answer else "" for values in parts.values()]
        body.append([text, *found])
    return table(["question", *(f"{data}, T = {number}" for data, number in parts)], body)


def _test(results: Results, ahead: Key, behind: Key, ways: tuple[str, str], measure: Measure = "mean") -> str:
    """Return how far a row is ahead of another; nothing where one of them was not measured."""
    if not all(is_measured(results, key, measure) for key in (ahead, behind)):
        return ""
    sides = (by_seed(results, key, way, measure) for key, way in zip((ahead, behind), ways, strict=True))
    test = paired([one - other for one, other in zip(*sides, strict=True)])
    return f"{difference(test.to_dict())}, p {probability(test.p)}"


_TUNED = ("tuned", "tuned")


def _best_of(results: Results, names: Sequence[str], kind: str) -> str | None:
    """Return the method with the highest accuracy, λ tuned, under one preference."""
    known = _measured(results, names, kind)
    return max(known, key=lambda name: mean(by_seed(results, (name, kind), "tuned")), default=None)


def _measured(results: Results, names: Sequence[str], kind: str) -> list[str]:
    return [name for name in names if is_measured(results, (name, kind))]


def _against_each(results: Results, ahead: Key, rivals: Sequence[Key], measure: Measure = "mean") -> str:
    found = {rival[0]: _test(results, ahead, rival, _TUNED, measure) for rival in rivals}
    return _BETWEEN.join(f"`{name}` {shown}" for name, shown in found.items() if shown)


def _against_blind(results: Results, tables: Mapping[str, Any]) -> str:
    best = _best_of(results, BLIND, "uniform")
    return _against_each(results, (OURS, preference_of(results)), [(best, "uniform")] if best else [])


def _against_aware(results: Results, tables: Mapping[str, Any]) -> str:
    kind = preference_of(results)
    found = _against_each(results, (OURS, kind), [(name, kind) for name in ("average", "ties", AGREEMENT)])
    recent = _best_of(results, RECENT, kind)
    if recent is None or not is_measured(results, (OURS, kind)):
        return found
    count = len(_measured(results, RECENT, kind))
    best = f"best of {count} measured of those published since 2024:{_BETWEEN}"
    return _BETWEEN.join(filter(None, (found, best + _against_each(results, (OURS, kind), [(recent, kind)]))))


def _of_the_worst_task(results: Results, tables: Mapping[str, Any]) -> str:
    kind = preference_of(results)
    found = {
        name: _test(results, (name, kind), (name, "uniform"), _TUNED, "worst")
        for name in (OURS, AGREEMENT, "average")
    }
    return _BETWEEN.join(f"`{name}` {shown}" for name, shown in found.items() if shown)


def _of_examples(results: Results, tables: Mapping[str, Any]) -> str:
    rows = [row for row in tables["sample_losses"] if row["kind"] == preference_of(results)]
    return _BETWEEN.join(f"{row['size']} with `{row['method']}` {difference(row)}" for row in rows)


def _of_comparison(results: Results, tables: Mapping[str, Any]) -> str:
    return _BETWEEN.join(
        f"{name} {difference(row[test])}"
        for kind, row in tables["regrets"].items()
        for name, test in (
            (kind, "test"),
            (f"{kind}, to the one choice that is best over all seeds", "test_to_best"),
        )
    )


def _of_selection(results: Results, tables: Mapping[str, Any]) -> str:
    kind = preference_of(results)
    ways = {"λ = 0.5": ("fixed", "fixed"), "tuned": _TUNED}
    found = {way: _test(results, (TOP_N, kind), (OURS, kind), both) for way, both in ways.items()}
    return _BETWEEN.join(f"{way} {shown}" for way, shown in found.items() if shown)


def _of_tuning(results: Results, tables: Mapping[str, Any]) -> str:
    kind = preference_of(results)
    found = {
        name: _test(results, (name, kind), (name, kind), ("tuned", "fixed"))
        for name in (OURS, AGREEMENT, "average", "ties")
    }
    return _BETWEEN.join(f"`{name}` {shown}" for name, shown in found.items() if shown)


def _of_data(results: Results, tables: Mapping[str, Any]) -> str:
    kind = preference_of(results)
    rivals = [(name, kind) for name in ("regmean", "regmean_plusplus", "fisher")]
    return _against_each(results, (AGREEMENT, kind), [*rivals, ("average, react", "uniform")])


def _of_the_best(results: Results, tables: Mapping[str, Any]) -> str:
    found = [row for row in tables["claims"] if row["id"].startswith("agreement-best") and "p" in row]
    return _BETWEEN.join(
        f"{'worst task' if row['measure'] == 'worst' else 'all tasks'} {difference(row)}, {_to_rival(row)}"
        for row in found
    )


def _to_rival(row: Mapping[str, Any]) -> str:
    rival = f"to `{row['rival'][0]}`"
    if row["verdict"] == NOT_IN_FULL:
        return f"{rival}, best of {row['num_rivals']} measured: {NOT_IN_FULL}"
    return f"p {probability(row['p'])}, {rival}"


QUESTIONS = (
    Question(
        "Does Tunable MAGMAX beat methods that are blind to the preference?",
        "Ahead of the best of five by:",
        _against_blind,
    ),
    Question(
        "Does it beat methods under the same preference?",
        "Ahead of each by:",
        _against_aware,
    ),
    Question(
        "What does the preference buy the worst task of a target?",
        "Its accuracy with the preference, less that with none:",
        _of_the_worst_task,
    ),
    Question(
        "Does it buy back a task that merging loses?",
        "",
        elsewhere="[language_models.md](language_models.md#a-format-among-merged-adapters), by "
        "`python -m benchmarks.llm_lora`",
    ),
    Question(
        "How many examples per task are enough?",
        "Points that fewer lose to the most that were tried, λ = 0.5:",
        _of_examples,
    ),
    Question(
        "Does `compare` choose well?", "Points lost to the best fixed choice of each seed:", _of_comparison
    ),
    Question(
        "One λ, or numbers by block?",
        "",
        elsewhere="[tensors.md](tensors.md), by `python -m benchmarks.blocks`",
    ),
    Question("`top-n` or `algorithm-1`?", "`top-n` is ahead by:", _of_selection),
    Question("What does tuning λ gain over 0.5?", "", _of_tuning),
    Question(
        "What do training examples of the tasks buy?",
        "`agreement`, which sees none, is ahead of each by:",
        _of_data,
    ),
    Question(
        "What do int8, int4 and a LoRA rank lose?",
        "",
        elsewhere="[quantisation.md](quantisation.md), by `python -m benchmarks.quantisation`",
    ),
    Question(
        "Which diagnosis predicts failure?",
        "",
        elsewhere="[mergeability.md](mergeability.md), by `python -m benchmarks.pair_history`",
    ),
    Question(
        "Is there a rule under a preference that beats the best rival in hindsight?",
        "`agreement` is ahead, among methods without training examples, by:",
        _of_the_best,
    ),
)
