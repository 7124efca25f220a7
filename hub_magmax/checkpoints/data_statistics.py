"""Statistics of tasks' data in files: opened as a lock pins them, and read tensor by tensor.

A folder of statistics has a safetensors file of each kind, `gram.safetensors` and `fisher.safetensors`, with
the base model's names of tensors. The texts in its header say what it was made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hub_magmax.checkpoints.index import MERGEABLE_DTYPES
from hub_magmax.checkpoints.opening import open_source
from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, NonFiniteError
from hub_magmax.methods.data_statistics import StatisticsKind, TensorStatistics
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float32

#: Texts in the header of a file: its kind, tensors whose inputs are rows, and the root mean square.
KIND, TRANSPOSED, SCALE = "statistics", "transposed", "root_mean_square"

AGAIN = "Remove the file, so that `hub-magmax lock` makes it again."


class DataStatistics:
    """Statistics of one kind of all tasks, tensor by tensor.

    Args:
        kind: Of all of them.
        sources: By task, in order.

    Raises:
        CheckpointError: If a file holds another kind, or its header is no sound one.
    """

    def __init__(self, kind: StatisticsKind, sources: Mapping[str, TensorSource]) -> None:
        self.kind, self.sources = kind, dict(sources)
        facts = {task: facts_of(source, kind) for task, source in sources.items()}
        self._scales = {task: _scale(sources[task], facts[task], kind) for task in sources}
        self._transposed = {task: _names(sources[task], facts[task]) for task in sources}

    def of(self, tensor: str) -> tuple[TensorStatistics | None, ...]:
        """Return what is known of a tensor, by task in order."""
        return tuple(self._of(task, source, tensor) for task, source in self.sources.items())

    def _of(self, task: str, source: TensorSource, tensor: str) -> TensorStatistics | None:
        info = source.index.tensors.get(tensor)
        if info is None:
            return None
        read = partial(_read, source, tensor, is_mass=self.kind == "fisher")
        return TensorStatistics(
            read, info.num_elements, self._scales[task], is_transposed=tensor in self._transposed[task]
        )


def facts_of(source: TensorSource, kind: StatisticsKind) -> Mapping[str, str]:
    """Return the texts in the header of a file of statistics.

    Raises:
        CheckpointError: If it is no such file, or one of another kind.
    """
    facts = source.index.shards[0].metadata
    if facts.get(KIND) != kind:
        found = f"{facts[KIND]} statistics" if KIND in facts else "no statistics"
        raise CheckpointError(
            f"these are {found}", where=source.label, expected=f"{kind} statistics", hint=AGAIN
        )
    wrong = [name for name, info in source.index.tensors.items() if info.dtype not in MERGEABLE_DTYPES]
    if wrong:
        raise CheckpointError(
            f"{wrong[0]!r} is stored as {source.index.tensors[wrong[0]].dtype}",
            where=source.label,
            expected="floating-point numbers",
            hint=AGAIN,
        )
    return facts


def _scale(source: TensorSource, facts: Mapping[str, str], kind: StatisticsKind) -> float:
    if kind != "fisher":
        return 1.0
    try:
        found = float(facts.get(SCALE, ""))
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found <= 0:
        raise CheckpointError(
            f"{SCALE} is {facts.get(SCALE)!r}", where=source.label, expected="a positive number", hint=AGAIN
        )
    return found


def _names(source: TensorSource, facts: Mapping[str, str]) -> frozenset[str]:
    try:
        found = json.loads(facts.get(TRANSPOSED, "[]"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{TRANSPOSED} is no list of names", where=source.label, hint=AGAIN)
    return frozenset(found)


def _read(
    source: TensorSource, tensor: str, start: int, stop: int, *, is_mass: bool
) -> Float32[np.ndarray, " some"]:
    found: Float32[np.ndarray, " some"] = source.read(tensor, start, stop).float().numpy()
    sound = np.isfinite(found) & (found >= 0) if is_mass else np.isfinite(found)
    if not sound.all():
        first = int(np.flatnonzero(~sound)[0])
        raise NonFiniteError(
            f"element {start + first:,} is {found[first]}",
            where=tensor_place(source, source.index.tensors[tensor], start + first),
            expected="finite numbers that are not negative" if is_mass else "finite numbers only",
            hint=AGAIN,
        )
    return found


@contextmanager
def open_statistics(
    recipe: Recipe, lock: Lock, kind: StatisticsKind | None, cache: SourceCache | None = None
) -> Iterator[DataStatistics | None]:
    """Open the statistics of a kind that a lock pins; None where it has none, or a method needs none.

    Raises:
        CheckpointError: If they are no sound statistics of this kind.
        LockError: If they changed since.
    """
    if kind is None or kind not in lock.statistics:
        yield None
        return
    cache = cache or SourceCache()
    with ExitStack() as stack:
        opened = {
            task: stack.enter_context(closing(open_source(recipe, locked, cache)))
            for task, locked in lock.statistics[kind].items()
        }
        yield DataStatistics(kind, opened)
