"""Questions about merging, answered by numbers with intervals from the stored results of one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.continual.claims import BLIND, CONFIRMED_ON, Measure
from benchmarks.continual.elsewhere import ELSEWHERE
from benchmarks.continual.formats import difference
from benchmarks.continual.rows import Key, Results, by_seed, is_measured, keys, mean, preference_of
from benchmarks.continual.significance import paired
from benchmarks.continual.verdicts import NOT_IN_FULL, is_blind_to_data

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


@dataclass(frozen=True)
class Answer:
    """A difference that answers a question.

    Attributes:
        label: What it is of.
        test: Difference and interval.
        note: Words after it.
    """

    label: str
    test: Mapping[str, Any]
    note: str = ""

    def __str__(self) -> str:
        return f"{self.label} {difference(self.test)}{self.note}"


@dataclass(frozen=True)
class Question:
    """A question, and how stored results answer it.

    Attributes:
        text: Question.
        short: Answer in a sentence, by who read the numbers of this repository's data.
        about: Meaning of the numbers.
        answers: Returns differences from families of one data set and number of tasks, and their tables;
            nothing where these were not measured. None where there is `elsewhere`.
        elsewhere: Name of the answer of another page of this repository.
    """

    text: str
    short: str
    about: str
    answers: Callable[[Results, Mapping[str, Any]], list[Answer]] | None = None
    elsewhere: str = ""


#: Families of one data set and number of tasks, and their tables, by both.
Parts = Mapping[tuple[str, str], tuple[Results, Mapping[str, Any]]]


def answers(parts: Parts, *, is_own: bool = False) -> str:
    """Return questions, each with the answers of every data set and number of tasks.

    Args:
        parts: Families, and their tables.
        is_own: Leave out the questions that other pages of this repository answer.
    """
    asked = (question for question in QUESTIONS if not (is_own and question.elsewhere))
    return "\n".join(_answered(question, parts, is_own=is_own) for question in asked)


def _answered(question: Question, parts: Parts, *, is_own: bool) -> str:
    text = f"**{question.text}**" + ("" if is_own else f" **{question.short}**")
    if question.answers is None:
        return f"{text} {ELSEWHERE[question.elsewhere]()}\n"
    found = {part: own for part, values in parts.items() if (own := question.answers(*values))}
    explored = "" if is_own else " (explored)"
    lines = [
        f"- {data}, T = {number}{'' if data in CONFIRMED_ON else explored}: {'; '.join(map(str, own))}"
        for (data, number), own in found.items()
    ]
    return "\n".join([f"{text} {question.about}", "", *(lines or ["- not measured"]), ""])


def _test(results: Results, ahead: Key, behind: Key, ways: tuple[str, str], measure: Measure = "mean") -> Any:
    """Return the test of a row against another; None where one of them was not measured."""
    if not all(is_measured(results, key, measure) for key in (ahead, behind)):
        return None
    sides = (by_seed(results, key, way, measure) for key, way in zip((ahead, behind), ways, strict=True))
    return paired([one - other for one, other in zip(*sides, strict=True)]).to_dict()


_TUNED = ("tuned", "tuned")


def _known(tests: Mapping[str, Any]) -> list[Answer]:
    """Return the answers whose test could be made."""
    return [Answer(label, test) for label, test in tests.items() if test is not None]


def _best_of(results: Results, names: Sequence[str], kind: str) -> str | None:
    """Return the method with the highest accuracy, λ tuned, under one preference."""
    known = _measured(results, names, kind)
    return max(known, key=lambda name: mean(by_seed(results, (name, kind), "tuned")), default=None)


def _measured(results: Results, names: Sequence[str], kind: str) -> list[str]:
    return [name for name in names if is_measured(results, (name, kind))]


def _against_each(results: Results, ahead: Key, rivals: Sequence[Key]) -> list[Answer]:
    return _known({f"`{rival[0]}`": _test(results, ahead, rival, _TUNED) for rival in rivals})


def _against_blind(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    """Return its lead over the best of the claims' rivals, of those without training data, and of others."""
    chosen: dict[str, str] = {}
    for words, group in _blind_groups(results).items():
        if best := _best_of(results, group, "uniform"):
            chosen.setdefault(best, words)
    found = _against_each(results, (OURS, preference_of(results)), [(best, "uniform") for best in chosen])
    return [
        replace(one, note=f" ({words})") for one, words in zip(found, chosen.values(), strict=bool(found))
    ]


def _blind_groups(results: Results) -> dict[str, Sequence[str]]:
    """Return methods that may be measured without a preference, by what they are the best of."""
    names = [method for method, kind in keys(results) if kind == "uniform" and method != OURS]
    without = [name for name in names if is_blind_to_data(name)]
    return {
        f"the best of the {len(BLIND)} of the claims": BLIND,
        "the best without training examples": without,
        "the best with them": [name for name in names if name not in without],
    }


def _against_aware(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    kind = preference_of(results)
    found = _against_each(results, (OURS, kind), [(name, kind) for name in ("average", "ties", AGREEMENT)])
    recent = _best_of(results, RECENT, kind)
    best = _against_each(results, (OURS, kind), [(recent, kind)]) if recent else []
    count = len(_measured(results, RECENT, kind))
    return found + [replace(one, note=f" (the best of {count} published since 2024)") for one in best]


def _of_the_worst_task(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    kind = preference_of(results)
    return _known(
        {
            f"`{name}`": _test(results, (name, kind), (name, "uniform"), _TUNED, "worst")
            for name in (OURS, TOP_N, "average", "ties", AGREEMENT, "wudi", "regmean")
        }
    )


def _of_examples(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    rows = [row for row in tables["sample_losses"] if row["kind"] == preference_of(results)]
    shown = ("difference", "interval")
    return [Answer(f"{row['size']} with `{row['method']}`", {key: row[key] for key in shown}) for row in rows]


def _of_comparison(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    shown = ("difference", "interval")
    return [
        Answer(label, {key: row[test][key] for key in shown})
        for kind, row in tables["regrets"].items()
        for label, test in (
            (kind, "test"),
            (f"{kind}, to the one choice that is best over all seeds", "test_to_best"),
        )
    ]


def _of_selection(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    kind = preference_of(results)
    ways = {"λ = 0.5": ("fixed", "fixed"), "λ tuned": _TUNED}
    return _known({way: _test(results, (TOP_N, kind), (OURS, kind), both) for way, both in ways.items()})


def _of_tuning(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    kind = preference_of(results)
    return _known(
        {
            f"`{name}`": _test(results, (name, kind), (name, kind), ("tuned", "fixed"))
            for name in (OURS, AGREEMENT, "average", "ties")
        }
    )


def _of_data(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    kind = preference_of(results)
    rivals = [(name, kind) for name in ("regmean", "regmean_plusplus", "fisher")]
    return _against_each(results, (AGREEMENT, kind), [*rivals, ("average, react", "uniform")])


def _of_the_best(results: Results, tables: Mapping[str, Any]) -> list[Answer]:
    rows = [row for row in tables["claims"] if row["id"].startswith("agreement-best") and "p" in row]
    return [
        Answer(
            f"{'worst task' if row['measure'] == 'worst' else 'all tasks'}, to `{row['rival'][0]}`",
            row,
            f" (the best of {row['num_rivals']}, not all)" if row["verdict"] == NOT_IN_FULL else "",
        )
        for row in rows
    ]


QUESTIONS = (
    Question(
        "Does Tunable MAGMAX beat methods that are blind to the preference?",
        "Yes on definitions and digits, against baselines without training examples; not beyond chance on "
        "sentiment. Methods with training examples are ahead of it on definitions and digits.",
        "Its lead over the best of them without a preference.",
        _against_blind,
    ),
    Question(
        "Does it beat methods under the same preference?",
        "No: it is behind `ties` and `agreement` on definitions, and ahead of `average` and `agreement` on "
        "sentiment.",
        "Its lead over each.",
        _against_aware,
    ),
    Question(
        "What does the preference buy the worst task of a target?",
        "Mostly nothing, or less: on definitions `ties` and `agreement` gain 3 to 9 points, `average` and "
        "`algorithm-1` lose 7 to 10.",
        "Its accuracy with the preference, less that with none.",
        _of_the_worst_task,
    ),
    Question(
        "Does it buy back a task that merging loses?",
        "Yes, in one run: see what a weight of a half does to `calls`, a task whose answers are exact JSON.",
        "",
        elsewhere="format",
    ),
    Question(
        "How many examples per task are enough?",
        "Five to ten; one for each task costs 7 to 13 points.",
        "Points that fewer lose to the most that were tried, λ = 0.5.",
        _of_examples,
    ),
    Question(
        "Does `compare` choose well?",
        "Within 1.5 points on definitions and digits, 4 on sentiment.",
        "Points lost to the best fixed choice of each seed, by how the preference was found.",
        _of_comparison,
    ),
    Question(
        "One λ, or numbers by block?",
        "Nothing is gained beyond chance by weights of groups of blocks.",
        "",
        elsewhere="blocks",
    ),
    Question(
        "`top-n` or `algorithm-1`?",
        "`top-n` is ahead on definitions and on digits at T = 5, and not elsewhere.",
        "Lead of `top-n`.",
        _of_selection,
    ),
    Question(
        "What does tuning λ gain over 0.5?",
        "Little, but for `ties` and `agreement`, and at T = 10.",
        "Points gained.",
        _of_tuning,
    ),
    Question(
        "What do training examples of the tasks buy?",
        "Much on definitions, by `regmean`; little or nothing on digits and sentiment.",
        "Lead of `agreement`, which sees none, over each.",
        _of_data,
    ),
    Question(
        "What do int8, int4 and a LoRA rank lose?",
        "int8 and rank 16 nothing, int4 some points, int3 much.",
        "",
        elsewhere="compressed",
    ),
    Question(
        "Which diagnosis predicts failure?",
        "No single one.",
        "",
        elsewhere="diagnosis",
    ),
    Question(
        "Is there a rule under a preference that beats the best rival in hindsight?",
        "No. `agreement`, the candidate, is ahead on digits alone, where it was designed, and behind on "
        "definitions and sentiment. Rules that were tried besides: "
        "[experiments_tried.md](experiments_tried.md).",
        "Lead of `agreement` among methods without training examples.",
        _of_the_best,
    ),
)
