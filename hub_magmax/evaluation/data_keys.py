"""Keys of the recipe on errors about its data, so that a message can say which line names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import BaseModel

from hub_magmax.errors import (
    EvaluationError,
    HubMagmaxError,
    HubSettingError,
    KeyPath,
    LockError,
    SourceError,
)
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data

_ABOUT_DATA = (EvaluationError, LockError, SourceError)


@contextmanager
def about_data(recipe: Recipe, data: Data | None = None) -> Iterator[None]:
    """Give errors meanwhile the key under which the recipe names `data`, or the data at which they are.

    A key that an error has is one of the data's own, such as `label_column`.
    """
    try:
        yield
    except HubSettingError:  # of all that is on the Hub
        raise
    except _ABOUT_DATA as error:
        error.is_below(_key_of(recipe, error, data))
        raise


def _key_of(recipe: Recipe, error: HubMagmaxError, data: Data | None) -> KeyPath:
    """Return the first key whose value is the data, whatever its revision; empty where there is none."""
    known = _data_in(recipe, ())
    if data is not None:
        return next((key for key, value in known if _unpinned(value) == _unpinned(data)), ())
    names = error.where, error.where.rpartition(", revision ")[0]
    return next(((*key, "dataset") for key, value in known if value.dataset in names), ())


def _unpinned(data: Data) -> Data:
    few_shot = data.few_shot and data.few_shot.model_copy(update={"revision": None})
    return data.model_copy(update={"revision": None, "few_shot": few_shot})


def _data_in(value: object, key: KeyPath) -> Iterator[tuple[KeyPath, Data]]:
    """Yield all data of a part of a recipe, with its keys; solved examples after what they are for."""
    if isinstance(value, Data):
        yield key, value
        if value.shots is not None:
            yield (*key, "few_shot"), value.shots
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _data_in(getattr(value, name), (*key, name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _data_in(item, (*key, name))
