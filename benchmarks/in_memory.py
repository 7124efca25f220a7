"""Time merges in memory, as `compare`, `sweep` and the search for a preference make them: no file is written.

    python -m benchmarks.in_memory                            # 60 merges of 86M parameters, and 4 before
    python -m benchmarks.in_memory --write                    # a table of docs/performance.md
    python -m benchmarks.in_memory --write --label before     # the column beside which it is shown

A merge is one model: the merged task vector of one method under one preference, scaled and added to the base
model, as tensors in memory. Checkpoints are local files in the page cache. Evaluation is not part of it. The
first merge of each method may compile and does not count. `--merges` takes fewer preferences per method;
the time for 60 merges is then 15 times the mean of each method, and the result says how many were measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import performance, timing
from benchmarks.families import family_recipe, make_family
from benchmarks.run import METHODS, NUM_TASKS

PART = "in_memory"
CHOSEN = ("tunable_magmax, algorithm-1", "tunable_magmax, top-n", "average", "ties")
#: Of geometric preferences, each of which is given to every rotation of the tasks.
RATIOS = (0.9, 0.7, 0.5)
LABELS = ("before", "after")

#: Makes one model: its method, written as in a recipe, and one weight per task.
Merger = Callable[[Mapping[str, Any], tuple[float, ...]], Mapping[str, Any]]


@contextmanager
def open_merger(folder: Path) -> Iterator[Merger]:
    """Open the family below `folder`; nothing else here knows how the package merges in memory."""
    from hub_magmax.merging.in_memory import InMemoryMerger
    from hub_magmax.pipeline import lock
    from hub_magmax.recipe.loading import parse_recipe
    from hub_magmax.recipe.matching import locked_method
    from hub_magmax.recipe.schema import Method

    recipe = parse_recipe(family_recipe(NUM_TASKS), folder=folder)
    with InMemoryMerger(recipe, lock(recipe)) as bench:

        def merge(written: Mapping[str, Any], weights: tuple[float, ...]) -> Mapping[str, Any]:
            method = locked_method(Method.model_validate(written))
            return bench.merge(method, weights).weights(float(method["scaling"]))

        yield merge


def preferences(num_tasks: int) -> list[tuple[float, ...]]:
    """Return the preferences to merge under: each ratio, with each task as the first."""
    found = []
    for ratio in RATIOS:
        total = sum(ratio**task for task in range(num_tasks))
        weights = [ratio**task / total for task in range(num_tasks)]
        found += [tuple(weights[-turn:] + weights[:-turn]) for turn in range(num_tasks)]
    return found


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what every method took, by itself and as its share of 60 merges."""
    timing.read_all(make_family(folder, options.size, num_tasks=NUM_TASKS))  # into the page cache
    asked = preferences(NUM_TASKS)
    rows = []
    with open_merger(folder) as merge:
        for name in CHOSEN:
            merge(METHODS[name], asked[0])
            wall, processor = [], []
            for weights in asked[:: -(-len(asked) // options.merges)]:
                started, used = time.perf_counter(), time.process_time()
                merge(METHODS[name], weights)
                wall.append(time.perf_counter() - started)
                processor.append(time.process_time() - used)
            rows.append(
                {
                    "method": name,
                    "measured": len(wall),
                    "merges": len(asked),
                    "seconds": statistics.fmean(wall),
                    "processor_seconds": statistics.fmean(processor),
                }
            )
            print(f"{name:<30} {rows[-1]['seconds']:7.2f} s a merge", file=sys.stderr)
    return {
        "rows": rows,
        "version": timing.version(timing.ROOT),
        "load": os.getloadavg()[1],  # over the last five minutes
        "machine": timing.machine(),
        "command": f"python -m benchmarks.in_memory --size {options.size} --merges {options.merges} "
        f"--label {options.label}",
    }


def beside(stored: Mapping[str, Any], label: str, measured: Mapping[str, Any], size: str) -> dict[str, Any]:
    """Return a result with `measured` as its column `label`, and the other column as it was stored."""
    facts = timing.model_facts(size)
    return facts | {other: stored[other] for other in LABELS if other in stored} | {label: measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="vit-b16", help="of benchmarks.families; %(default)s")
    parser.add_argument("--merges", type=int, default=15, help="per method, 15 at most; %(default)d")
    parser.add_argument("--label", choices=LABELS, default="after", help="column; %(default)s")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints, and keep them")
    parser.add_argument("--write", action="store_true", help="store the numbers, and write their page")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        measured = measure(folder, options)
    stored = performance.load().get(PART, {}).get(options.size, {})
    performance.show(PART, beside(stored, options.label, measured, options.size), write=options.write)


if __name__ == "__main__":
    main()
