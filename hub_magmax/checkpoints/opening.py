"""Checkpoints of a lock, opened and checked against it, each once per command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path

from hub_magmax.checkpoints.adapters.adapter import with_adapters
from hub_magmax.checkpoints.error_keys import about_source, about_sources
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, CheckpointIndex
from hub_magmax.checkpoints.layer_takes import taken_by_layers
from hub_magmax.checkpoints.locations import location_of, repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.names.renamed import with_base_names
from hub_magmax.checkpoints.own_bases import OwnBase, with_own_bases, without_own_bases
from hub_magmax.checkpoints.pinning import changed_error, check_pinned, file_sha256
from hub_magmax.checkpoints.rows.added_rows import with_added_rows
from hub_magmax.checkpoints.rows.labels import LabelRows, with_label_rows
from hub_magmax.checkpoints.rows.token_rows import TokenRows, with_settled_rows, with_token_rows
from hub_magmax.checkpoints.rows.vocabulary import TOKENIZER_NAME, read_vocabularies, wanted_rows
from hub_magmax.checkpoints.source import FileSource, MemorySource, TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.checkpoints.stacked_layers import StackedSource, with_stacked_layers
from hub_magmax.checkpoints.storage.hub import open_hub, resolve_commit
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.checkpoints.ties.tied import with_ties
from hub_magmax.files import digest
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.merge_values import MergeValues, RuleValues, rule_values
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import rule_for
from hub_magmax.text import step


def open_source(recipe: Recipe, locked: LockedSource, cache: SourceCache | None = None) -> FileSource:
    """Open a pinned checkpoint and check that it is unchanged.

    Args:
        recipe: Says where relative paths start.
        locked: The checkpoint in the lock.
        cache: Checkpoints that are open already; a new one is added.

    Raises:
        LockError: If a weight file changed since.
    """
    location = location_of(locked, recipe.folder).trusting(recipe.trusted_roots)
    with about_source(recipe, locked.reference):
        source = (cache or SourceCache()).open(location)
        try:
            check_pinned(source, locked)
        except BaseException:
            source.close()
            raise
    return source


@contextmanager
def open_checkpoints(
    recipe: Recipe, lock: Lock, cache: SourceCache | None = None
) -> Iterator[dict[str, TensorSource]]:
    """Open the sources of a lock by name, as `as_checkpoints` returns them."""
    with open_pinned(recipe, lock.every_source, cache) as opened:
        yield as_checkpoints(recipe, lock, opened)


@contextmanager
def open_inputs(
    recipe: Recipe, lock: Lock, cache: SourceCache | None = None
) -> Iterator[dict[str, TensorSource]]:
    """Open the inputs of the output: checkpoints, or for an adapter of factors the adapters as stored."""
    with open_pinned(recipe, lock.every_source, cache) as opened:
        yield _inputs(recipe, lock, _views(recipe, lock, opened))


@contextmanager
def open_together(
    merges: Sequence[tuple[Recipe, Lock]], cache: SourceCache | None = None
) -> Iterator[list[dict[str, TensorSource]]]:
    """Open the inputs of several merges of the same checkpoints, as `open_inputs`, but each file once.

    The merges have to read each tensor one after the other, before the first of them reads the next one. An
    adapter as a checkpoint is one object for all of them.
    """
    recipe, lock = merges[0]
    with open_pinned(recipe, lock.every_source, cache) as opened:
        for source in opened.values():
            source.is_shared = True
        made: list[tuple[tuple[object, ...], dict[str, TensorSource]]] = []
        try:
            for recipe, lock in merges:
                common = _common(recipe, lock)
                known = next((views for alike, views in made if alike == common), None)
                made.append((common, known or _views(recipe, lock, opened)))
            pairs = zip(merges, made, strict=True)
            yield [_inputs(recipe, lock, views) for (recipe, lock), (_, views) in pairs]
        finally:
            for source in opened.values():
                source.is_shared = False


def _common(recipe: Recipe, lock: Lock) -> tuple[object, ...]:
    """Return what decides how a merge sees its checkpoints: merges that have it in common see the same."""
    factors = recipe.output.is_adapter and lock.merges_factors
    seen = lock.every_source, lock.adapters, lock.layers, lock.token_rows, lock.tokenizer
    return factors, recipe.output.files_from, recipe.tensors, *seen


def _views(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    if recipe.output.is_adapter and lock.merges_factors:
        tied = with_ties(with_base_names(opened, lock.every_source), recipe, lock)
        return {name: tied[name] for name in lock.sources}
    return as_checkpoints(recipe, lock, opened)


def _inputs(recipe: Recipe, lock: Lock, views: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    if recipe.output.is_adapter and lock.merges_factors:
        return dict(views)
    return as_merged(recipe, lock, views, _values_of(recipe, lock, views))


def _values_of(
    recipe: Recipe, lock: Lock, checkpoints: Mapping[str, TensorSource]
) -> Callable[[str], MergeValues]:
    """Return a function of a tensor's name: it returns the numbers by which the tensor is merged."""

    @cache
    def own() -> dict[str, RuleValues]:
        names = checkpoints["base_model"].index.tensors
        return rule_values(recipe.tensors, lock.method, tuple(lock.tasks), names)

    def values_of(tensor: str) -> MergeValues:
        found = own().get(tensor)
        return lock.values if found is None else found.over(lock.values)

    return values_of


@contextmanager
def open_pinned(
    recipe: Recipe, sources: Mapping[str, LockedSource], cache: SourceCache | None = None
) -> Iterator[dict[str, TensorSource]]:
    """Open pinned sources by name, each as it is stored; errors about one say its key in the recipe."""
    cache = cache or SourceCache()
    with about_sources(recipe, sources), ExitStack() as stack:
        cache.read_headers(location_of(locked, recipe.folder) for locked in sources.values())
        yield {
            name: stack.enter_context(closing(open_source(recipe, locked, cache)))
            for name, locked in sources.items()
        }


def open_model(model: str, revision: str | None) -> FileSource:
    """Open a merged folder, or a repository at a revision (None: that of its name, or the default branch)."""
    if Path(model).is_dir():
        return LocalSource(Path(model), model)
    repo_id, revision = repository_of(model, revision)
    with taken_for_repository(model, Path()):
        return open_hub(repo_id, resolve_commit(repo_id, revision))


def open_held(recipe: Recipe, locked: LockedSource) -> FileSource:
    """Open a pinned checkpoint to be read many times: a remote one is fetched whole, into memory."""
    source = open_source(recipe, locked)
    if not location_of(locked, recipe.folder).is_remote:
        return source
    with closing(source):
        wanted = {ADAPTER_CONFIG_NAME, TOKENIZER_NAME, source.weights, *(s.file for s in source.index.shards)}
        files = {
            path: source.read_bytes(path, 0, size)
            for path, size in source.sizes.items()
            if path in wanted or path.endswith(".index.json")
        }
        return MemorySource(files, source.label, source.weights)


def as_checkpoints(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return checkpoints of one set of names and one vocabulary, adapters as what they stand for.

    Tasks with a base model of their own know it (`own_bases.OwnBase`).
    """
    locked = lock.every_source
    named = with_base_names(opened, locked)
    places = {name: source.places for name, source in locked.items()}
    tied = with_ties(named, recipe, lock)
    whole = with_adapters(tied, places, in_sequence=lock.adapters == "sequence")
    whole = with_label_rows(with_stacked_layers(whole, lock.layers), locked)
    return with_own_bases(_with_rows(recipe, lock, opened, whole))


def _with_rows(
    recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource], whole: Mapping[str, TensorSource]
) -> dict[str, TensorSource]:
    """Return checkpoints with the rows of one vocabulary."""
    if not lock.token_rows:
        added = {name: source.added_rows for name, source in lock.every_source.items()}
        return with_added_rows(whole, added)
    vocabularies, files_from = read_vocabularies(lock, opened), recipe.output.files_from
    wanted = wanted_rows(lock, vocabularies, files_from)
    return with_token_rows(whole, vocabularies, files_from, lock.token_rows, wanted)


def as_stored(source: TensorSource) -> CheckpointIndex:
    """Return the tensors of a source from `as_checkpoints` that its own configuration describes.

    They are those before blocks were stacked and rows brought into the order of one vocabulary.
    """
    while isinstance(source, OwnBase | TokenRows | LabelRows | StackedSource):
        source = source.source
    return source.index


def as_merged(
    recipe: Recipe,
    lock: Lock,
    sources: Mapping[str, TensorSource],
    values_of: Callable[[str], MergeValues],
) -> dict[str, TensorSource]:
    """Return checkpoints as a method merges them: with one row for each token that the base model lacks.

    Args:
        recipe: For its rules; a tensor that one of them covers is copied as it is.
        lock: For its layers, of which the same is true.
        sources: From `as_checkpoints`.
        values_of: Returns for a tensor the numbers by which it is merged. Tasks that its method does not look
            at do not count.
    """
    tasks = [name for name in sources if name != "base_model"]

    def shares_of(name: str) -> dict[str, float]:
        values = values_of(name)
        unread, uses_preference = values.unread(tasks), values.how.uses_preference
        return {
            task: 0.0 if task in unread else max(weight, 0.0) if uses_preference else 1.0
            for task, weight in zip(tasks, values.weights, strict=True)
        }

    taken = taken_by_layers(lock, {name: source.index for name, source in sources.items()})

    def is_merged(name: str) -> bool:
        return rule_for(name, recipe.tensors) is None and name not in taken

    return with_own_bases(with_settled_rows(without_own_bases(sources), shares_of, is_merged))


@step("comparing the sha256 of whole files")
def check_hashes(recipe: Recipe, lock: Lock, cache: SourceCache) -> None:
    """Read weight files whose sha256 is locked, and compare; those that a commit pins cost nothing.

    Raises:
        LockError: If one differs: the weights changed under an unchanged header.
    """
    for locked in lock.every_file.values():
        hashed = {file.path: file.sha256 for file in locked.files if file.sha256 and not locked.commit}
        if not hashed:
            continue
        with closing(open_source(recipe, locked, cache)) as source:
            changed = [path for path, sha256 in hashed.items() if file_sha256(source, path) != sha256]
        if changed:
            raise changed_error(source.label, changed)


def versions_of(recipe: Recipe, lock: Lock, cache: SourceCache) -> str:
    """Return a digest of the present versions of weight files: device, inode, size, time of change.

    A lock does not see weights that changed under the same header; a merge that was interrupted must not go
    on with them.
    """
    found = {}
    for name, locked in lock.every_file.items():
        if not locked.commit:
            with closing(open_source(recipe, locked, cache)) as source:
                found[name] = {file.path: source.version(file.path) for file in locked.files}
    return digest(found)
