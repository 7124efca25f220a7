"""Finished merges in a folder: how much each kept, of which tasks, and the metrics of their pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hub_magmax.errors import OutputError
from hub_magmax.evaluation.assessment import assess
from hub_magmax.evaluation.scores import SCORES_NAME, read_scores
from hub_magmax.files import digest
from hub_magmax.merging.output.report import REPORT_NAME
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, LockedSource, read_lock
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME, read_diagnosis
from hub_magmax.reporting.pair_metrics import METRICS, PairMetrics

#: Metrics that predict: all but the published forms of slips.
_PREDICTING = frozenset(metric.name for metric in METRICS if not metric.is_as_published)


@dataclass(frozen=True)
class FinishedMerge:
    """A merge that was scored.

    Attributes:
        base_model: What its checkpoints were fine-tuned from.
        tasks: In order.
        method: Name, scaling and options.
        kept: Mean over the tasks of the merged model's score over that of the task's own checkpoint.
        metrics: Means over the pairs of its tasks, by name; empty where none were measured.
        rank, num_examples: That the metrics were measured with; 0 without directions, or without models.
    """

    base_model: str
    tasks: tuple[str, ...]
    method: str
    kept: float
    metrics: Mapping[str, float]
    rank: int = 0
    num_examples: int = 0

    def compares(self, found: PairMetrics) -> bool:
        """Say whether metrics that both have were measured alike."""
        pairs = ((self.rank, found.rank), (self.num_examples, found.num_examples))
        return all(own == other or not (own and other) for own, other in pairs)


@dataclass(frozen=True)
class MergeHistory:
    """Merges of a folder.

    Attributes:
        merges: In the order of their folders' names.
        left_out: How many others there are, by what is the matter with them.
    """

    merges: tuple[FinishedMerge, ...]
    left_out: Mapping[str, int]


def read_history(folder: Path) -> MergeHistory:
    """Read the merges in a folder and below it, each with its lock, scores and diagnosis.

    Raises:
        OutputError: If there is no finished merge.
        HubMagmaxError: If a file of one is damaged.
    """
    places = sorted(path.parent for path in folder.rglob(REPORT_NAME))
    if not places:
        raise OutputError(
            f"no finished merge is in it or below it: there is no {REPORT_NAME}",
            where=str(folder),
            hint="Merge and score some pairs of tasks by `hub-magmax run` first, each to a folder below it.",
        )
    merges, left_out = list[FinishedMerge](), Counter[str]()
    for place in places:
        found = _read(place)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            merges.append(found)
    return MergeHistory(tuple(merges), dict(left_out))


def _read(folder: Path) -> FinishedMerge | str:
    """Return a merge, or why it tells nothing."""
    if not (folder / LOCK_NAME).is_file() or not (folder / SCORES_NAME).is_file():
        return "without scores"
    lock = read_lock(folder / LOCK_NAME)
    shares = lock.preference.shares
    if np.ptp([*lock.weights]) > 1e-9:
        return "of unequal weights"
    assessed = assess(read_scores(folder), shares)
    if assessed is None or not shares.keys() <= assessed.kept.keys():
        return "without scores of every task and its own checkpoint, as shares"
    kept = math.fsum(assessed.kept[task] for task in shares) / len(shares)
    known = (base_of(lock), tasks_of(lock), method_label(lock.method), kept)
    place = folder / DIAGNOSIS_NAME
    diagnosis = read_diagnosis(place) if place.is_file() else None
    if diagnosis is None or (found := diagnosis.metrics) is None:
        return FinishedMerge(*known, {})
    return FinishedMerge(*known, mean_metrics(found, diagnosis.tasks), found.rank, found.num_examples)


def mean_metrics(found: PairMetrics, tasks: Sequence[str], chosen: Sequence[str] = ()) -> dict[str, float]:
    """Return every metric that predicts, its mean over the pairs of tasks, by default of all."""
    wanted = {*chosen} or {*tasks}
    pairs = [metrics for pair, metrics in found.pairs(tasks).items() if wanted.issuperset(pair)]
    return {
        name: math.fsum(metrics[name] for metrics in pairs) / len(pairs)
        for name in (pairs[0] if pairs else ())
        if name in _PREDICTING
    }


def tasks_of(lock: Lock) -> tuple[str, ...]:
    """Return what tasks are known by: their names, and the hashes of their weights where these are known."""
    return tuple(f"{name} {_identity(source)}".rstrip() for name, source in lock.tasks.items())


def base_of(lock: Lock) -> str:
    """Return what a base model is known by.

    These are the hashes of its weights; where a lock pins headers alone, the last part of its path,
    its commit, and the sizes and headers of its files.
    """
    base = lock.base_model
    files = [[file.size_bytes, file.header_sha256] for file in base.files]
    return _identity(base) or f"{Path(base.reference).name} {_short([base.commit, base.part, files])}"


def _identity(source: LockedSource) -> str:
    """Return a digest of the hashes of weight files; nothing where the lock pins their headers alone."""
    hashes = [file.sha256 for file in source.files]
    return _short(hashes) if all(hashes) else ""


def _short(values: Sequence[Any]) -> str:
    return digest(values).removeprefix("sha256:")[:12]


def method_label(method: Mapping[str, Any]) -> str:
    """Return a method with its scaling and options in a line."""
    options = {key: value for key, value in method.items() if key != "name"}
    return " ".join([str(method["name"]), *(f"{key}={value}" for key, value in sorted(options.items()))])
