"""Preference from the labels of a target sample: the share of each task's classes.

Source: Tunable MAGMAX (arXiv:2605.20803), label-based weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import ArgumentError, RecipeError
from hub_magmax.evaluation.evaluators.examples import label_names
from hub_magmax.files import digest
from hub_magmax.preference.safeguards import bootstrap_shares, check_sample_size, conclude
from hub_magmax.preference.samples import Scorer, split_target
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.lockfile import ResolvedPreference
from hub_magmax.recipe.preferences import Labels
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import nearest, shown


@checked
def preference_from_labels(
    labels: Sequence[int | str], classes: Mapping[str, Sequence[int | str]]
) -> dict[str, float]:
    """Return each task's share of `labels`.

    Args:
        labels: Of the target sample, at least one of which belongs to a task.
        classes: The labels of each task; a label belongs to one task at most.

    Returns:
        Weights by task, in the order of `classes`, summing to 1. Labels of no task do not count.

    Raises:
        RecipeError: If a label belongs to two tasks, or none of `labels` belongs to any.
        ArgumentError: If labels are neither numbers nor texts.
    """
    owner: dict[int | str, str] = {}
    labels = _as_list(labels, "labels")
    for task, members in classes.items():
        for label in _as_list(members, f"classes, {task}"):
            if owner.setdefault(label, task) != task:
                raise RecipeError(
                    f"class {label!r} belongs to {owner[label]} and to {task}",
                    where="preference.labels.classes",
                    expected="disjoint classes",
                )
    counts = Counter(owner[label] for label in labels if label in owner)
    if not counts:
        raise RecipeError(
            f"none of the {len(labels)} target labels belongs to a task",
            where="preference.labels",
            expected=f"labels such as {next(iter(owner), None)!r}",
            hint="Check label_column and classes.",
        )
    return {task: counts[task] / counts.total() for task in classes}


def _as_list(labels: Any, where: str) -> list[int | str]:
    """Return labels as a list, also those of an array or a tensor."""
    found = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(found, Iterable) or isinstance(found, str):
        raise ArgumentError(
            f"{shown(found)} is no list",
            where=f"preference_from_labels, {where}",
            expected="a list of labels",
        )
    listed = [*found]
    if wrong := [label for label in listed if not isinstance(label, Number | str)]:
        raise ArgumentError(
            f"{shown(wrong[0])} is no label",
            where=f"preference_from_labels, {where}",
            expected="whole numbers or texts",
        )
    return listed


def resolve_labels(recipe: Recipe, *, scorer: Scorer | None = None) -> ResolvedPreference:
    """Load the target sample and return the preference with its fingerprint, counts and intervals.

    Raises:
        EvaluationError: If the data cannot be loaded, or too few of its labels belong to a task.
        RecipeError: If the classes do not fit the data.
    """
    assert recipe.preference is not None
    spec: Labels = recipe.preference.spec
    target = split_target(spec, recipe, "preference.labels", labelled=True)
    column = spec.target.label_column
    names = label_names(target.drawn, column)
    classes = {task: _as_stored(spec.classes.get(task, ()), names) for task in recipe.task_names}
    labels = list(target.estimation[column])
    estimate = preference_from_labels(labels, classes)
    owned = _ownership(labels, classes)
    check_sample_size(len(owned), "preference.labels, target labels that belong to a task")
    draws = bootstrap_shares(len(owned), recipe.seed) @ owned
    draws[0] = list(estimate.values())  # the exact shares, not sums of 1/n
    return conclude(
        recipe,
        draws,
        fingerprint=digest([spec.target.dataset, spec.target.split, list(target.drawn[column])]),
        seen={"examples": len(labels), "examples_of_no_task": len(labels) - len(owned)},
        score=target.score(scorer, spec.target),
    )


def _ownership(
    labels: Sequence[int | str], classes: Mapping[str, Sequence[int | str]]
) -> Float64[np.ndarray, "examples tasks"]:
    """Return 1 where a task owns an example's label; examples of no task are left out."""
    table = np.array([[label in members for members in classes.values()] for label in labels], np.float64)
    return np.asarray(table[table.any(axis=1)])


def _as_stored(members: Sequence[int | str], names: list[str] | None) -> list[int | str]:
    """Return class names as the integers that the data set stores for them."""
    if names is None:
        return list(members)
    stored: list[int | str] = []
    for member in members:
        if isinstance(member, str) and member not in names:
            raise RecipeError(
                f"the data set has no class {member!r}",
                where="preference.labels.classes",
                expected=f"one of {', '.join(names[:20])}",
                hint=nearest(member, names).replace("did", "Did", 1),
            )
        stored.append(names.index(member) if isinstance(member, str) else member)
    return stored
