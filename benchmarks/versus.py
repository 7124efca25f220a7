"""Time every method in two checkouts of this repository, run alternately on the same files.

    python -m benchmarks.versus CHECKOUT           # CHECKOUT is before, this one is after; 0.25B parameters
    python -m benchmarks.versus CHECKOUT --write   # a table of docs/performance.md

Both run on this Python, with the package of their own folder. Files are in the page cache. The first run of
each checkout may compile and does not count; `--repeat` pairs follow, and medians are told. Merged models
are compared, and the result names the methods whose weights differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import performance, timing
from benchmarks.families import make_family
from benchmarks.processes import digests
from benchmarks.run import METHODS, NUM_TASKS, merge

#: `-P`: this folder, from which the benchmark runs, must not come before that of the checkout.
COMMAND = (sys.executable, "-P", "-m", "hub_magmax", "merge")


def package_of(checkout: Path) -> dict[str, str]:
    """Return the environment in which Python imports the package of `checkout`.

    Raises:
        SystemExit: If another one would be imported.
    """
    environment = {"PYTHONPATH": str(checkout)}
    code = "import hub_magmax; print(hub_magmax.__file__)"
    found = timing.run([sys.executable, "-P", "-c", code], environment).output.strip()
    if not Path(found).is_relative_to(checkout):
        sys.exit(f"{checkout} holds no package hub_magmax")
    return environment


def pairs(folder: Path, name: str, environments: Iterable[dict[str, str]], repeat: int) -> dict[str, Any]:
    """Return what one method took in both checkouts."""
    finished: dict[str, list[timing.Finished]] = {"before": [], "after": []}
    weights: dict[str, dict[str, str]] = {}
    turns = list(zip(finished, environments, strict=True))
    for number in range(repeat + 1):
        for label, environment in turns[:: (-1) ** number]:  # each is first as often as second
            done = merge(folder, METHODS[name], command=COMMAND, environment=environment)
            if number:
                finished[label].append(done)
            else:
                found = digests(folder / "merged")
                weights[label] = {file: found[file] for file in found if file.endswith(".safetensors")}
    row: dict[str, Any] = {"method": name, "runs": repeat}
    row["same_weights"] = weights["before"] == weights["after"]
    for label, runs in finished.items():
        row[f"{label}_seconds"] = timing.median_seconds(runs)
        row[f"{label}_processor_seconds"] = statistics.median(run.processor_seconds for run in runs)
    return row


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return one row per method."""
    checkouts = (options.other.resolve(), timing.ROOT)
    environments = [package_of(checkout) for checkout in checkouts]
    timing.read_all(make_family(folder, options.size, num_tasks=NUM_TASKS))  # into the page cache
    rows = []
    for name in options.methods or METHODS:
        rows.append(pairs(folder, name, environments, options.repeat))
        print(
            f"{name:<42} {rows[-1]['before_seconds']:7.2f} s, then {rows[-1]['after_seconds']:7.2f} s",
            file=sys.stderr,
        )
    before, after = map(timing.version, checkouts)
    chosen = ["--methods", *(f'"{name}"' for name in options.methods)] if options.methods else []
    facts = timing.facts("versus", options, "CHECKOUT", *chosen)
    return facts | {"before": before, "after": after, "rows": rows}


def main() -> None:
    parser = timing.parser(__doc__, repeat=5)
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="folder of the version before")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        performance.show("versus", measure(folder, options), write=options.write)


if __name__ == "__main__":
    main()
