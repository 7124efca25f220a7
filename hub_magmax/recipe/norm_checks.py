"""Checks of common lengths of task vectors against the other keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.errors import Problem
from hub_magmax.recipe.norms import BY_TENSOR
from hub_magmax.recipe.problems import conflict
from hub_magmax.recipe.schema import Recipe


def norm_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what `norms` cannot be said of: a recipe without tasks, layers of an adapter one by one."""
    if recipe.norms is None:
        return
    if not recipe.tasks:
        yield conflict(("norms",), "there are no task vectors to scale", "leave norms out, or name tasks")
    if recipe.norms == BY_TENSOR and recipe.output.is_adapter:
        text = "a layer of an adapter may be several tensors, and has one factor"
        yield conflict(("norms",), text, "norms: equal, or output.format: weights")
