"""Pin a recipe: commits, sizes and hashes of its sources, and its preference as numbers."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from hub_magmax import methods
from hub_magmax.digest import digest
from hub_magmax.errors import LockError
from hub_magmax.io.opening import lock_source, open_source
from hub_magmax.lockfile import Lock, LockedSource
from hub_magmax.planning import Plan, make_plan
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.samples import Scorer
from hub_magmax.recipe import Recipe


def lock(recipe: Recipe, *, scorer: Scorer | None = None) -> Lock:
    """Return what `recipe` stands for now, from headers alone.

    Hub revisions become commits; data-driven preferences are estimated.

    Args:
        recipe: What to pin.
        scorer: Merges and scores for the hold-out of an estimated preference; `running.holdout_scorer`.

    Raises:
        SourceError: If a checkpoint cannot be reached.
        CheckpointError: If a checkpoint is malformed.
        RecipeError, EvaluationError: If the preference cannot be formed.
    """
    pinned: dict[str, LockedSource] = {}
    for written in (recipe.base_model, *(task.model for task in recipe.tasks)):
        if written not in pinned:
            pinned[written] = lock_source(recipe, written)
    tasks = {task.name: pinned[task.model] for task in recipe.tasks}
    sources = {"base_model": pinned[recipe.base_model], **tasks}
    preference = resolve_preference(recipe, sources=sources, scorer=scorer)
    return Lock(
        base_model=pinned[recipe.base_model],
        tasks=tasks,
        method=_method(recipe),
        preference=replace(preference, spec_digest=_preference_digest(recipe)),
        tensors=_rules(recipe),
        seed=recipe.seed,
    )


def plan(recipe: Recipe, locked: Lock | None = None) -> Plan:
    """Return everything that merging `recipe` will do, from headers alone.

    Args:
        recipe: What to merge.
        locked: Its lock; made now where it is not given.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        LockError: If a source is no longer what was locked.
    """
    locked = locked or lock(recipe)
    with ExitStack() as stack:
        indexes = {
            name: stack.enter_context(closing(open_source(recipe, source))).index
            for name, source in locked.sources.items()
        }
    return make_plan(recipe, locked, indexes)


def check_lock(recipe: Recipe, locked: Lock, where: str) -> None:
    """Raise LockError unless `locked` was made from `recipe`: sources, method, rules, seed, kind.

    The output and the evaluation may change without a new lock.
    """
    written = {"base_model": recipe.base_model} | {task.name: task.model for task in recipe.tasks}
    same = {
        "base_model and tasks": {n: s.reference for n, s in locked.sources.items()} == written,
        "their order": list(locked.tasks) == list(recipe.task_names),
        "method": dict(locked.method) == _method(recipe),
        "preference": locked.preference.spec_digest == _preference_digest(recipe),
        "tensors": locked.tensors == _rules(recipe),
        "seed": locked.seed == recipe.seed,
    }
    changed = [key for key, equal in same.items() if not equal]
    if changed:
        raise LockError(
            f"the recipe changed since this lock was written: {', '.join(changed)}",
            where=where,
            hint="Run `hub-magmax lock` again, or delete the lock.",
        )


def _method(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's method with its scaling coefficient and every option filled in."""
    method = methods.get_method(recipe.method.name)
    scaling = method.scaling if recipe.method.scaling is None else recipe.method.scaling
    options = methods.check_options(method, recipe.method.options)
    return {"name": method.name, "scaling": scaling, **options}


def _rules(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    return tuple((rule.match, rule.take) for rule in recipe.tensors)


def _preference_digest(recipe: Recipe) -> str:
    return digest(recipe.to_dict().get("preference"))
