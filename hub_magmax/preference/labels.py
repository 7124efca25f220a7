"""Preference from the labels of a target sample: the share of each task's classes.

Source: Tunable MAGMAX (arXiv:2605.20803), label-based weights.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hub_magmax.data import label_names, load_examples
from hub_magmax.digest import digest
from hub_magmax.errors import RecipeError
from hub_magmax.lockfile import ResolvedPreference
from hub_magmax.recipe import Labels


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
    """
    owner: dict[int | str, str] = {}
    for task, members in classes.items():
        for label in members:
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


def resolve_labels(spec: Labels, tasks: Sequence[str], folder: Path) -> ResolvedPreference:
    """Load the target sample and return the preference with its fingerprint and counts."""
    examples = load_examples(spec.target, folder)
    names = label_names(examples, spec.target.label_column)
    labels = list(examples[spec.target.label_column])
    classes = {task: _as_stored(spec.classes.get(task, ()), names) for task in tasks}
    weights = preference_from_labels(labels, classes)
    known = {label for members in classes.values() for label in members}
    return ResolvedPreference(
        weights,
        "labels",
        data_fingerprint=digest([spec.target.dataset, spec.target.split, labels]),
        explanation={
            "examples": len(labels),
            "examples_of_no_task": sum(label not in known for label in labels),
        },
    )


def _as_stored(members: Sequence[int | str], names: list[str] | None) -> list[int | str]:
    """Return class names as the integers that the data set stores for them."""
    if names is None:
        return list(members)
    stored: list[int | str] = []
    for member in members:
        if isinstance(member, str) and member not in names:
            nearest = difflib.get_close_matches(member, names, n=1)
            raise RecipeError(
                f"the data set has no class {member!r}",
                where="preference.labels.classes",
                expected=f"one of {', '.join(names[:20])}",
                hint=f"Did you mean {nearest[0]!r}?" if nearest else "",
            )
        stored.append(names.index(member) if isinstance(member, str) else member)
    return stored
