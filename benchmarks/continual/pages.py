"""The page of the experiments, written from stored results alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.continual.page_texts import HEAD, INTRODUCTION, OTHERS, OWN_HEAD
from benchmarks.continual.tables import AGREEMENT, CLAIMED, OURS, TOP_N, WAYS, make_tables
from hub_magmax.files import write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"

#: Below this a difference counts.
LEVEL = 0.01

#: Points that a comparison's choice may lose to the best fixed choice in hindsight.
TOLERATED = 0.005


def store(data: str, flags: str, result: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """Store one family's results, with the options that asked for them, and return where."""
    path = results / data / f"{result['family']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _lines({"flags": flags, **result}))
    return path


def stored(data: str, family: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """Return one family's stored results, None where there are none."""
    path = results / data / f"{family}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(values: Mapping[str, Any]) -> str:
    """Return JSON with one line per item of a list of mappings, so that a change shows where it is."""
    lines = (f"{json.dumps(key)}: {_value(value)}" for key, value in values.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _value(value: Any) -> str:
    items = value if isinstance(value, list) and value and isinstance(value[0], dict) else ()
    return "[\n" + ",\n".join(map(json.dumps, items)) + "\n]" if items else json.dumps(value)


def render(results: Path = RESULTS, page: Path = PAGE) -> str:
    """Write the tables beside the stored results, and the page; return the page's text.

    A page beside its results, which are then a user's own, says nothing about the data of this repository.
    """
    is_own = page.parent == results
    text = (OWN_HEAD if is_own else HEAD) + INTRODUCTION
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        families = [json.loads(path.read_text()) for path in sorted(folder.glob("t[0-9]*s[0-9]*.json"))]
        tables = make_tables(sorted(families, key=lambda family: (family["num_tasks"], family["seed"])))
        write_text(folder / "tables.json", json.dumps(tables, indent=1) + "\n")
        text += _section(folder.name, families, tables)
    text += "" if is_own else OTHERS
    write_text(page, text)
    return text


def _section(data: str, families: Sequence[Mapping[str, Any]], tables: Mapping[str, Any]) -> str:
    numbers = list(tables["main_table"])
    parts = [
        f"\n## {data}\n\n{_provenance(families)}",
        _verdicts(tables),
        _main(tables["main_table"]),
        _tests(tables, next(iter(tables["regrets"][numbers[0]]))),
        _screening(data),
        _regrets(tables["regrets"]),
        _schedules(tables["schedules"]),
        _numbers_of_tasks(tables["numbers_of_tasks"]),
        _sample_sizes(tables["sample_sizes"], tables["estimates"]),
        _selections(tables["selections"]),
    ]
    return "\n".join(part for part in parts if part)


def _provenance(families: Sequence[Mapping[str, Any]]) -> str:  # flat: a set for each fact
    seeds = sorted({family["seed"] for family in families})
    numbers = sorted({family["num_tasks"] for family in families})
    flags = families[0]["flags"]
    if not flags.startswith("--checkpoints"):  # which say both
        flags += f" --seeds {len(seeds)} --tasks {' '.join(map(str, numbers))}"
    commits = sorted({commit for family in families for commit in family["commits"]})
    machines = sorted({family["machine"] for family in families})
    targets = [target for family in families for target in family["targets"]]
    meta, held = (sorted(target[key] for target in targets) for key in ("meta", "held_out"))
    seeing = f"; transport sees {families[0]['num_train']} training examples over all tasks"
    seen = {
        family["num_tasks"]: family["num_statistics"] for family in families if "num_statistics" in family
    }
    of_each = "".join(f", {count} at T = {number}" for number, count in sorted(seen.items()))
    return (
        f"`python -m benchmarks.continual {flags}`, commit {', '.join(commits)}, {'; '.join(machines)}. "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {len(families[0]['targets'])} targets each; meta "
        f"samples of {meta[0]} to {meta[-1]} examples, {held[0]} to {held[-1]} scored"
        f"{seeing if families[0]['num_train'] else ''}"
        f"{'; statistics of training examples of each task' + of_each if of_each else ''}.\n"
    )


def _verdicts(tables: Mapping[str, Any]) -> str:  # flat: a line for each number of tasks
    """Say what holds of what is claimed, and where methods with the same preference stand."""
    lines, tests = [], [row["fixed"]["t_test"] for rows in tables["paired_tests"].values() for row in rows]
    single = all(test is None for test in tests)
    for number, rows in tables["paired_tests"].items():
        kind = next(iter(tables["regrets"][number]))
        for way, shown in (("fixed", "λ = 0.5"), ("tuned", "λ tuned")):
            claimed = [row for row in rows if (row["method"], row["preference"]) in CLAIMED]
            rivals = [row for row in rows if row["preference"] == kind]
            lines.append(
                f"- T = {number}, {shown}. Without preference: {_standing(claimed, way)}. "
                f"With {kind}: {_standing(rivals, way)}."
            )
    return (
        f"{OURS} against others. It beats what it is ahead of with p < {LEVEL} in both tests below, and is "
        "beaten likewise"
        + ("; with one seed there is no second test, and nothing is decided" if single else "")
        + ".\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _standing(rows: Sequence[Mapping[str, Any]], way: str) -> str:
    sides: dict[str, list[str]] = {"beats": [], "undecided": [], "beaten by": []}
    for row in rows:
        test = row[way]
        sure = all(test[kind] is not None and test[kind] < LEVEL for kind in ("wilcoxon", "t_test"))
        side = "undecided" if not sure else "beats" if test["difference"] > 0 else "beaten by"
        sides[side].append(row["method"])
    return "; ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)


# Complex only by count: a comprehension for each axis of the table, and cells that may be empty.
def _main(by_number: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table for each number of tasks: a row for each method, three columns for each preference."""
    return "\n".join(
        f"### Accuracy, T = {number}\n\n" + _accuracy(rows) for number, rows in by_number.items()
    )


#: At the end of the kind of a preference that is estimated as in the paper, beside ours.
_PUBLISHED = ", published"


# Complex only by count: a comprehension for each axis of the table.
def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    found = {(row["method"], row["preference"]): _cells(row, rows) for row in rows}
    base, *kinds = dict.fromkeys(row["preference"] for row in rows)
    common = [kind for kind in kinds if not kind.endswith(_PUBLISHED)]
    ways = ("λ = 0.5", "λ tuned", "hindsight (λ)")
    nothing = [""] * len(ways)
    # Of the base model there is one number, whatever the preference; it stands in the first column.
    body = [
        [method, *chain(*(found.get((method, kind), nothing) for kind in common))]
        for method in dict.fromkeys(row["method"] for row in rows[1:])
    ]
    body.insert(0, ["base model", *found["base model", base], *nothing * (len(common) - 1)])
    for (method, kind), cells in found.items():
        if kind.endswith(_PUBLISHED):
            before = common.index(kind.removesuffix(_PUBLISHED))
            after = len(common) - 1 - before
            body.append([f"{method}, {kind}", *nothing * before, *cells, *nothing * after])
    return _table(["method", *(f"{kind}: {way}" for kind in common for way in ways)], body)


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row's cells for one number of tasks; the best of each column in bold."""
    cells = []
    for way in WAYS:
        if way not in row:
            cells.append("")
            continue
        shown = " ± ".join(f"{100 * value:.1f}" for value in row[way])
        top = max(other[way][0] for other in rows if way in other)
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
                found = {row["method"]: _difference(row[way]) for row in rows if row["preference"] == own}
                cells |= {(f"{ours}, {own}", f"T = {number}, {shown}"): found} if found else {}
    if not cells:
        return ""
    methods = dict.fromkeys(method for found in cells.values() for method in found)
    return (
        f"### {OURS} and {AGREEMENT} against every other\n\n"
        f"Points that they are ahead, with {kind} (p of Wilcoxon's signed ranks over all targets; p of a "
        "paired t-test over the seeds' means). Targets of one seed share checkpoints, so the first test "
        "takes for independent what is not quite; the second does not, and has one value per seed. "
        "Two-sided, not corrected for their number. Heads say with which preference the other one is. Those "
        "with other preferences are in the stored tables.\n\n"
        + _table(
            ["against", *(f"{ahead}: {where}" for ahead, where in cells)],
            [[method, *(found.get(method, "") for found in cells.values())] for method in methods],
        )
    )


def _difference(test: Mapping[str, Any]) -> str:
    return f"{100 * test['difference']:+.1f} ({_p(test['wilcoxon'])}; {_p(test['t_test'])})"


def _p(value: float | None) -> str:
    if value is None:
        return "one seed"
    return f"{value:.2g}" if value >= 1e-4 else "<1e-4"


def _screening(data: str) -> str:
    """Return what was tried on the way to `agreement`, where that is stored."""
    path = RESULTS / f"{data}-screening.json"
    if not path.is_file():
        return ""
    stored = json.loads(path.read_text(encoding="utf-8"))
    body = [
        [row["rule"], row["seeds"], *(f"{value:.1f}" for value in row["accuracy"])] for row in stored["rows"]
    ]
    return f"### What lost\n\n{stored['about']}\n\n" + _table(
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
        + _table(["", *(f"T = {number}, {kind}" for number, kind in columns)], body)
    )


def _choice(best: Mapping[str, Any]) -> str:
    return f"{best['method']}, {best['preference']}, {best['scaling']:g}"


def _schedules(by_number: Mapping[str, Any]) -> str:
    title = (
        "### First and last task under a geometric schedule\n\n"
        "Accuracy of the first / the last task at λ = 0.5 by the schedule's ratio.\n\n"
    )
    return title + _pivot(
        by_number, "ratio", "method", lambda row: f"{_pc(row['first'])} / {_pc(row['last'])}"
    )


def _numbers_of_tasks(by_number: Mapping[str, Any]) -> str:
    title = (
        "### Number of tasks in the target\n\n"
        "Accuracy at λ = 0.5 on all test examples of so many tasks, each preferred the same (known, not "
        "estimated).\n\n"
    )
    return title + _pivot(by_number, "count", "method", lambda row: _pc(row["score"]))


def _sample_sizes(by_number: Mapping[str, Any], estimates: Mapping[str, Any]) -> str:
    if not any(by_number.values()):
        return ""
    flat = {
        number: [
            {"size": row["size"], "column": f"{row['kind']}: {name}", "value": _pc(row[key])}
            for row in rows
            for name, key in [
                ("error", "error"),
                *((k, k) for k in row if k not in ("kind", "size", "error")),
            ]
        ]
        for number, rows in by_number.items()
    }
    errors = "; ".join(
        f"T = {number}: " + ", ".join(f"{kind} {_pc(error)}" for kind, error in found.items())
        for number, found in estimates.items()
    )
    return (
        "### Examples per task in the target sample\n\n"
        "Error of the estimate (sum of absolute differences from the true shares, per cent) and accuracy at "
        f"λ = 0.5. Errors on the meta samples: {errors}.\n\n"
        + _pivot(flat, "size", "column", lambda row: row["value"])
    )


def _selections(by_number: Mapping[str, Any]) -> str:
    flat = {
        number: [row for row in rows if row["preference"] != "uniform"] for number, rows in by_number.items()
    }
    title = "### `algorithm-1` / `top-n` by λ\n\n"
    return title + _pivot(flat, "scaling", "preference", lambda row: f"{_pc(row[OURS])} / {_pc(row[TOP_N])}")


def _pivot(by_number: Mapping[str, Sequence[Mapping[str, Any]]], down: str, across: str, cell: Any) -> str:
    """Return a table: rows by `down`, columns by number of tasks and `across`."""
    columns = list(dict.fromkeys((number, row[across]) for number, rows in by_number.items() for row in rows))
    cells = {
        (number, row[across], row[down]): cell(row) for number, rows in by_number.items() for row in rows
    }
    values = sorted({key[2] for key in cells})
    body = [[f"{value:g}", *(cells.get((*column, value), "") for column in columns)] for value in values]
    return _table([down, *(f"T = {number}, {name}" for number, name in columns)], body)


def _pc(value: float) -> str:
    return f"{100 * value:.1f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * left + "---:|" * (len(heads) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
