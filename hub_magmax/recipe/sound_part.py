"""The valid part of a recipe with wrong values, whose contradictions are told in the same run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hub_magmax.errors import KeyPath
from hub_magmax.recipe.schema import Recipe

#: Rounds of leaving out what is wrong; each goes at least one level up.
_MAX_ROUNDS = 8

#: Stands for a model whose name is wrong; any folder is a valid name.
_ANY_MODEL = "./"
_MODEL_KEYS = ("model", "base", "statistics")


def sound_part(values: dict[str, Any], folder: Path) -> tuple[Recipe | None, frozenset[str]]:
    """Return a recipe without its unknown keys and wrong values, and the top-level keys that lack something.

    Unknown keys do not count as lacking, and a wrong model of a task or of the base model does not either: a
    name takes its place. No recipe is returned where little is left.
    """
    rest: dict[str, Any] = copy.deepcopy(values)
    lacking: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        try:
            return Recipe.model_validate(rest, context={"folder": folder}), frozenset(lacking)
        except ValidationError as error:
            faults = error.errors()
        # A list of which an item is wrong is also too short.
        faults = [fault for fault in faults if fault["type"] != "too_short"] or faults
        if (left_out := _leave_out(rest, faults)) is None:
            return None, frozenset()
        lacking |= left_out
    return None, frozenset()


def _leave_out(rest: dict[str, Any], faults: Sequence[Mapping[str, Any]]) -> set[str] | None:
    """Remove what is wrong, and return the top-level keys that lack something; None where one is missing."""
    wrong = {_existing(rest, fault["loc"]) for fault in faults if not _is_model(fault["loc"])}
    if () in wrong:
        return None
    for fault in faults:
        if _is_model(fault["loc"]):
            _holder(rest, fault["loc"])[fault["loc"][-1]] = _ANY_MODEL
    # From the end, so that positions in lists stay what they are.
    for path in sorted(wrong, key=_order, reverse=True):
        del _holder(rest, path)[path[-1]]
    unknown = {fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"}
    return {str(path[0]) for path in wrong - unknown}


def _order(path: KeyPath) -> list[tuple[bool, str | int]]:
    return [(isinstance(part, str), part) for part in path]


def _is_model(path: KeyPath) -> bool:
    return path == ("base_model",) or (len(path) == 3 and path[0] == "tasks" and path[2] in _MODEL_KEYS)


def _existing(rest: Any, path: KeyPath) -> KeyPath:
    """Return the part of a path that leads to something; other parts name forms of a value, or a lack."""
    for end, part in enumerate(path):
        is_key = isinstance(rest, dict) and part in rest
        if not is_key and not (isinstance(rest, list) and isinstance(part, int) and part < len(rest)):
            return path[:end]
        rest = rest[part]
    return path


def _holder(rest: Any, path: KeyPath) -> Any:
    """Return the mapping or list that holds the value at a path."""
    for part in path[:-1]:
        rest = rest[part]
    return rest
