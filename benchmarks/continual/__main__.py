"""Learn tasks one after the other, merge them for targets that mix a few, and measure every method.

    python -m benchmarks.continual             the digits: five seeds, 5 and 10 tasks, the page written
    python -m benchmarks.continual --render    the page again, from the stored results

What is finished is kept, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import commit


def measure_digits(folder: Path, num_tasks: int, seed: int, at: str) -> tuple[int, int]:
    """Make one family of digits, measure it, store its results; for a process of its own."""
    import torch

    from benchmarks.continual.pages import store
    from benchmarks.continual.results import measure
    from benchmarks.continual.sources import digits

    torch.set_num_threads(1)
    started = time.perf_counter()

    def report(line: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {line}", file=sys.stderr, flush=True)

    family = digits(folder, num_tasks, seed, report=report)
    store("digits", measure(family, Protocol(), folder / "scores", at=at, report=report))
    return num_tasks, seed


def _all_digits(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    at = commit()
    jobs = [
        (options.folder, num_tasks, seed, at) for seed in range(options.seeds) for num_tasks in options.tasks
    ]
    if options.workers == 1:
        yield from (measure_digits(*job) for job in jobs)
        return
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        yield from pool.map(measure_digits, *zip(*jobs, strict=True))


def main() -> None:
    from benchmarks.continual.pages import render

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=("digits",), default="digits")
    parser.add_argument("--folder", type=Path, default=Path("experiments"), help="checkpoints and outcomes")
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 10], help="numbers of tasks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--render", action="store_true", help="write the page from the stored results alone")
    options = parser.parse_args()
    if not options.render:
        for num_tasks, seed in _all_digits(options):
            print(f"{num_tasks} tasks, seed {seed}: stored", flush=True)
    print(render())


if __name__ == "__main__":
    main()
