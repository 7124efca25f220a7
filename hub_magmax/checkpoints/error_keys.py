"""Keys of the recipe on errors about its checkpoints, so that a message can say which line names one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from hub_magmax.errors import (
    CheckpointError,
    HubMagmaxError,
    HubSettingError,
    KeyPath,
    LockError,
    MismatchError,
    RecipeError,
    SourceError,
)
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe

_ABOUT_SOURCES = (CheckpointError, LockError, MismatchError, RecipeError, SourceError)


@contextmanager
def about_source(recipe: Recipe, reference: str) -> Iterator[None]:
    """Give errors meanwhile the key under which the recipe names the checkpoint `reference`."""
    with _with_keys(lambda error: _key_of(recipe, reference)):
        yield


@contextmanager
def about_sources(recipe: Recipe, sources: Mapping[str, LockedSource]) -> Iterator[None]:
    """Give errors whose place begins with the label of a source the key under which the recipe names it."""
    labels = {source.label: source.reference for source in sources.values()}

    def key(error: HubMagmaxError) -> KeyPath:
        found = [label for label in labels if re.match(rf"{re.escape(label)}(?![\w./-])", error.where)]
        return _key_of(recipe, labels[max(found, key=len)]) if found else ()

    with _with_keys(key):
        yield


@contextmanager
def _with_keys(key: Callable[[HubMagmaxError], KeyPath]) -> Iterator[None]:
    try:
        yield
    except HubSettingError:  # of all that is on the Hub, not of one checkpoint
        raise
    except _ABOUT_SOURCES as error:
        error.is_about(key(error))
        raise


def _key_of(recipe: Recipe, reference: str) -> KeyPath:
    """Return the first key whose value names a checkpoint; empty where none does."""
    return next((key for key, value in recipe.models.items() if value == reference), ()) or next(
        (key for key, value in recipe.places.items() if value and reference.startswith(f"{value}/")), ()
    )
