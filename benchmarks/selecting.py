"""Time the rules of `tunable_magmax` alone, on one thread and task vectors in memory.

    python -m benchmarks.selecting           # some seconds
    python -m benchmarks.selecting --write   # a table of docs/performance.md

Task vectors are random, normal, and float32. A rule gets them in chunks, as a merge gives them, and every
number is the median of `--repeat` runs after one that may compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import performance, timing
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.methods.chunks import ArrayChunks, Selection
from hub_magmax.methods.selection import algorithm_1, quotas, top_n

NUM_ELEMENTS = 4_000_000
CHUNK_ELEMENTS = 2**20
RULES: dict[str, Callable[..., Selection]] = {"algorithm-1": algorithm_1, "top-n": top_n}
#: Nanoseconds per element that a rule is to take at most, by number of tasks.
AIMS = {5: 9, 20: 35}


def preferences(num_tasks: int) -> dict[str, list[float]]:
    """Return the preferences that are measured, by name."""
    sided = [0.7**task for task in range(num_tasks)]
    hot = [1 - 0.001 * (num_tasks - 1)] + [0.001] * (num_tasks - 1)
    return {
        "flat": [1 / num_tasks] * num_tasks,
        "one-sided": [weight / sum(sided) for weight in sided],
        "one-hot": hot,
    }


def measure(num_elements: int, options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for num_tasks, aim in AIMS.items():
        values = np.random.default_rng(0).standard_normal((num_tasks, num_elements), np.float32)
        chunks = ArrayChunks(values, CHUNK_ELEMENTS, Compiled())
        for name, rule in RULES.items():
            row: dict[str, Any] = {"rule": name, "tasks": num_tasks, "aim_nanoseconds": aim}
            for preference, weights in preferences(num_tasks).items():
                select = partial(rule, chunks, quotas(weights, num_elements), CounterGenerator(0, "w"))
                select()
                row[preference] = 1e9 * timing.median_timed(select, options.repeat) / num_elements
            rows.append(row)
            print(f"{name} {num_tasks}: {row}", file=sys.stderr)
    command = f"python -m benchmarks.selecting --repeat {options.repeat}"
    return {
        "size": f"{num_elements:,} elements",
        "machine": timing.machine(),
        "command": command,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="store the numbers, and write their page")
    options = parser.parse_args()
    performance.show("selecting", measure(NUM_ELEMENTS, options), write=options.write)


if __name__ == "__main__":
    main()
