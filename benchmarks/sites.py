"""Time a run for many sites from one read, beside as many runs alone and reading and writing plainly.

    python -m benchmarks.sites                     # 30 sites, 0.25B parameters: 15 GB on the disk
    python -m benchmarks.sites --sites 8 --write   # a table of docs/performance.md

The floor is reading every input byte once and writing the outputs of all sites. A merge alone is measured
`--repeat` times, and counted once for each site. Files are in the page cache, after a run that may compile.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import performance, timing
from benchmarks.families import family_recipe, make_family
from benchmarks.run import MERGE, NUM_TASKS

METHODS: Mapping[str, Mapping[str, Any]] = {
    "average": {"name": "average"},
    "magmax": {"name": "magmax"},
    "tunable_magmax, algorithm-1": {"name": "tunable_magmax"},
    "tunable_magmax, top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "ties": {"name": "ties"},
}
_RUN = (*MERGE[:-1], "run")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    num_bytes = sum(path.stat().st_size for path in inputs) // (NUM_TASKS + 1)
    timing.read_all(inputs)  # into the page cache
    reading = timing.median_timed(lambda: timing.read_all(inputs), options.repeat)
    writing = timing.median_timed(lambda: timing.write_plain(folder / "plain", num_bytes), options.sites)
    floor = reading + options.sites * writing
    rows = []
    for name in options.only or METHODS:
        alone = timing.runs(lambda name=name: _run(folder, METHODS[name], 1), options.repeat)
        together = _run(folder, METHODS[name], options.sites)
        rows.append(
            {
                "method": name,
                "seconds": together.seconds,
                "peak_memory_bytes": together.peak_memory_bytes,
                "alone_seconds": options.sites * timing.median_seconds(alone),
                "alone_peak_memory_bytes": timing.most_memory(alone),
                "ratio": together.seconds / floor,
            }
        )
        print(f"{name:<30} {together.seconds:7.1f} s", file=sys.stderr)
    shutil.rmtree(folder / "sites")
    only = ["--only", *(f'"{name}"' for name in options.only)] if options.only else []
    facts = timing.facts("sites", options, "--sites", str(options.sites), *only)
    return facts | {"sites": options.sites, "floor_seconds": floor, "rows": rows}


def _run(folder: Path, method: Mapping[str, Any], count: int) -> timing.Finished:
    """Run a recipe with so many sites, each with weights of its own."""
    ratios = [0.5 + number / count for number in range(count)]
    recipe = {
        **family_recipe(NUM_TASKS),
        "method": dict(method),
        "output": {"path": "sites", "shard_size": "500MB"},
        "sites": {
            f"s{n}": {"preference": {"geometric": {"ratio": ratio}}} for n, ratio in enumerate(ratios, 1)
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "sites", ignore_errors=True)
    return timing.run([*_RUN, str(folder / "recipe.yaml"), "--json"])


def main() -> None:
    parser = timing.parser(__doc__, repeat=1)
    parser.add_argument("--sites", type=int, default=30, help="how many")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="only these methods")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        performance.show("sites", measure(folder, options), write=options.write)


if __name__ == "__main__":
    main()
