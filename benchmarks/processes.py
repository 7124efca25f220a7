"""Time one process against two that `accelerate launch` starts, and compare the bytes that they write.

    python -m benchmarks.processes                     # 0.25B parameters
    python -m benchmarks.processes --size 1b --write   # a table of docs/performance.md

Each process has one thread (OMP_NUM_THREADS=1). Files are in the page cache, every number is the median of
`--repeat` runs after one that may compile. What launching costs (accelerate, and torch in the launcher before
it is in the processes) counts; the merge alone is told as well, as the last run's report has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import performance, timing
from benchmarks.families import make_family
from benchmarks.run import METHODS, NUM_TASKS, merge
from hub_magmax.files import sha256_of

CHOSEN = ("average", "tunable_magmax, algorithm-1", "tunable_magmax, top-n")
#: Small enough for two processes to share the files of a small model fairly.
SHARD_SIZE = "100MB"
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    *("-m", "hub_magmax", "merge"),
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_ON_CPU = {**_ONE_THREAD, "ACCELERATE_USE_CPU": "1"}
#: It tells times, memory and the number of processes.
_DIFFERS = "merge_report.json"


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a merged model that must not depend on who made it, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != _DIFFERS}


def merging_seconds(folder: Path) -> float:
    """Return how long the first process of a merge merged."""
    return float(json.loads((folder / _DIFFERS).read_text())["seconds"])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    timing.read_all(inputs)  # into the page cache
    rows = []
    for name in CHOSEN:
        merging = partial(merge, folder, METHODS[name], shard_size=SHARD_SIZE)
        one = timing.runs(partial(merging, environment=_ONE_THREAD), options.repeat)
        expected, alone = digests(folder / "merged"), merging_seconds(folder / "merged")
        two = timing.runs(partial(merging, command=LAUNCH, environment=_ON_CPU), options.repeat)
        assert digests(folder / "merged") == expected, f"{name}: two processes wrote other bytes than one"
        seconds, two_seconds = timing.median_seconds(one), timing.median_seconds(two)
        rows.append(
            {
                "method": name,
                "runs": len(one),
                "seconds": seconds,
                "two_runs": len(two),
                "two_seconds": two_seconds,
                "ratio": two_seconds / seconds,
                "merging_seconds": alone,
                "two_merging_seconds": merging_seconds(folder / "merged"),
                "same_files": len(expected),
                "peak_memory_bytes": timing.most_memory(one),
                "two_peak_memory_bytes": timing.most_memory(two),
            }
        )
        print(f"{name:<30} {seconds:7.1f} s, two processes {two_seconds:7.1f} s", file=sys.stderr)
    shutil.rmtree(folder / "merged")
    return timing.facts("processes", options) | {"shard_size": SHARD_SIZE, "rows": rows}


def main() -> None:
    options = timing.parser(__doc__, repeat=3).parse_args()
    with timing.family_folder(options) as folder:
        performance.show("processes", measure(folder, options), write=options.write)


if __name__ == "__main__":
    main()
