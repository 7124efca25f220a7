"""Pin a recipe: commits, sizes and hashes of its sources, and its preference as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from hub_magmax.checkpoints.opening import (
    PARALLEL_SOURCES,
    HubSources,
    check_side_files,
    lock_source,
    open_inputs,
)
from hub_magmax.errors import CheckpointError, EvaluationError, MismatchError, RecipeError
from hub_magmax.evaluation.data import pin_datasets, pin_local_data, with_pinned_data
from hub_magmax.merging.output.report import lock_versions
from hub_magmax.planning.adapters import plan_adapter
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan
from hub_magmax.preference import resolve_preference
from hub_magmax.preference.samples import Scorer
from hub_magmax.recipe.lockfile import Lock, LockedSource, ResolvedPreference
from hub_magmax.recipe.matching import _preference_digest, _rules, locked_method
from hub_magmax.recipe.schema import Recipe


@dataclass(frozen=True)
class Choice:
    """What a comparison chose for a recipe that says `auto`.

    Attributes:
        method: `name`, `scaling` and every option.
        seen: What was compared, as plain values.
    """

    method: Mapping[str, Any]
    seen: Mapping[str, Any]


class Tuner(Protocol):
    """What merges in memory and scores, where a lock depends on how merged models do."""

    def scorer(self, recipe: Recipe, lock: Lock) -> Scorer:
        """Return what scores weights under the recipe's method, with `lock`'s sources."""
        ...

    def choose(self, recipe: Recipe, lock: Lock) -> Choice:
        """Return the method that does best on the recipe's tuning data, under `lock`'s preference."""
        ...


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


def _check_adapters(recipe: Recipe, sources: Mapping[str, LockedSource]) -> None:
    """Raise where an adapter stands for what only a whole checkpoint can be."""
    adapters = [name for name, source in sources.items() if source.adapter_config]
    if "base_model" in adapters:
        raise CheckpointError(
            "the base model is an adapter",
            where=sources["base_model"].label,
            expected="the whole model that the adapters were trained on",
        )
    if (name := recipe.output.files_from) in adapters:
        raise RecipeError(
            f"{name} is an adapter, and the merged model needs the config of a whole model",
            where="recipe, output.files_from",
            hint="Leave it out: the base model's files are copied.",
        )
    if recipe.adapters and not adapters:
        raise RecipeError(
            "none of the tasks is an adapter",
            where="recipe, adapters",
            hint="Leave it out, or check the tasks' models.",
        )
    whole = [name for name in sources if name != "base_model" and name not in adapters]
    if recipe.output.is_adapter and whole:
        raise RecipeError(
            f"{', '.join(whole)} {'is a whole checkpoint' if len(whole) == 1 else 'are whole checkpoints'}",
            where="recipe, output.format",
            expected="LoRA adapters only, to write an adapter",
            hint="Write whole weights: output.format: weights.",
        )


def _check_architectures(sources: Mapping[str, LockedSource], *, rules: bool) -> None:
    """Raise MismatchError where two configurations name different kinds of model.

    Models of different types can have tensors of the same names and shapes (llama and mistral, say), and
    so can models of one type with different heads. The latter may be meant where the recipe has rules for
    tensors, which say which head is kept.
    """
    stated: dict[str, dict[str, Any]] = {
        "model_type": {name: source.model_type for name, source in sources.items()},
        "architectures": {} if rules else {name: s.architectures for name, s in sources.items()},
    }
    for key, values in stated.items():
        known = {name: value for name, value in values.items() if value}
        for name, value in known.items():
            first = next(iter(known))
            if value != known[first]:
                raise _different_architectures(
                    key, sources[first].label, known[first], sources[name].label, value
                )


def _different_architectures(key: str, one: str, ones: Any, other: str, others: Any) -> MismatchError:
    shown = [value if isinstance(value, str) else ", ".join(value) for value in (ones, others)]
    return MismatchError(
        f"`{key}` is {shown[1]}, and {shown[0]} in {one}",
        where=f"{other}, config.json",
        expected="checkpoints of one architecture",
        hint="Check that it was fine-tuned from this base model."
        if key == "model_type"
        else "If the models differ in their heads only, say under `tensors` which head to keep.",
    )
