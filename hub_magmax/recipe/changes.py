"""Values that a command line gives in place of a recipe's: `--set method.scaling=0.4`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hub_magmax.errors import KeyPath, RecipeError
from hub_magmax.recipe.preferences import Preference
from hub_magmax.recipe.strict_yaml import read_yaml
from hub_magmax.text import nearest, shown

#: Keys whose value may be a bare name, which stands for a mapping with this name.
_BARE_NAMES: tuple[KeyPath, ...] = (("method",), ("evaluation", "evaluator"))


@dataclass(frozen=True)
class Change:
    """One value in place of a recipe's.

    Attributes:
        option: As it was typed, for messages.
        key: Names that lead to the value; those of keys with a point in them may be in pieces.
        value: Plain value of YAML.
        written: Texts of single values that YAML does not take for text, by key path below `key`.
    """

    option: str
    key: tuple[str, ...]
    value: Any
    written: Mapping[KeyPath, str] = field(default_factory=dict, hash=False)


def parse_setting(text: str) -> Change:
    """Return the change that `--set key.path=value` asks for; the value is YAML."""
    option = f"--set {text}"
    key, equals, written = text.partition("=")
    names = tuple(key.strip().split("."))
    if not equals or not all(names):
        raise RecipeError(
            "this is no key with a value",
            where=option,
            expected="key.path=value",
            hint="Write for example --set method.scaling=0.4, or --set tasks.plants.model=./plants.",
        )
    read = read_yaml(written, option)
    return Change(option, names, read.values, read.written)


def parse_preference(text: str) -> Change:
    """Return the change that `--preference a=.7,b=.3` asks for, or `--preference uniform`."""
    option = f"--preference {text}"
    if text.strip() == "uniform":
        return Change(option, ("preference",), None)
    weights: dict[str, Any] = {}
    for part in text.split(","):
        task, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not (task and equals and number) or task in weights:
            what = (
                f"the task {shown(task)} appears twice" if task in weights else f"{shown(part)} is no share"
            )
            raise RecipeError(
                what,
                where=option,
                expected="each task's share, such as animals=0.7,plants=0.3, or uniform",
                hint="For another kind write for example --set preference.geometric.ratio=0.5.",
            )
        weights[task] = number
    return Change(option, ("preference",), {"weights": weights})


def with_changes(
    values: Any, written: Mapping[KeyPath, str], changes: Iterable[Change]
) -> tuple[Any, dict[KeyPath, str], dict[KeyPath, str]]:
    """Return a recipe's values with the changes, the texts of all single values, and options by key path.

    Raises:
        RecipeError: If a change names no place in the recipe.
    """
    values, written, options = copy.deepcopy(values), dict(written), dict[KeyPath, str]()
    for change in changes if isinstance(values, dict) else ():
        path = _put(values, change)
        options = _outside(options, path) | {path: change.option}
        written = _outside(written, path) | {(*path, *inner): text for inner, text in change.written.items()}
    return values, written, options


def _outside(found: Mapping[KeyPath, Any], path: KeyPath) -> dict[KeyPath, Any]:
    """Return entries that are not at `path` or below it."""
    return {key: value for key, value in found.items() if key[: len(path)] != path}


def without_replaced(places: Mapping[KeyPath, Any], options: Mapping[KeyPath, str]) -> dict[KeyPath, Any]:
    """Return the places of a recipe's file, without those of values that options replace, and the options."""
    found = dict(places)
    for path, option in options.items():
        found = _outside(found, path) | {path: option}
    return found


def _put(values: dict[str, Any], change: Change) -> KeyPath:
    """Put the value of a change into the values, and return its path there."""
    tasks = _names(values.get("tasks"))
    holder: Any = values
    path: KeyPath = ()
    rest = change.key
    while True:
        key, num_used = _key(holder, rest, tasks, change.option, path)
        rest = rest[num_used:]
        path = (*path, key)
        if not rest:
            holder[key] = change.value
            return path
        holder = _below(holder, key, path, rest[0], change.option)


def _key(
    holder: Any, rest: tuple[str, ...], tasks: Collection[str], option: str, path: KeyPath
) -> tuple[str | int, int]:
    """Return the key of `holder` that the first of the names mean, and how many of them it takes."""
    if isinstance(holder, list):
        return _position(holder, rest, option, path)
    for end in range(len(rest), 1, -1):
        if (joined := ".".join(rest[:end])) in holder or joined in tasks:
            return joined, end
    return rest[0], 1


def _position(holder: list[Any], rest: tuple[str, ...], option: str, path: KeyPath) -> tuple[int, int]:
    """Return the position of an item that is called by its name or its number from 0."""
    names = _names(holder)
    for end in range(len(rest), 0, -1):
        if (joined := ".".join(rest[:end])) in names:
            return names.index(joined), end
    if rest[0].isdigit() and int(rest[0]) < len(holder):
        return int(rest[0]), 1
    raise _no_item([name for name in names if name], len(holder), rest[0], option, path)


def _no_item(names: list[str], count: int, name: str, option: str, path: KeyPath) -> RecipeError:
    numbers = f"its number, from 0 to {count - 1}" if count else "nothing: the list is empty"
    return RecipeError(
        f"{'.'.join(map(str, path))} has no {'task' if path == ('tasks',) else 'item'} {shown(name)}",
        where=option,
        expected=", ".join([*names, f"or {numbers}"] if names else [numbers]),
        hint=nearest(name, names).capitalize() or "Write the whole list to add to it.",
    )


def _names(items: Any) -> list[str]:
    """Return the names of a list's items; empty ones for those without."""
    if not isinstance(items, list):
        return []
    found = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [str(name) if name is not None else "" for name in found]


def _below(holder: Any, key: Any, path: KeyPath, following: str, option: str) -> Any:
    """Return what lies under a key, made where there is nothing, to put a value into it."""
    found = holder[key] if isinstance(holder, list) else holder.get(key)
    if isinstance(found, str) and (path in _BARE_NAMES or path[:2] == ("compare", "methods")):
        found = {"name": found}
    if found is None or _is_replaced(path, found, following):
        found = {}
    if not isinstance(found, dict | list):
        raise RecipeError(
            f"{'.'.join(map(str, path))} is {shown(found, 60)}, which has no keys",
            where=option,
            hint=f"Give it a value of its own: --set {'.'.join(map(str, path))}=...",
        )
    holder[key] = found
    return found


def _is_replaced(path: KeyPath, found: Any, following: str) -> bool:
    """Say whether a kind of preference takes the place of another one."""
    is_other = isinstance(found, dict) and following not in found
    return path == ("preference",) and is_other and following in Preference.model_fields
