"""Journal of a comparison, a sweep or a lock, bound to everything that its outcomes depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.identity import state_of
from hub_magmax.checkpoints.opening import versions_of
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.evaluation.evaluators import evaluator_of
from hub_magmax.evaluation.journal import Journal, open_journal
from hub_magmax.evaluation.software import software_used
from hub_magmax.files import digest
from hub_magmax.methods import get_method
from hub_magmax.processes import refuse_several
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.registry import EVALUATORS, METHODS
from hub_magmax.text import Report, number_of


@contextmanager
def study_journal(
    path: Path | None, recipe: Recipe, lock: Lock, report: Report = lambda line: None
) -> Iterator[Journal]:
    """Open the journal of a comparison or a sweep; it stays, and the same study measures nothing again.

    Args:
        path: Its file; None: nothing is kept.
        recipe, lock: As the study gets them.
        report: Called with a line where measurements of an earlier attempt are dropped, or kept for a later.

    Raises:
        DistributedError: If a launcher started several processes: each of them would measure everything.
        OutputError: If another process measures the same.
    """
    refuse_several("a comparison or a sweep")
    if path is None:
        yield Journal()
        return
    with open_journal(path, _subject(recipe, lock), report) as journal:
        yield journal


@contextmanager
def lock_journal(
    path: Path | None, recipe: Recipe, lock: Lock, report: Report = lambda line: None
) -> Iterator[Journal]:
    """Open the journal of models that are merged and scored for a lock: for its preference, or its method.

    It stays, as that of a comparison does.

    Args:
        path: Its file; None: nothing is kept.
        recipe: What is locked.
        lock: Before that is decided.
        report: As for `study_journal`.
    """
    if path is None or not recipe.is_measured:
        yield Journal()
        return
    with open_journal(path, _subject(recipe, lock), report) as journal:
        say_resumed(journal, report)
        yield journal


def say_resumed(journal: Journal, report: Report) -> None:
    """Report how many models were measured earlier, if any was."""
    if len(journal):
        verb = "was" if len(journal) == 1 else "were"
        report(f"{number_of(len(journal), 'model')} {verb} measured before")


def _subject(recipe: Recipe, lock: Lock) -> str:
    """Return a digest of recipe, lock, the present files of folders, plug-ins, software and processor."""
    import torch

    files = {name: state_of(source, recipe.folder) for name, source in lock.every_file.items()}
    return digest(
        {
            "recipe": recipe.to_dict(),
            "lock": lock.checksum,
            "weights": versions_of(recipe, lock, SourceCache()),
            "files": files,
            "plugins": [*_plugins(recipe, lock)],
            # The same bytes are promised, and with other threads a sum can differ in its last bit.
            "circumstances": software_used() | {"threads": torch.get_num_threads()},
        }
    )


def _plugins(recipe: Recipe, lock: Lock) -> Iterable[Any]:
    """Yield package, version and code of every plug-in that takes part."""
    spec = recipe.compare or Compare()
    for name in dict.fromkeys([lock.method["name"], *(method.name for method in spec.tried_methods)]):
        get_method(name)  # imports the plug-in, whose code is hashed only then
        if plugin := METHODS.plugin(name):
            yield asdict(plugin)
    if recipe.evaluation is not None:
        evaluator_of(recipe.evaluation)  # likewise
        plugin = EVALUATORS.plugin(recipe.evaluation.evaluator.name)
        yield asdict(plugin) if plugin else None
