"""Scores of each task of a target, from which the accuracy of its worst task follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.continual.protocol import Target


def parts_of(owners: np.ndarray, targets: Sequence[Target], base: Sequence[float]) -> dict[str, Any]:
    """Return, by target and task in it, how many examples are held out, and the base model's scores on them.

    Stored results without these numbers are still of the same checkpoints and targets.

    Args:
        owners: Number of the task of every test example.
        targets: Mixtures of test examples.
        base: The base model's score on every test example.
    """
    return {
        "held_out_by_task": [sums_by_task(owners, target, [1] * len(target.held_out)) for target in targets],
        "base_model_by_task": by_target(owners, targets, base),
    }


def by_target(owners: np.ndarray, targets: Sequence[Target], scores: Sequence[float]) -> list[list[float]]:
    """Return sums of scores over held-out examples, by target and task, given one of every test example."""
    return [sums_by_task(owners, target, [scores[row] for row in target.held_out]) for target in targets]


def sums_by_task(owners: np.ndarray, target: Target, scores: Sequence[float]) -> list[float]:
    """Return the sums of the scores of a target's held-out examples, for each of its tasks in their order."""
    own = owners[list(target.held_out)]
    return [float(np.array(scores)[own == task].sum()) for task in target.tasks]
