"""Statistics of tasks' data in files: opened as a lock pins them, and read tensor by tensor.

A folder of statistics has a safetensors file of each kind, such as `gram.safetensors`, with the base model's
names of tensors; `representation.safetensors` has two matrices. The texts in the header say what a file was
made of.
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
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.methods.corrections import Products
from hub_magmax.methods.data_statistics import StatisticsKind, TensorStatistics
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float

#: Texts in the header of a file: its kind, tensors whose inputs are rows, the root mean square, and the head
#: whose inputs are represented.
KIND, TRANSPOSED, SCALE, HEAD = "statistics", "transposed", "root_mean_square", "head"

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
        self._facts = {task: facts_of(source, kind) for task, source in sources.items()}
        self._scales = {task: _scale(source, self._facts[task], kind) for task, source in sources.items()}
        self._transposed = {task: _names(source, self._facts[task]) for task, source in sources.items()}

    def of(self, tensor: str) -> tuple[TensorStatistics | None, ...]:
        """Return what is known of a tensor, by task in order."""
        return tuple(self._of(task, source, tensor) for task, source in self.sources.items())

    @property
    def head(self) -> str:
        """The tensor whose inputs the representations are.

        Raises:
            CheckpointError: If files do not say the same.
        """
        named = {task: facts.get(HEAD, "") for task, facts in self._facts.items()}
        first = next(iter(named.values()))
        for task, name in named.items():
            if not name or name != first:
                raise CheckpointError(
                    f"these are representations before {name!r}",
                    where=self.sources[task].label,
                    expected=f"those before {first!r}, as of the other tasks" if first else "a named head",
                    hint=AGAIN,
                )
        return first

    def dimensions(self, task: str) -> int:
        """Return how many dimensions the representations of a task have.

        Raises:
            CheckpointError: If their products are no two square matrices of one size.
        """
        source = self.sources[task]
        shapes = {name: info.shape for name, info in source.index.tensors.items()}
        size = shapes.get("gram", ())[:1] * 2
        if shapes != dict.fromkeys(Products._fields, size) or not all(size):
            raise CheckpointError(
                f"there are {', '.join(f'{name} {[*shape]}' for name, shape in sorted(shapes.items()))}",
                where=source.label,
                expected=f"{' and '.join(Products._fields)}, square and of one size",
                hint=AGAIN,
            )
        return size[0]

    def products(self, task: str) -> Products:
        """Return sums of products of representations, of a task.

        Raises:
            CheckpointError: If they are not sound.
        """
        source, size = self.sources[task], self.dimensions(task)
        read = partial(_read, source, start=0, stop=size * size, is_mass=False, is_wide=True)
        return Products(*(torch.from_numpy(read(name)).view(size, size) for name in Products._fields))

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
    source: TensorSource, tensor: str, start: int, stop: int, *, is_mass: bool, is_wide: bool = False
) -> Float[np.ndarray, " some"]:
    """Return finite elements, those of a mass not negative, as float32, or as float64 where they are wide."""
    values = source.read(tensor, start, stop)
    found: Float[np.ndarray, " some"] = (values.double() if is_wide else values.float()).numpy()
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
