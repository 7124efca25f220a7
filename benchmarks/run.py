"""Time every method against the floor: reading every input byte and writing every output byte.

    python -m benchmarks.run --repeat 1          # 0.25B parameters, in four to seven minutes
    python -m benchmarks.run --size 1b --write   # a table of docs/performance.md
    python -m benchmarks.run --size 1b-1e-4      # with task vectors as small as those of real fine-tunes

What counts is the whole process; the aim for it is a multiple of the floor, and `python -c "import torch"`
in the same run. Warm: files are in the page cache. Cold: they were dropped from it before. The floor is the
median of `--repeat` times before the methods and as many after them, since a disk is not as fast at all
times; the fastest is told as well.
Every warm number is the median of `--repeat` runs after one that may compile; what takes longer than a
minute, and everything cold, is measured once.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks import performance, timing
from benchmarks.families import family_recipe, make_family
from hub_magmax.registry import METHODS as REGISTERED

#: Methods that hold whole matrices and take as long as their decompositions: see `benchmarks.matrices`.
OF_MATRICES = ("tsv", "iso_c", "iso_cts", "cart", "wudi", "actmat", "opcm")
#: `single_task` is left out, which copies what one task has, as `last_task` does; so are those of two models,
#: of which `arcee_fusion` holds whole tensors, and those of data.
_OF_DATA = ("fisher", "regmean", "regmean_plusplus")
_LEFT_OUT = ("single_task", "tunable_magmax", "slerp", "nuslerp", "arcee_fusion", *OF_MATRICES, *_OF_DATA)
#: By title.
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in REGISTERED.built_in if name not in _LEFT_OUT},
    "tunable_magmax, algorithm-1": {"name": "tunable_magmax", "selection": "algorithm-1"},
    "tunable_magmax, top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "ties, scope model": {"name": "ties", "scope": "model"},
    "tunable_magmax, algorithm-1, scope model": {"name": "tunable_magmax", "scope": "model"},
    "tunable_magmax, top-n, scope model": {
        "name": "tunable_magmax",
        "selection": "top-n",
        "scope": "model",
    },
}
#: Of the floor, warm and cold: for methods that read once, for quotas and thresholds, and for quotas of all
#: tensors together.
ONCE, LOOKED_AT, WHOLE_MODEL = (1.5, 1.15), (2.5, 1.3), (3.5, 2.2)
_LOOK = (
    "agreement", "ties", "dare", "dare_ties", "breadcrumbs", "tunable_magmax",
    "multislerp", "karcher", "model_stock",
)  # fmt: skip
NUM_TASKS = 5
#: Of the geometric preference: each task weighs this much of the one before.
RATIO = 0.7
MERGE = (sys.executable, "-m", "hub_magmax", "merge")


def aims(method: Mapping[str, Any]) -> tuple[float, float]:
    """Return how many times the floor a method may take, warm and cold, besides importing torch."""
    if method["name"] == "tunable_magmax" and method.get("scope") == "model":
        return WHOLE_MODEL
    return LOOKED_AT if method["name"] in _LOOK else ONCE


def merge(
    folder: Path,
    method: Mapping[str, Any],
    *,
    command: Sequence[str] = MERGE,
    environment: Mapping[str, str] | None = None,
    shard_size: str = "500MB",
) -> timing.Finished:
    """Merge by a command of its own into `folder / "merged"`, which is removed before."""
    recipe = {
        **family_recipe(NUM_TASKS),
        "method": dict(method),
        "preference": {"geometric": {"ratio": RATIO}},
        "output": {"path": "merged", "shard_size": shard_size},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "merged", ignore_errors=True)
    return timing.run([*command, str(folder / "recipe.yaml"), "--json"], environment)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    bytes_in = sum(path.stat().st_size for path in inputs)
    bytes_out = bytes_in // (NUM_TASKS + 1)

    reading: list[float] = []
    writing: list[float] = []

    def measure_floor() -> None:
        timing.read_all(inputs)  # into the page cache
        for _ in range(options.repeat):
            reading.append(timing.timed(lambda: timing.read_all(inputs)))
            writing.append(timing.timed(lambda: timing.write_plain(folder / "plain", bytes_out)))

    measure_floor()
    starting = timing.start_seconds(sys.executable, options.repeat)
    timing.drop(inputs)
    cold_reading = timing.timed(lambda: timing.read_all(inputs))
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        finished = timing.runs(partial(merge, folder, method), options.repeat)
        timing.drop(inputs)
        cold = merge(folder, method).seconds
        seconds = timing.median_seconds(finished)
        rows.append(
            {
                "method": name,
                "runs": len(finished),
                "seconds": seconds,
                "cold_seconds": cold,
                "peak_memory_bytes": timing.most_memory(finished),
            }
        )
        print(f"{name:<30} {seconds:7.1f} s", file=sys.stderr)
    shutil.rmtree(folder / "merged")
    measure_floor()
    warm = statistics.median(reading) + statistics.median(writing)
    cold_floor = cold_reading + statistics.median(writing)
    for row, method in zip(rows, METHODS.values(), strict=True):
        warm_aim, cold_aim = aims(method)
        row |= {
            "ratio": row["seconds"] / warm,
            "aim_seconds": warm_aim * warm + starting,
            "cold_ratio": row["cold_seconds"] / cold_floor,
            "cold_aim_seconds": cold_aim * cold_floor + starting,
        }
    return timing.facts("run", options) | {
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "floor_seconds": warm,
        "fastest_floor_seconds": min(reading) + min(writing),
        "cold_floor_seconds": cold_floor,
        "import_torch_seconds": starting,
        "rows": rows,
    }


def main() -> None:
    options = timing.parser(__doc__, repeat=3).parse_args()
    with timing.family_folder(options) as folder:
        performance.show("methods", measure(folder, options), write=options.write)


if __name__ == "__main__":
    main()
