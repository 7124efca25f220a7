"""Pin a recipe: commits, sizes and hashes of its sources, and its preference as numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from hub_magmax.analysis.tuning import Tuner
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.pinning import check_side_files, lock_source
from hub_magmax.checkpoints.source_cache import PARALLEL_SOURCES, HubSources
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.data import pin_datasets, pin_local_data, with_pinned_data
from hub_magmax.merging.output.report import lock_versions
from hub_magmax.planning.adapters import plan_adapter
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan
from hub_magmax.preference import resolve_preference
from hub_magmax.recipe.lockfile import Lock, ResolvedPreference
from hub_magmax.recipe.matching import _preference_digest, _rules, locked_method
from hub_magmax.recipe.schema import Recipe


def lock(
    recipe: Recipe, *, tuner: Tuner | None = None, hash_files: bool = False, hub: HubSources | None = None
) -> Lock:
    """Return what `recipe` stands for now.

    Hub revisions become commits, data-driven preferences are estimated, and what the recipe leaves to
    a comparison is chosen. From headers alone, unless the recipe asks for more.

    Args:
        recipe: What to pin.
        tuner: Merges and scores, for a hold-out, a search or `auto`.
        hash_files: Read the weight files of folders whole, and lock their sha256 too.
        hub: Repositories that stay open for what comes after.

    Raises:
        SourceError: If a checkpoint cannot be reached.
        CheckpointError: If a checkpoint is malformed.
        MismatchError: If the checkpoints are of different architectures.
        RecipeError, EvaluationError: If the preference cannot be formed, or merging and scoring is
            asked for and there is no `tuner`.
    """
    from hub_magmax.pipeline import _check_adapters, _check_architectures

    hub = hub or HubSources()
    written = dict.fromkeys([recipe.base_model, *(task.model for task in recipe.tasks)])
    with ThreadPoolExecutor(PARALLEL_SOURCES) as pool:  # they wait for answers most of the time
        found_sources = pool.map(partial(lock_source, recipe, hash_files=hash_files, hub=hub), written)
        pinned = dict(zip(written, found_sources, strict=True))
    tasks = {task.name: pinned[task.model] for task in recipe.tasks}
    sources = {"base_model": pinned[recipe.base_model], **tasks}
    _check_adapters(recipe, sources)
    _check_architectures(sources, rules=bool(recipe.tensors))
    uniform = ResolvedPreference(dict.fromkeys(tasks, 1 / len(tasks)), "uniform")
    found = Lock(
        base_model=pinned[recipe.base_model],
        tasks=tasks,
        method=locked_method(recipe.method),
        preference=uniform,
        tensors=_rules(recipe),
        seed=recipe.seed,
        datasets=pin_datasets(recipe),
        local_data=pin_local_data(recipe),
        adapters=recipe.adapters or "each",
        token_rows=recipe.token_rows or (),
        versions=lock_versions(),
    )
    scorer = tuner.scorer(recipe, found) if tuner else None
    preference = resolve_preference(with_pinned_data(recipe, found.datasets), sources=sources, scorer=scorer)
    found = replace(found, preference=replace(preference, spec_digest=_preference_digest(recipe)))
    if not recipe.method.is_auto:
        return found
    if tuner is None:
        raise EvaluationError(
            "auto needs models that are merged and scored, which this call does not do",
            where="method",
            hint="Use hub_magmax.lock, or name the method and its scaling.",
        )
    choice = tuner.choose(recipe, found)
    return replace(found, method=choice.method, chosen=choice.seen)


def plan(recipe: Recipe, locked: Lock | None = None, *, hub: HubSources | None = None) -> Plan:
    """Return everything that merging `recipe` will do, from headers alone.

    Args:
        recipe: What to merge.
        locked: Its lock; made now where it is not given.
        hub: Repositories that are open already, and stay open for what comes after.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        RecipeError: If an adapter is asked for, and the tasks cannot become one.
        LockError: If a source is no longer what was locked.
    """
    from hub_magmax.pipeline import _check_adapters

    hub = hub or HubSources()
    locked = locked or lock(recipe, hub=hub)
    _check_adapters(recipe, locked.sources)
    with open_inputs(recipe, locked, hub) as opened:
        files_from = recipe.output.files_from
        check_side_files(opened[files_from], locked.sources[files_from])
        if recipe.output.is_adapter:
            return plan_adapter(recipe, locked, opened)
        indexes = {name: source.index for name, source in opened.items()}
    return make_plan(recipe, locked, indexes)
