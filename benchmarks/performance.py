"""Stored measurements of merges, and docs/performance.md and peers.md, which are written from them alone.

    python -m benchmarks.performance   # write the pages again

`python -m benchmarks.run`, `.matrices`, `.sites`, `.peers`, `.processes`, `.selecting`, `.in_memory` and
`.versus` measure. With `--write` each stores its own part for its own size, and the others stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import performance_texts as texts
from benchmarks.families import SIZES
from benchmarks.page_tables import table

Result = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "performance.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PEERS_PAGE = PAGE.with_name("peers.md")


def show(part: str, result: Result, *, write: bool) -> None:
    """Print what was measured; store it and write the pages if asked to."""
    print(_PARTS[part][1](result))
    if write:
        results = load()
        RESULTS.write_text(json.dumps(with_result(results, part, result), indent=2) + "\n")
        write_pages()


def write_pages() -> None:
    for path, text in pages(load()).items():
        path.write_text(text)


def load() -> dict[str, dict[str, Any]]:
    """Return what is stored: results by part and size."""
    stored: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return stored


def with_result(results: Mapping[str, Result], part: str, result: Result) -> dict[str, Any]:
    """Return results with one more, instead of an earlier one of the same part and size."""
    sizes = {**results.get(part, {}), result["size"]: result}
    parts = {
        **results,
        part: {size: sizes[size] for size in dict.fromkeys([*SIZES, *sizes]) if size in sizes},
    }
    return {name: parts[name] for name in _PARTS if name in parts}


def pages(results: Mapping[str, Result]) -> dict[Path, str]:
    """Return the text of each page: another tool's times have one of their own."""
    ours = {part: sizes for part, sizes in results.items() if part != "peers"}
    return {PAGE: page(ours), PEERS_PAGE: page({"peers": results["peers"]}, texts.PEERS_TITLE)}


def page(results: Mapping[str, Result], title: str | None = None) -> str:
    """Return a page of these results, with docs/performance.md's title if none is given."""
    written = [title or texts.TITLE]
    for part, (preface, section) in _PARTS.items():
        if part in results:
            written += [preface, *map(section, results[part].values())]
    return "\n".join(written)


def _methods(result: Result) -> str:
    rows = [
        [
            row["method"],
            row["runs"],
            f"{row['seconds']:.1f}",
            f"{row['aim_seconds']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['cold_seconds']:.1f}",
            f"{row['cold_aim_seconds']:.1f}",
            f"{row['cold_ratio']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    return section(
        result,
        f"500 MB shards: {result['bytes_in'] / 1e9:.1f} GB in, {result['bytes_out'] / 1e9:.2f} GB out. "
        f"`import torch`: {result['import_torch_seconds']:.1f} s. Floor: "
        f"{result['floor_seconds']:.1f} s warm ({result['fastest_floor_seconds']:.1f} at the fastest), "
        f"{result['cold_floor_seconds']:.1f} s cold.",
        [
            *("method", "runs", "warm: s", "aim: s", "times the floor"),
            *("cold: s", "aim: s", "times the floor", "peak memory, MB"),
        ],
        rows,
    )


def _matrices(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["stated_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    kind = (
        f"adapters of rank {result['rank']}, merged to an adapter" if result["rank"] else "whole checkpoints"
    )
    titles = ["method", "s", "processor: s", "peak memory, MB", "stated by `plan`, MB"]
    return section(result, f"{result['tasks']} {kind}.", titles, rows)


def _sites(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['alone_seconds']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["alone_peak_memory_bytes"]),
        ]
        for row in result["rows"]
    ]
    titles = ["method", "together: s", "times the floor", "alone: s", "together: MB", "alone: MB"]
    facts = f"{result['sites']} sites. Floor: {result['floor_seconds']:.1f} s."
    return section(result, facts, titles, rows)


def _peers(result: Result) -> str:
    rows = [
        [
            f"{row['method']} / {row['peer_method']}{' *' if row.get('earlier') else ''}",
            f"{row['seconds']:.1f}",
            f"{row['peer_seconds']:.1f}",
            f"{row['peer_ratio']:.1f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["peer_peak_memory_bytes"]),
            f"{row['runs']} / {row['peer_runs']}",
        ]
        for row in result["rows"]
    ]
    found = result["average_and_linear"]
    return section(
        result,
        f"{result['peer']}, `{result['peer_command']}`. `average` and `linear` differ in "
        f"{100 * found['different_share']:.2g}% of the elements, by {found['most_steps']:.1f} steps of "
        f"{result['dtype']} at most.{_earlier(result)}",
        ["ours / mergekit's", "ours: s", "mergekit: s", "times as long", "ours: MB", "mergekit: MB", "runs"],
        rows,
    )


def _earlier(result: Result) -> str:
    """Return where rows of earlier calls come from; nothing where there are none."""
    commands = dict.fromkeys(row["earlier"] for row in result["rows"] if "earlier" in row)
    if not commands:
        return ""
    named = " and ".join(f"`{command}`" for command in commands)
    return (
        f" Rows with * are of earlier calls ({named}): the machine's speed differs from call to call, so "
        "only numbers of one row compare."
    )


def _processes(result: Result) -> str:
    rows = [
        [
            row["method"],
            f"{row['seconds']:.1f}",
            f"{row['two_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['merging_seconds']:.1f}",
            f"{row['two_merging_seconds']:.1f}",
            f"{row['two_merging_seconds'] / row['merging_seconds']:.2f}",
            _megabytes(row["peak_memory_bytes"]),
            _megabytes(row["two_peak_memory_bytes"]),
            row["same_files"],
        ]
        for row in result["rows"]
    ]
    return section(
        result,
        f"{result['shard_size'].removesuffix('MB')} MB shards.",
        [
            *("method", "one: s", "two: s", "two / one", "one, merging: s", "two, merging: s", "two / one"),
            *("one: MB", "two: MB", "same files"),
        ],
        rows,
    )


def _selecting(result: Result) -> str:
    titles = ["rule", "tasks", "flat: ns", "one-sided: ns", "one-hot: ns", "aim: ns"]
    rows = [
        [
            row["rule"],
            row["tasks"],
            *(f"{row[preference]:.1f}" for preference in ("flat", "one-sided", "one-hot")),
            row["aim_nanoseconds"],
        ]
        for row in result["rows"]
    ]
    facts = f"{result['size']}. {result['machine']}. `{result['command']}`"
    return f"{facts}\n\n{table(titles, rows)}"


# Complex only by count: a comprehension for each axis of the table.
def _in_memory(result: Result) -> str:
    columns = [(label, result[label]) for label in ("before", "after") if label in result]
    titles = [f"{label}: {unit}" for label, _ in columns for unit in ("s a merge", "processor", "measured")]
    rows = [
        [same[0]["method"], *(cell for row in same for cell in _in_memory_cells(row))]
        for same in zip(*(column["rows"] for _, column in columns), strict=True)
    ]
    rows.append(["all", *(cell for _, column in columns for cell in _in_memory_total(column["rows"]))])
    *others, (label, latest) = columns
    said = [f"Before: {_busy(one)} {one['machine']}. `{one['command']}`\n\n" for _, one in others]
    facts = "".join([*said, f"{label.title()}: {_busy(latest)}"])
    return section({**result, **latest}, facts, ["method", *titles], rows)


def _busy(column: Result) -> str:
    """Return the version that was measured, and how many threads wanted a processor meanwhile."""
    return f"{column['version']}, at a load of {column['load']:.1f}."


def _in_memory_cells(row: Result) -> list[str]:
    measured = f"{row['measured']} of {row['merges']}"
    return [f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}", measured]


def _in_memory_total(rows: list[Result]) -> list[str]:
    totals = [sum(row["merges"] * row[key] for row in rows) for key in ("seconds", "processor_seconds")]
    measured = f"{sum(row['measured'] for row in rows)} of {sum(row['merges'] for row in rows)}"
    return [*(f"{total:.0f}" for total in totals), measured]


def _versus(result: Result) -> str:
    rows = [
        [
            row["method"],
            row["runs"],
            *(f"{row[key]:.2f}" for key in ("before_seconds", "after_seconds")),
            _percent(row["after_seconds"], row["before_seconds"]),
            *(f"{row[key]:.2f}" for key in ("before_processor_seconds", "after_processor_seconds")),
            _percent(row["after_processor_seconds"], row["before_processor_seconds"]),
        ]
        for row in result["rows"]
    ]
    titles = ["method", "runs", "before: s", "after: s", "slower", "before: processor", "after", "slower"]
    other = ", ".join(row["method"] for row in result["rows"] if not row["same_weights"])
    weights = f"Weights differ in: {other}." if other else "Weights are the same, by sha256."
    facts = f"Before: {result['before']}; after: {result['after']}. {weights}"
    return section(result, facts, titles, rows)


def _percent(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.1f}%"


def section(result: Result, facts: str, titles: list[str], rows: list[list[Any]]) -> str:
    """Return a heading, what was measured, and a table."""
    model = f"{result['model']}, {result['parameters'] / 1e9:.2f}B parameters in {result['dtype']}"
    if result.get("deviation"):
        model += f", task vectors of deviation {result['deviation']:g}"
    facts += f" {result['machine']}. `{result['command']}`"
    return f"### {model}\n\n{facts}\n\n{table(titles, rows)}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f}"


#: By part: what is said of it, and how a result of it is shown.
_PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "methods": (texts.METHODS, _methods),
    "matrices": (texts.MATRICES, _matrices),
    "sites": (texts.SITES, _sites),
    "peers": (texts.PEERS, _peers),
    "processes": (texts.PROCESSES, _processes),
    "selecting": (texts.SELECTING, _selecting),
    "in_memory": (texts.IN_MEMORY, _in_memory),
    "versus": (texts.VERSUS, _versus),
}


if __name__ == "__main__":
    write_pages()
