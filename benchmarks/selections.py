"""Measure selections beside whole weights: bytes, bits an element, and time to write and to apply them.

    python -m benchmarks.selections                            # 0.25B parameters, eight tasks: 5.5 GB
    python -m benchmarks.selections --size 250m-2e-5 --write   # a table of docs/selections.md

Each is run `--repeat` times, and the fastest counts. Files are in the page cache. Weights that are made again
are compared with whole ones by their sha256.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import performance, timing
from benchmarks.families import SIZES, family_recipe, make_family
from benchmarks.run import MERGE

NUM_TASKS = 8

METHODS: Mapping[str, Mapping[str, Any]] = {
    "magmax": {"name": "magmax"},
    "tunable_magmax, algorithm-1": {"name": "tunable_magmax"},
    "tunable_magmax, top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "random_mix": {"name": "random_mix"},
}
#: What recipes say of the preference, by what the table calls it.
PREFERENCES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {},
    "one-sided": {"preference": {"geometric": {"ratio": 0.7}}},
}

RESULTS = Path(__file__).parent / "results" / "selections.json"
PAGE = Path(__file__).parents[1] / "docs" / "selections.md"
_HEADING = "## Size and time\n"


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of every method and preference."""
    timing.read_all(make_family(folder, options.size, num_tasks=NUM_TASKS))  # into the page cache
    rows = [
        _row(folder, method, preference, options.repeat)
        for method in options.only or METHODS
        for preference in PREFERENCES
        if preference == "uniform" or method != "magmax"  # which has none
    ]
    only = ["--only", *(f'"{name}"' for name in options.only)] if options.only else []
    return timing.facts("selections", options, *only) | {"tasks": NUM_TASKS, "rows": rows}


def _row(folder: Path, method: str, preference: str, repeat: int) -> dict[str, Any]:
    """Merge to weights and to a selection, make weights of that, and compare."""
    whole, selected, again = (folder / name for name in ("whole", "selected", "again"))
    seconds = {}
    for path, form in ((whole, "weights"), (selected, "selection")):
        recipe = {
            **family_recipe(NUM_TASKS),
            "method": dict(METHODS[method]),
            **PREFERENCES[preference],
            "output": {"path": path.name, "format": form, "shard_size": "500MB"},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        seconds[form] = _fastest([*MERGE, str(folder / "recipe.yaml")], path, repeat)
    command = [*MERGE[:-1], "apply", str(selected), "--out", str(again), "--from", str(folder)]
    seconds["apply"] = _fastest(command, again, repeat)
    elements = json.loads((whole / "merge_report.json").read_text())["elements_merged"]
    num_bytes = _bytes(selected, "*.selection")
    print(f"{method:<30} {preference:<10} {8 * num_bytes / elements:.2f} bits", file=sys.stderr)
    return {
        "method": method,
        "preference": preference,
        "whole_bytes": _bytes(whole, "*.safetensors"),
        "selection_bytes": num_bytes,
        "bits": 8 * num_bytes / elements,
        "whole_seconds": seconds["weights"],
        "selection_seconds": seconds["selection"],
        "apply_seconds": seconds["apply"],
        "same_weights": _hashes(whole) == _hashes(again),
    }


def _fastest(command: list[str], output: Path, repeat: int) -> float:
    """Return the seconds of a command's fastest run, after one that may compile; the last output stays."""

    def run() -> float:
        shutil.rmtree(output, ignore_errors=True)
        return timing.run(command).seconds

    run()
    return min(run() for _ in range(repeat))


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _hashes(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "merge_report.json").read_text())
    return {shard["file"]: shard["sha256"] for shard in report["shards"]}


def section(results: Mapping[str, Any]) -> str:
    """Return the last section of the page, from the results by size."""
    other = [row["method"] for found in results.values() for row in found["rows"] if not row["same_weights"]]
    but = f", but for {', '.join(other)}" if other else ""
    preface = f"""{_HEADING}
Written by `python -m benchmarks.selections --write`. Eight tasks in bfloat16, uniform preference or each task
.7 times the one before; the checkpoints are those of [performance.md](performance.md), and seconds are of
whole processes. Whole weights have 16 bits an element, so a quarter is 4, and log2(8) is 3. Weights that were
made again had the sha256 of the whole ones{but}.
"""
    titles = [
        "method",
        "preference",
        "bits an element",
        "of whole, %",
        "whole: s",
        "selection: s",
        "apply: s",
    ]
    parts = [preface]
    for size in sorted(results, key=[*SIZES].index):
        result = results[size]
        rows = [
            [
                row["method"],
                row["preference"],
                f"{row['bits']:.2f}",
                f"{100 * row['selection_bytes'] / row['whole_bytes']:.1f}",
                *(f"{row[key]:.1f}" for key in ("whole_seconds", "selection_seconds", "apply_seconds")),
            ]
            for row in result["rows"]
        ]
        facts = {**result, "deviation": SIZES[size].deviation}
        parts.append(performance.section(facts, f"{result['tasks']} tasks.", titles, rows))
    return "\n".join(parts)


def page(text: str, results: Mapping[str, Any]) -> str:
    """Return the page with the section of these results in place of the one that it has."""
    return text.partition(_HEADING)[0].rstrip("\n") + "\n\n" + section(results)


def load() -> dict[str, Any]:
    """Return what is stored: results by size."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = timing.parser(__doc__, repeat=1)
    parser.add_argument("--only", nargs="+", choices=METHODS, help="only these methods")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        result = measure(folder, options)
    print(section({options.size: result}))
    if options.write:
        results = load() | {options.size: result}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
