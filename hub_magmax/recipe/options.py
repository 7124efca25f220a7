"""Order of the options of methods that have a value for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hub_magmax.errors import KeyPath

#: Parts of a recipe that hold options of methods: keys and, for a list, 0.
_PLACES: Sequence[KeyPath] = (("method",), ("compare", "methods", 0), ("tensors", 0, "options"))


def in_task_order(values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values of a recipe whose options by task are in the order of its tasks.

    So the values of such an option, in a lock too, are those of the tasks in order.
    """
    tasks = values.get("tasks")
    names = [task.get("name") for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    for place in _PLACES:
        values = _changed(values, place, names)
    return values


def _changed(value: Any, place: KeyPath, names: Sequence[Any]) -> Any:
    """Return a value in which the options at a place are ordered."""
    if isinstance(value, list) and place and place[0] == 0:
        return [_changed(item, place[1:], names) for item in value]
    if not isinstance(value, dict):
        return value
    if not place:
        return {key: _ordered(option, names) for key, option in value.items()}
    if place[0] not in value:
        return value
    return {**value, place[0]: _changed(value[place[0]], place[1:], names)}


def _ordered(option: Any, names: Sequence[Any]) -> Any:
    """Return an option, if it has a value for each task in the order of these."""
    if not isinstance(option, dict) or {*option} != {*names}:
        return option
    return {name: option[name] for name in names}
