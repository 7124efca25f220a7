"""Work of child processes, in a module that they can import; the main module they cannot."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.continual.pages import store, stored
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.results import measure
from benchmarks.continual.sources import Family


@dataclass(frozen=True)
class Job:
    """One family to make and measure, for a process of its own.

    Attributes:
        data: Name that its results are stored under.
        flags: Options that asked for it.
        make: Makes the family, given `report`.
        protocol: How it is measured.
        scores: Folder of pieces that are measured already.
        results: Folder of stored results.
        at: Commit that is noted.
        only: Methods to measure now; all by default.
    """

    data: str
    flags: str
    make: Callable[..., Family]
    protocol: Protocol
    scores: Path
    results: Path
    at: str
    only: tuple[str, ...] = ()


def measure_job(job: Job) -> str:
    """Make a family, measure it with one thread, store its results, and return its name."""
    import torch

    torch.set_num_threads(1)
    report = Progress()
    family = job.make(report=report)
    before = stored(job.data, family.name, job.results)
    result = measure(family, job.protocol, job.scores, at=job.at, stored=before, only=job.only, report=report)
    store(job.data, job.flags, result, job.results)
    return family.name


class Progress:
    """Prints lines with the time since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"{time.perf_counter() - self._started:7.1f} s  {line}", file=sys.stderr, flush=True)
