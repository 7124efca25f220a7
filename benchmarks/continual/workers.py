"""Work of child processes, in a module that they can import; the main module they cannot."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.continual.pages import store, stored
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import measure
from benchmarks.continual.sources import digits


def measure_digits(folder: Path, num_tasks: int, seed: int, at: str, results: Path) -> str:
    """Make one family of digits, measure it, store its results; for a process of its own."""
    import torch

    torch.set_num_threads(1)
    report = Progress()
    family = digits(folder, num_tasks, seed, report=report)
    before = stored("digits", family.name, results)
    result = measure(family, Protocol(), folder / "scores", at=at, stored=before, report=report)
    store("digits", "--data digits", result, results)
    return family.name


class Progress:
    """Prints lines with the time since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"{time.perf_counter() - self._started:7.1f} s  {line}", file=sys.stderr, flush=True)
