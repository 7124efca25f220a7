"""Comparison of a recipe with a lock, and the values that both are compared by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from hub_magmax import methods
from hub_magmax.errors import LockError, MissingDependencyError
from hub_magmax.files import digest
from hub_magmax.options import locked_options
from hub_magmax.recipe.lockfile import Lock, LockedSlice, LockedSource, LockedTokenizer
from hub_magmax.recipe.preferences import Preference
from hub_magmax.recipe.schema import Method, Recipe
from hub_magmax.recipe.statistics_checks import files_of, statistics_kinds
from hub_magmax.recipe.values import AUTO
from hub_magmax.registry import METHODS, Plugin

#: Name of the keys that say which checkpoints are merged.
SOURCES = "base_model and tasks"


def check_lock(recipe: Recipe, locked: Lock, where: str) -> None:
    """Raise LockError unless a merged model's lock was made from `recipe`: sources, method, rules, seed.

    The output and the evaluation may change without a new lock.
    """
    if changed := changed_keys(recipe, locked):
        raise LockError(
            f"the recipe changed since this model was merged: {', '.join(changed)}",
            where=where,
            expected="the recipe that it was merged from, which lies beside it",
            hint="Merge the changed recipe into another folder (--output FOLDER), or name that folder.",
        )


def changed_keys(recipe: Recipe, locked: Lock) -> list[str]:
    """Return the keys of a recipe with other values than those that `locked` was made from."""
    same = {
        SOURCES: {n: s.reference for n, s in locked.every_source.items()} == recipe.written_sources,
        "order of the tasks": list(locked.tasks) == list(recipe.task_names),
        "method": _method_fits(recipe, locked),
        "preference": locked.preference.spec_digest == preference_digest(recipe),
        "norms": (None if locked.lengths is None else locked.lengths.norms) == recipe.norms,
        "correction": _correction_fits(recipe, locked),
        "output.rank": recipe.output.rank is None or not locked.is_portable,
        "tensors": locked.tensors == rules_of(recipe),
        "statistics": _statistics_fit(recipe, locked),
        "adapters": locked.adapters == (recipe.adapters or "each"),
        "layers": _layers_fit(recipe, locked),
        "token_rows": _token_rows_fit(recipe, locked),
        "tokenizer": _without_template(locked.tokenizer) == tokenizer_of(recipe),
        "seed": locked.seed == recipe.seed,
    }
    return [key for key, equal in same.items() if not equal]


def kept_sources(earlier: Lock) -> dict[str, LockedSource]:
    """Return the checkpoints of a lock by their names in its recipe, before they are compared."""
    return {source.reference: _uncompared(source) for source in earlier.every_source.values()}


def is_kept(source: LockedSource, earlier: Lock) -> bool:
    """Say whether a checkpoint is pinned as an earlier lock pins it."""
    return kept_sources(earlier).get(source.reference) == _uncompared(source)


def kept_preference(recipe: Recipe, earlier: Lock, made: Lock) -> bool:
    """Say whether the preference of an earlier lock is still that of the recipe.

    An estimate depends on the seed and on its data, and the weights of a search, or of an estimate that was
    tried on examples, on the method too.

    Args:
        recipe: Names the preference.
        earlier: The lock that has its weights.
        made: The new lock, but for the preference.
    """
    spec = recipe.preference.spec if recipe.preference else None
    alone = recipe.preference is None or (
        not recipe.preference.is_searched and not getattr(spec, "holdout", None)
    )
    same = earlier.preference.spec_digest == preference_digest(recipe)
    return (
        alone
        and same
        and made.sources == earlier.sources
        and list(earlier.tasks) == list(recipe.task_names)
        and _drawn_from(recipe, earlier) == _drawn_from(recipe, made)
    )


def _drawn_from(recipe: Recipe, locked: Lock) -> list[Any]:
    """Return what a lock says of an estimate's draw and data: the seed, digests and commits; else nothing."""
    data = recipe.preference.data if recipe.preference else []
    parts = [part for spec in data for part in spec.parts]
    pinned = [(locked.local_data.get(part.dataset), locked.datasets.get(part.pin_key)) for part in parts]
    return [locked.seed, *pinned] if parts else []


def _uncompared(source: LockedSource) -> LockedSource:
    """Return a locked source without what comparing it with the others told."""
    return replace(source, places=None, added_rows=None, renamed=None, ties=None, label_rows=None)


def locked_method(written: Method, preference: Preference | None = None) -> dict[str, Any]:
    """Return a method with its scaling coefficient and every option filled in.

    In place of `auto`, which only a comparison can fill in, stands the default. Coefficients count as they
    are written: with them the default is 1.
    """
    method = methods.get_method(Method().name if written.name == AUTO else written.name)
    default = 1.0 if preference is not None and preference.coefficients is not None else method.scaling
    scaling = default if written.scaling in (None, AUTO) else written.scaling
    options = locked_options(method, written.options)
    return {"name": method.name, "scaling": scaling, **options}


def with_method_facts(recipe: Recipe, locked: Lock) -> Lock:
    """Return a lock that names the package of a plug-in, and says whether bytes depend on the machine."""
    method = methods.get_method(locked.method["name"])
    found = METHODS.plugin(method.name)
    plugin = {} if found is None else asdict(found)
    decomposes = recipe.output.rank is not None or recipe.correction is not None
    return replace(locked, plugin=plugin, is_portable=method.is_portable and not decomposes)


def refuse_missing_plugin(locked: Lock) -> None:
    """Raise MissingDependencyError if the plug-in that `locked` merges by is not installed."""
    name = locked.method["name"]
    if locked.plugin and not METHODS.knows(name):
        package = Plugin(**locked.plugin)
        if not package.package:
            raise MissingDependencyError(
                f"the merge method {name!r} is of no package: the program that locked it has registered it",
                where=f"method {name}",
                hint="Run this in that program, or make a package of the method (docs/plugins.md), lock and "
                "merge again.",
            )
        raise MissingDependencyError(
            f"the merge method {name!r} is of the {package}, which is not installed here",
            where=f"plug-in {name}",
            hint=f"Install it beside hub_magmax: pip install {package.requirement}",
        )


def check_plugin(locked: Lock) -> None:
    """Raise unless the plug-in that `locked` merges by is installed, and is the one that was locked.

    Raises:
        MissingDependencyError: If there is none of its name.
        LockError: If its package, version or code is another one. Locks of earlier versions name none.
    """
    refuse_missing_plugin(locked)
    if not locked.plugin:
        return
    name, expected = locked.method["name"], Plugin(**locked.plugin)
    methods.get_method(name)
    if (found := METHODS.plugin(name)) != expected:
        is_renamed = found is None or (found.package, found.version) != (expected.package, expected.version)
        before = f"Install {expected.requirement}" if expected.package else "Make the code"
        raise LockError(
            f"the lock was made with the {_owner(expected)}, and here is the {_owner(found)}"
            if is_renamed
            else f"the code of the {_owner(expected)} is not what it was when the lock was made",
            where=f"plug-in {name}",
            expected="the same package, version and code, which decide the merged bytes",
            hint=f"{before} as it was; or, to merge with this one, lock again, and choose another output.",
        )


def _owner(plugin: Plugin | None) -> str:
    """Return in words whose method it is."""
    if plugin is None:
        return "built-in method"
    return str(plugin) if plugin.package else "method of no package"


def _method_fits(recipe: Recipe, locked: Lock) -> bool:
    """Say whether the locked method is the recipe's, or was chosen by the comparison it asks for."""
    if not recipe.method.is_auto:
        return dict(locked.method) == locked_method(recipe.method, recipe.preference)
    if locked.chosen.get("spec_digest") != comparison_digest(recipe):
        return False
    if recipe.method.name == AUTO:
        return True
    written = locked_method(recipe.method, recipe.preference)
    return {**locked.method, "scaling": None} == {**written, "scaling": None}


def comparison_digest(recipe: Recipe) -> str:
    """Return the digest of what a choice depends on beside the sources."""
    values = recipe.to_dict()
    return digest([values.get(key) for key in ("method", "compare", "preference")])


def rules_of(recipe: Recipe) -> tuple[tuple[str, str] | dict[str, Any], ...]:
    """Return the recipe's rules for tensors as a lock stores them."""
    return tuple(rule.locked for rule in recipe.tensors)


def layers_of(recipe: Recipe) -> tuple[LockedSlice, ...]:
    """Return the recipe's stack of layers as a lock stores it, before names are looked at."""
    sources = ("base_model", *recipe.task_names)
    return tuple(layer.locked(sources) for layer in recipe.layers or ())


def tokenizer_of(recipe: Recipe) -> LockedTokenizer | None:
    """Return the recipe's tokenizer as a lock stores it, without the text of a template."""
    return None if recipe.tokenizer is None else recipe.tokenizer.locked(recipe.output.files_from)


def _without_template(found: LockedTokenizer | None) -> LockedTokenizer | None:
    return None if found is None else replace(found, template=None)


def _statistics_fit(recipe: Recipe, locked: Lock) -> bool:
    """Say whether the locked statistics are those that the recipe's tasks and methods name."""
    written = {kind: files_of(recipe, kind) for kind in statistics_kinds(recipe)}
    found = {
        kind: {task: source.reference for task, source in by_task.items()}
        for kind, by_task in locked.statistics.items()
    }
    return found == written


def _correction_fits(recipe: Recipe, locked: Lock) -> bool:
    """Say whether the locked correction is the recipe's; its tensor was found."""
    written = {} if recipe.correction is None else recipe.correction.model_dump()
    return {key: value for key, value in locked.correction.items() if key != "tensor"} == written


def _token_rows_fit(recipe: Recipe, locked: Lock) -> bool:
    """Say whether the locked tensors are the recipe's; where it names none, they were found."""
    is_found = recipe.token_rows is None and recipe.tokenizer is not None
    return is_found or locked.token_rows == (recipe.token_rows or ())


def _layers_fit(recipe: Recipe, locked: Lock) -> bool:
    """Say whether the locked layers are the recipe's; where that names no stack, they name what was found."""
    written = layers_of(recipe)
    return len(written) == len(locked.layers) and all(
        (one.take, one.blocks, one.of or other.of) == (other.take, other.blocks, other.of)
        for one, other in zip(written, locked.layers, strict=True)
    )


def preference_digest(recipe: Recipe) -> str:
    """Return the digest of the recipe's preference as written."""
    return digest(recipe.to_dict().get("preference"))


def pinned_by_headers(sources: Iterable[LockedSource]) -> list[str]:
    """Return the names of sources whose weights a lock pins by headers and sizes alone.

    They are folders, locked without `--hash`: other values of the same names and shapes pass for them.
    """
    found = (source for source in sources if source.commit is None)
    return [
        *dict.fromkeys(source.label for source in found if any(file.sha256 is None for file in source.files))
    ]
