"""The page of one data set: tables beside those of docs/experiments.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.continual.formats import difference, per_cent, pivot, probability, signed, spread
from benchmarks.continual.ranked import ranks, tests_table
from benchmarks.continual.rows import WAYS
from benchmarks.continual.tables import AGREEMENT, OURS, TOP_N
from benchmarks.page_tables import table

#: Points that a comparison's choice may lose to the best fixed choice in hindsight.
TOLERATED = 0.005


def details(data: str, tables: Mapping[str, Any], screening: Path, *, is_own: bool = False) -> str:
    """Return all tables of one data set.

    Args:
        data: Its name.
        tables: From stored results.
        screening: File of what was tried on the way to a method, where there is one.
        is_own: Leave out the claims, which are about the data of this repository.
    """
    parts = [
        _main(tables["main_table"], tables["preference_of"]),
        *(() if is_own else _claims(data, tables["claims"])),
        _tests(tables, next(iter(tables["preference_of"].values()))),
        _screening(screening),
        _regrets(tables["regrets"]),
        _schedules(tables["schedules"]),
        _numbers_of_tasks(tables["numbers_of_tasks"]),
        _sample_sizes(tables["sample_sizes"], tables["estimates"]),
        _selections(tables["selections"]),
    ]
    return "\n".join(part for part in parts if part)


def _claims(data: str, by_number: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the tests of the claims for each number of tasks."""
    for number, rows in by_number.items():
        yield f"### Claims, T = {number}\n\n{tests_table(rows, data)}"


def _main(by_number: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]) -> str:
    """Return tables for each number of tasks: methods by rank, three columns for each preference."""
    parts = []
    for number, rows in by_number.items():
        order = [method for _, _, method in ranks(rows, kinds[number])]
        parts.append(f"### Accuracy, T = {number}\n\n" + _accuracy(rows, order))
        of_worst = [
            {"method": row["method"], "preference": row["preference"]} | row["worst"]
            for row in rows
            if "worst" in row
        ]
        if of_worst:
            title = f"### Accuracy of the worst task, T = {number}\n\n"
            parts.append(title + _accuracy(of_worst, order))
    return "\n".join(parts)


#: At the end of the kind of a preference that is estimated as in the paper, beside ours.
_PUBLISHED = ", published"


# Complex only by count: a comprehension for each axis of the table.
def _accuracy(rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Return a table of rows: methods in an order, after what is no merge."""
    found = {(row["method"], row["preference"]): _cells(row, rows) for row in rows}
    base, *kinds = dict.fromkeys(row["preference"] for row in rows)
    common = [kind for kind in kinds if not kind.endswith(_PUBLISHED)]
    ways = ("λ = 0.5", "λ tuned", "hindsight (λ)")
    nothing = [""] * len(ways)
    # Of what is no merge there is one number, whatever the preference; it stands in the first column.
    body = [
        ["", method, *cells, *nothing * (len(common) - 1)]
        for (method, kind), cells in found.items()
        if kind == base
    ]
    body += [
        [str(rank), method, *chain(*(found.get((method, kind), nothing) for kind in common))]
        for rank, method in enumerate(order, 1)
        if any((method, kind) in found for kind in common)
    ]
    for (method, kind), cells in found.items():
        if kind.endswith(_PUBLISHED):
            before = common.index(kind.removesuffix(_PUBLISHED))
            after = len(common) - 1 - before
            body.append(["", f"{method}, {kind}", *nothing * before, *cells, *nothing * after])
    heads = ["rank", "method", *(f"{kind}: {way}" for kind in common for way in ways)]
    return table(heads, body, left=2)


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row's cells for one number of tasks; the best of each column in bold."""
    cells = []
    for way in WAYS:
        if way not in row:
            cells.append("")
            continue
        shown = spread(row[way])
        top = max(other[way][0] for other in rows if way in other and other["preference"])
        shown = f"**{shown}**" if row[way][0] == top else shown
        cells.append(f"{shown} ({row['hindsight_scaling']:g})" if way == "hindsight" else shown)
    return cells


# Complex only by count: a comprehension for each axis of the table, and cells that may be empty.
def _tests(tables: Mapping[str, Any], kind: str) -> str:
    """Return the tests against rows without a preference, and with the same kind; all of them are stored.

    Of `agreement`, which knows the preference, only those against methods that know it too.
    """
    sides = [(OURS, tables["paired_tests"], "uniform"), (OURS, tables["paired_tests"], kind)]
    sides += [(AGREEMENT, tables["agreement_tests"], kind)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for ours, by_number, own in sides:
        for number, rows in by_number.items():
            for way, shown in (("fixed", "λ = 0.5"), ("tuned", "tuned")):
                found = {row["method"]: _tested(row[way]) for row in rows if row["preference"] == own}
                cells |= {(f"{ours}, {own}", f"T = {number}, {shown}"): found} if found else {}
    if not cells:
        return ""
    methods = dict.fromkeys(method for found in cells.values() for method in found)
    return (
        f"### {OURS} and {AGREEMENT} against every other\n\n"
        f"Points that they are ahead, with {kind}, and the p-value of a paired t-test over the seeds' means, "
        "two-sided, after Holm's correction over all methods and preferences of the column. Heads say with "
        "which preference the other one is. Intervals, effect sizes, and tests against other preferences are "
        "in the stored tables.\n\n"
        + table(
            ["against", *(f"{ahead}: {where}" for ahead, where in cells)],
            [[method, *(found.get(method, "") for found in cells.values())] for method in methods],
        )
    )


def _tested(test: Mapping[str, Any]) -> str:
    if test["holm"] is None:
        return difference(test)
    return f"{signed(test['difference'])} ({probability(test['holm'])})"


def _screening(path: Path) -> str:
    """Return what was tried on the way to `agreement`, where that is stored."""
    if not path.is_file():
        return ""
    stored = json.loads(path.read_text(encoding="utf-8"))
    body = [
        [row["rule"], row["seeds"], *(f"{value:.1f}" for value in row["accuracy"])] for row in stored["rows"]
    ]
    return f"### What lost\n\n{stored['about']}\n\n" + table(
        ["rule", "seeds", "T = 5", "T = 10"], body, left=2
    )


# Complex only by count: a comprehension for each axis of the table, and cells that may be empty.
def _regrets(by_number: Mapping[str, Any]) -> str:
    columns = [(number, kind) for number, kinds in by_number.items() for kind in kinds]
    seeds = sorted({row["seed"] for number, kind in columns for row in by_number[number][kind]["seeds"]})

    def of_seed(number: str, kind: str, seed: int) -> str:
        row = next((r for r in by_number[number][kind]["seeds"] if r["seed"] == seed), None)
        shown = (row["chosen"], row["best"], row["regret"]) if row else ()
        return " / ".join(f"{100 * value:.1f}" for value in shown)

    body = [[f"seed {seed}", *(of_seed(*column, seed) for column in columns)] for seed in seeds]
    body.append(["mean regret", *(f"{100 * by_number[n][k]['regret']:.1f}" for n, k in columns)])
    body.append(
        [
            "to one choice for all seeds",
            *(f"{100 * by_number[n][k]['regret_to_best']:.1f}" for n, k in columns),
        ]
    )
    body.append(["which is", *(_choice(by_number[n][k]["best"]) for n, k in columns)])
    verdicts = {
        kind: ", ".join(
            f"T = {number} {by}: {'yes' if by_number[number][by][kind] <= TOLERATED else 'no'}"
            for number, by in columns
        )
        for kind in ("regret_to_best", "regret")
    }
    return (
        "### What `compare` chooses\n\n"
        "For every target it chooses method, λ, and the estimated or a uniform preference, on the meta "
        "sample. Chosen / best fixed choice for the seed in hindsight / regret. Within "
        f"{100 * TOLERATED:g} point, over the seeds, of the one choice that is best for all of them: "
        f"{verdicts['regret_to_best']}. Of the choice that is best for each seed, which owes some of its "
        f"lead to chance: {verdicts['regret']}.\n\n"
        + table(["", *(f"T = {number}, {kind}" for number, kind in columns)], body)
    )


def _choice(best: Mapping[str, Any]) -> str:
    return f"{best['method']}, {best['preference']}, {best['scaling']:g}"


def _schedules(by_number: Mapping[str, Any]) -> str:
    title = (
        "### First and last task under a geometric schedule\n\n"
        "Accuracy of the first / the last task at λ = 0.5 by the schedule's ratio.\n\n"
    )
    return title + pivot(
        by_number, "ratio", "method", lambda row: f"{per_cent(row['first'])} / {per_cent(row['last'])}"
    )


def _numbers_of_tasks(by_number: Mapping[str, Any]) -> str:
    title = (
        "### Number of tasks in the target\n\n"
        "Accuracy at λ = 0.5 on all test examples of so many tasks, each preferred the same (known, not "
        "estimated).\n\n"
    )
    return title + pivot(by_number, "count", "method", lambda row: per_cent(row["score"]))


def _sample_sizes(by_number: Mapping[str, Any], estimates: Mapping[str, Any]) -> str:
    if not any(by_number.values()):
        return ""
    flat = {
        number: [
            {"size": row["size"], "column": f"{row['kind']}: {name}", "value": per_cent(row[key])}
            for row in rows
            for name, key in [
                ("error", "error"),
                *((k, k) for k in row if k not in ("kind", "size", "error")),
            ]
        ]
        for number, rows in by_number.items()
    }
    errors = "; ".join(
        f"T = {number}: " + ", ".join(f"{kind} {per_cent(error)}" for kind, error in found.items())
        for number, found in estimates.items()
    )
    return (
        "### Examples per task in the target sample\n\n"
        "Error of the estimate (sum of absolute differences from the true shares, per cent) and accuracy at "
        f"λ = 0.5. Errors on the meta samples: {errors}.\n\n"
        + pivot(flat, "size", "column", lambda row: row["value"])
    )


def _selections(by_number: Mapping[str, Any]) -> str:
    flat = {
        number: [row for row in rows if row["preference"] != "uniform"] for number, rows in by_number.items()
    }
    title = "### `algorithm-1` / `top-n` by λ\n\n"
    return title + pivot(
        flat, "scaling", "preference", lambda row: f"{per_cent(row[OURS])} / {per_cent(row[TOP_N])}"
    )
