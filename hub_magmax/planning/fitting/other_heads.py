"""Tasks whose model class has another head than the base model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hub_magmax.checkpoints.adapters.config import config_of, parse_config
from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.names.model_classes import tensors_of_class
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.planning.fitting.architectures import classes_of
from hub_magmax.planning.statistics import may_lack
from hub_magmax.recipe.lockfile import Lock


@dataclass(frozen=True)
class OtherHead:
    """A task whose model class has another head than the base model's.

    Attributes:
        task: Its name.
        model_class: Name of the class.
        unused: Names of the base model's tensors that the class has no use for.
    """

    task: str
    model_class: str
    unused: frozenset[str]


def other_heads(lock: Lock, opened: Mapping[str, TensorSource]) -> Iterator[OtherHead]:
    """Yield the tasks whose class, stated or that of an adapter's training, is not the base model's.

    Args:
        lock: Says which tasks are adapters, and the classes of the others.
        opened: The base model and the tasks by name.
    """
    base = opened["base_model"]
    for task, locked in lock.tasks.items():
        if locked.adapter_config:
            name, unused = _of_adapter(opened[task], base)
        else:
            own = opened[task].index.tensors
            name = classes_of(locked)
            unused = {n for n, info in base.index.tensors.items() if n not in own and not may_lack(info)}
        if name not in ("", classes_of(lock.base_model)):
            yield OtherHead(task, name, frozenset(unused))


def _of_adapter(adapter: TensorSource, base: TensorSource) -> tuple[str, set[str]]:
    """Return the class that an adapter was trained with, and the base model's tensors that it has not."""
    asked = parse_config(config_of(adapter), adapter.label).model_class
    name, names = tensors_of_class(stated_config(base), asked) if asked else ("", frozenset[str]())
    parts = {known.partition(".")[0] for known in names}
    unused = {one for one in base.index.tensors if one.partition(".")[0] not in parts}
    # Files of a model without a head lack the prefix that its names have beside one.
    return name, set() if len(unused) == len(base.index.tensors) else unused
