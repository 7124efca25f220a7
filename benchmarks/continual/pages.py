"""The pages of the experiments, written from stored results alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.continual.claims import CONFIRMED_ON
from benchmarks.continual.details import details
from benchmarks.continual.figures import draw
from benchmarks.continual.page_texts import (
    CLAIMS,
    COLUMNS,
    HEAD,
    OWN_HEAD,
    OWN_QUESTIONS,
    PROTOCOL,
    QUESTIONS,
    QUICK,
    RANKED,
)
from benchmarks.continual.questions import answers
from benchmarks.continual.ranked import claims_table, ranked_table
from benchmarks.continual.rows import Results
from benchmarks.continual.tables import make_tables
from hub_magmax.files import write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"

#: Files of stored results, in the folder of a data set.
FAMILY_FILES = "t[0-9]*s[0-9]*.json"

#: Folder beside a page.
PICTURES = "pictures"


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


def _tables_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return JSON with one line per row of each table."""
    parts = (f"{json.dumps(name)}: {_lines(by_number).rstrip()}" for name, by_number in tables.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def render(results: Path = RESULTS, page: Path = PAGE) -> str:
    """Write the tables beside the stored results, the page, and one for each data set; return the page.

    A page beside its results, which are then a user's own, says nothing about the data of this repository.
    """
    is_own = page.parent == results
    folders = sorted(path for path in results.iterdir() if path.is_dir() and any(path.glob(FAMILY_FILES)))
    found = {folder.name: _families(folder) for folder in folders}
    tables = {data: make_tables(families) for data, families in found.items()}
    text = (OWN_HEAD if is_own else HEAD) + PROTOCOL + _front(found, tables, is_own=is_own)
    for data, families in found.items():
        write_text(results / data / "tables.json", _tables_text(tables[data]))
        rest = page.with_name(f"{page.stem}_{data}{page.suffix}")
        screening = results / f"{data}-screening.json"
        write_text(rest, _rest(data, page, families, details(data, tables[data], screening, is_own=is_own)))
        text += _section(data, families, tables[data], rest.name)
        by_number = {number: _of_number(families, number) for number in tables[data]["main_table"]}
        pictures = draw(by_number, page.parent / PICTURES, rest.stem)
        text += "".join(f"\n![{title}]({PICTURES}/{file})\n" for file, title in pictures)
    write_text(page, text)
    return text


def _front(found: Mapping[str, Results], tables: Mapping[str, Mapping[str, Any]], *, is_own: bool) -> str:
    """Return claims, but for own data, and questions: a column for each data set and number of tasks."""
    parts = {
        (data, number): (_of_number(found[data], number), {name: of[number] for name, of in own.items()})
        for data, own in tables.items()
        for number in own["main_table"]
    }
    questions = (OWN_QUESTIONS if is_own else QUESTIONS) + answers(parts, is_own=is_own) + RANKED
    if is_own:
        return questions
    claims = claims_table({part: own for part, (_, own) in parts.items()})
    return CLAIMS.format(tests=tests_of(found)) + claims + questions + QUICK


def tests_of(found: Collection[str]) -> str:
    """Say on which data sets the claims are tested, and on which they are to be: those without results."""
    tested = " and ".join(data for data in CONFIRMED_ON if data in found)
    to_test = " and ".join(data for data in CONFIRMED_ON if data not in found)
    said = [f"Tested on {tested}."] if tested else []
    said += [f"To be tested on {to_test}: no results are stored."] if to_test else []
    return " ".join(said)


def _rest(data: str, page: Path, families: Results, tables: str) -> str:
    """Return the page of one data set."""
    head = f"# Experiments: {data}\n\nBeside [{page.name}]({page.name}), and written like it.\n"
    return f"{head}{COLUMNS}\n{_provenance(families)}\n{tables}"


def _families(folder: Path) -> list[dict[str, Any]]:
    """Return the stored results of one data set, by number of tasks and seed."""
    families = [json.loads(path.read_text()) for path in folder.glob(FAMILY_FILES)]
    return sorted(families, key=lambda family: (family["num_tasks"], family["seed"]))


def _of_number(families: Results, number: str) -> Results:
    return [family for family in families if family["num_tasks"] == int(number)]


def _section(data: str, families: Results, tables: Mapping[str, Any], rest: str) -> str:
    parts = [f"\n## {data}\n\n{command_of(families)} {_extent(families)}. All else is in [{rest}]({rest}).\n"]
    for number, rows in tables["main_table"].items():
        ranked = ranked_table(rows, tables["preference_of"][number], best_only=True)
        parts.append(f"### {data}, T = {number}\n\n{ranked}")
    return "\n".join(parts)


def command_of(families: Results) -> str:
    """Return the command that measures a data set; several where its seeds do not follow each other."""
    flags = re.sub(r" --first-seed \d+", "", families[0]["flags"])
    if flags.startswith("--checkpoints"):  # which say seeds and tasks
        return f"`python -m benchmarks.continual {flags}`."
    sources = " --encoder MINILM --source SOURCE" if "sources" in families[0] else ""
    commands = []
    for seeds, numbers in _runs(families):
        first = f" --first-seed {seeds[0]}" if seeds[0] else ""
        rest = f" --seeds {len(seeds)} --tasks {' '.join(map(str, numbers))}{sources}"
        commands.append(f"`python -m benchmarks.continual {flags}{first}{rest}`")
    return f"{', '.join(commands)}."


def _runs(families: Results) -> list[tuple[list[int], list[int]]]:
    """Return seeds that follow each other and have the same numbers of tasks, with these numbers."""
    numbers: dict[int, list[int]] = {}
    for family in sorted(families, key=lambda family: (family["seed"], family["num_tasks"])):
        numbers.setdefault(family["seed"], []).append(family["num_tasks"])
    runs: list[tuple[list[int], list[int]]] = []
    for seed, own in numbers.items():
        if runs and runs[-1] == ([*range(seed - len(runs[-1][0]), seed)], own):
            runs[-1][0].append(seed)
        else:
            runs.append(([seed], own))
    return runs


def _extent(families: Results) -> str:
    """Return how many seeds and targets a data set has."""
    num_seeds = len({family["seed"] for family in families})
    return f"{num_seeds} seed{'s' if num_seeds > 1 else ''}, {len(families[0]['targets'])} targets each"


# Complex only by count: a set for each fact.
def _provenance(families: Results) -> str:
    commits = sorted({commit for family in families for commit in family["commits"]})
    machines = sorted({family["machine"] for family in families})
    targets = [target for family in families for target in family["targets"]]
    meta, held = (_range([target[key] for target in targets]) for key in ("meta", "held_out"))
    seeing = f"; transport sees {families[0]['num_train']} training examples over all tasks"
    seen = {
        family["num_tasks"]: family["num_statistics"] for family in families if "num_statistics" in family
    }
    sources = "".join(
        f"; {name}, SHA-256 {found[:16]}" for name, found in families[0].get("sources", {}).items()
    )
    of_each = "".join(f", {count} at T = {number}" for number, count in sorted(seen.items()))
    return (
        f"{command_of(families)} Commit {', '.join(commits)}, {'; '.join(machines)}. {_extent(families)}; "
        f"meta samples of {meta} examples, {held} scored"
        f"{seeing if families[0]['num_train'] else ''}"
        f"{'; statistics of training examples of each task' + of_each if of_each else ''}{sources}.\n"
    )


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"
