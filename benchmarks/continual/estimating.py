"""Preferences of targets, from a few of their examples. Features are computed once per family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from benchmarks.continual.protocol import Target
from benchmarks.continual.sources import Family
from hub_magmax.preference.comparison import compare_samples
from hub_magmax.preference.distance import uniform_shares
from hub_magmax.preference.labels import preference_from_labels
from hub_magmax.preference.mixture import Space
from hub_magmax.preference.safeguards import draw
from hub_magmax.recipe.preferences import Transport

Weights = tuple[float, ...]

_NOWHERE = {"target": {"dataset": "-"}, "train": {}}

#: As recipes have it, and as published: each task compared with the target by itself.
TRANSPORTS = {
    "transport": Transport.model_validate(_NOWHERE),
    "transport, published": Transport.model_validate(_NOWHERE | {"fit": "separate"}),
}


class Estimator:
    """Estimates preferences over a family's tasks, as the package's resolvers do.

    The check of the sample's size is left out: how far a few examples go is one of the questions.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    def weights(self, kind: str, target: Target, rows: Sequence[int]) -> Weights:
        """Return the weights that one kind of preference has for a target, given some of its examples.

        Args:
            kind: `uniform`, `known`, `labels`, or one of `TRANSPORTS`.
            target: What the examples are from.
            rows: The examples that may be looked at.
        """
        num_tasks = len(self._family.tasks)
        if kind == "uniform":
            return (1 / num_tasks,) * num_tasks
        if kind == "known":
            return target.shares(num_tasks)
        if kind == "labels":
            found = preference_from_labels([self._labels[row] for row in rows], self._family.classes)
            return tuple(found.values())
        return self._by_transport(TRANSPORTS[kind], rows)

    def _by_transport(self, spec: Transport, rows: Sequence[int]) -> Weights:
        spaces = [Space(train, test[list(rows)]) for train, test in self._features]
        draws = compare_samples(spec, spaces, uniform_shares(len(rows))).draws
        return tuple(draws[0].tolist())

    @cached_property
    def _labels(self) -> list[int]:
        return list(self._family.test[self._family.columns.label_column])

    @cached_property
    def _features(self) -> list[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Return, under each task's model, the features of the training samples and the test examples."""
        family = self._family
        assert family.features is not None
        each = family.num_train // len(family.tasks)
        train = [
            examples.select(draw(len(examples), each, family.seed, f"train/{task}"))
            for task, examples in family.train.items()
        ]
        return [
            (tuple(family.features(place, part) for part in train), family.features(place, family.test))
            for place in family.tasks.values()
        ]
