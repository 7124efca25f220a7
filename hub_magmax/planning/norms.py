"""Common lengths of task vectors, as plans and cards tell them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.norms import BY_TENSOR, CLIPPED
from hub_magmax.text import listed, shown

#: What is scaled to what, in words.
_SCALED = {
    "equal": "task vectors of the model are scaled to their mean length",
    CLIPPED: "task vectors of the model are clipped to their mean length",
    BY_TENSOR: "task vectors of each tensor are scaled to their mean length",
}


def described_norms(lock: Lock) -> dict[str, Any] | None:
    """Return by task the length and the least and the largest factor, for programs; None without `norms`."""
    if lock.lengths is None:
        return None
    factors = [lock.lengths.factors(tensor, lock.values) for tensor in lock.lengths.by_tensor or ("",)]
    columns = zip(*factors, strict=True)
    tasks = {
        task: {"length": length, "factors": [min(column), max(column)]}
        for (task, length), column in zip(lock.lengths.whole.items(), columns, strict=True)
    }
    return {"norms": lock.lengths.norms, "tasks": tasks}


def norm_rows(lock: Lock) -> tuple[str, ...]:
    """Return the common length in words, then a line for each task; nothing without `norms`."""
    found = described_norms(lock)
    if found is None:
        return ()
    rows = [f"{_SCALED[found['norms']]}, by preference"]
    for task, values in found["tasks"].items():
        least, most = (f"{factor:.4g}" for factor in values["factors"])
        times = least if least == most else f"{least} to {most}"
        rows.append(f"{task}: length {values['length']:.4g}, times {times}")
    return tuple(rows)


def norm_notices(lock: Lock) -> Iterator[str]:
    """Yield sentences about task vectors without a length, which are not scaled."""
    if lock.lengths is None:
        return
    zero = [task for task, length in lock.lengths.whole.items() if not length]
    if zero:
        yield f"not scaled, since their task vectors are zero: {listed(zero)}"
    for number, task in enumerate(lock.tasks):
        unchanged = [
            shown(tensor) for tensor, lengths in lock.lengths.by_tensor.items() if not lengths[number]
        ]
        if unchanged and task not in zero:
            yield f"not scaled, since {task} does not change them: {listed(unchanged, 3)}"
