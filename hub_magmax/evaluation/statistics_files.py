"""Files of statistics of tasks' data: made where they are missing, pinned, and compared with their recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager

from hub_magmax.checkpoints.data_statistics import AGAIN, KIND, facts_of
from hub_magmax.checkpoints.locations import locate
from hub_magmax.checkpoints.pinning import pinned_files
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, LockError
from hub_magmax.evaluation.statistics_making import Making
from hub_magmax.evaluation.statistics_origins import CHECKPOINT, DATA, MERGE, Origins
from hub_magmax.kernels.lazy_imports import Tensor
from hub_magmax.methods.data_statistics import StatisticsKind
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.statistics_checks import files_of, is_local, statistics_kinds
from hub_magmax.text import Report


def locked_statistics(
    recipe: Recipe,
    lock: Lock,
    report: Report = lambda line: None,
    *,
    kinds: Collection[StatisticsKind] = ("gram", "fisher"),
    hash_files: bool = False,
    cache: SourceCache | None = None,
    merged_weights: Callable[[], Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, LockedSource]]:
    """Return statistics that the recipe needs, pinned, by kind and task; missing ones are made.

    Args:
        recipe: Names folders of statistics, and the examples that missing ones are made of.
        lock: Of its checkpoints and data.
        report: Called with a line before each that is made.
        kinds: These and no others; by default those that do not depend on the preference.
        hash_files: Read local files whole, and lock their sha256 too.
        cache: Checkpoints that are open already.
        merged_weights: Merges by the lock in memory, for representations.

    Raises:
        RecipeError: If some are missing, and the recipe names no examples.
        LockError: If they are of another checkpoint, or of other examples, than the recipe names.
        CheckpointError, EvaluationError: If a file is no sound one, or cannot be made.
    """
    cache = cache or SourceCache()
    origins = Origins(recipe, lock, cache)
    making = Making(recipe, lock, origins, report, cache, merged_weights)
    found: dict[str, dict[str, LockedSource]] = {}
    needed = statistics_kinds(recipe)
    for kind in needed:  # what cannot be made is told before any is
        if kind not in kinds:
            making.missing(kind, files_of(recipe, kind))
    for kind in needed:
        if kind in kinds:
            files = files_of(recipe, kind)
            making.make_missing(kind, files)
            found[kind] = {
                task: _pinned(origins, kind, task, file, hash_files=hash_files)
                for task, file in files.items()
            }
    return found


def _pinned(
    origins: Origins, kind: StatisticsKind, task: str, file: str, *, hash_files: bool
) -> LockedSource:
    """Return the statistics of one task, pinned."""
    recipe = origins.recipe
    location = locate(file, recipe.folder).pinned().trusting(recipe.trusted_roots)
    with _made_again(origins, task, file), closing(origins.cache.open(location)) as source:
        _compare(origins, facts_of(source, kind), task, file)
        files = pinned_files(source, hash_files=hash_files)
    return LockedSource(file, location.name, files=files, **location.pin._asdict())


@contextmanager
def _made_again(origins: Origins, task: str, file: str) -> Iterator[None]:
    """Say in errors about a damaged file here how it is made again: nobody else has it."""
    try:
        yield
    except CheckpointError as error:
        if not is_local(origins.recipe, file):
            raise
        hint = AGAIN if origins.has_data(task) else "Bring it again from where it was made."
        found = CheckpointError(error.what, where=error.where, expected=error.expected, hint=hint)
        found.is_about(origins.key(task))
        raise found from error


def _compare(origins: Origins, facts: Mapping[str, str], task: str, file: str) -> None:
    """Raise LockError for statistics of another checkpoint, or of other examples, where that is known."""
    key, known = origins.key(task), facts.get(CHECKPOINT)
    if known is not None and known != origins.checkpoint(task):
        raise LockError(
            f"these statistics are of another checkpoint than {origins.lock.tasks[task].label}",
            where=file,
            hint=AGAIN,
            key=key,
        )
    is_known = MERGE in facts and all(map(origins.has_data, origins.lock.tasks))
    if is_known and facts[MERGE] != origins.merge(facts[KIND]):
        raise LockError(
            "these statistics are of another merge: other checkpoints, examples, options or preference",
            where=file,
            hint="Remove the file, so that those of all tasks are made again, or name other folders.",
            key=key,
        )
    if origins.has_data(task) and facts.get(DATA) != origins.data(task):
        raise LockError(
            f"these statistics are of other examples than statistics.data.{task} names, or of another "
            "evaluator or batch size",
            where=file,
            hint=AGAIN,
            key=key,
        )
