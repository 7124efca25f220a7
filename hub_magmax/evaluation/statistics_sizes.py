"""Sizes of files of statistics, told before they are made, and room for them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import MERGEABLE_DTYPES, TensorInfo
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import OutputError
from hub_magmax.files import existing_parent, from_here, os_errors
from hub_magmax.methods.data_statistics import REPRESENTATION, StatisticsKind
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.text import Report, format_bytes, listed

#: Types of models whose layers are `Conv1D`: the inputs are the rows of a weight.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

#: Keys of configurations that say how many inputs the head has.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def tell_sizes(
    kind: StatisticsKind,
    base: TensorSource,
    changed: Collection[str],
    paths: Mapping[str, Path],
    report: Report,
) -> None:
    """Report how large the files are going to be, and where they go.

    Args:
        kind: Of the statistics.
        base: The base model.
        changed: Names of the tensors that some task changes.
        paths: Of the files that are made, by task.
        report: Called with a line.

    Raises:
        OutputError: If they have no room on their disk.
    """
    each = statistics_bytes(kind, base, changed)
    if not each:
        return
    report(
        f"{kind} statistics are made, about {format_bytes(each)} of each task: "
        f"{listed([from_here(path) for path in paths.values()], 3)}"
    )
    needed: dict[int, int] = {}
    for path in paths.values():
        with os_errors(path):
            folder = existing_parent(path)
            device, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        needed[device] = needed.get(device, 0) + each
        if needed[device] > free:
            raise OutputError(
                f"{kind} statistics of the tasks take about {format_bytes(each * len(paths))}, and "
                f"{format_bytes(free)} are free",
                where=from_here(path),
                hint="Free some space, or name folders on another disk: tasks.statistics.",
            )


def statistics_bytes(kind: StatisticsKind, base: TensorSource, changed: Collection[str]) -> int:
    """Return about how many bytes a task's file has; 0 where that is not known before its model runs.

    Args:
        kind: Of the statistics.
        base: The base model.
        changed: Names of the tensors that some task changes.
    """
    tensors, config = [base.index.tensors[name] for name in changed], stated_config(base)
    if kind == REPRESENTATION:
        return _of_head(config)
    return 4 * sum(_of_elements(tensors) if kind == "fisher" else _of_inputs(tensors, config))


def _of_head(config: Mapping[str, Any]) -> int:
    """Return the bytes of two squares in float64 of the head's inputs."""
    widths = (config.get(key) for key in _WIDTHS)
    return next((16 * width**2 for width in widths if isinstance(width, int)), 0)


def _of_elements(tensors: Iterable[TensorInfo]) -> Iterator[int]:
    return (info.num_elements for info in tensors if info.dtype in MERGEABLE_DTYPES)


def _of_inputs(tensors: Iterable[TensorInfo], config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the elements of the square of each layer's inputs."""
    side = 0 if config.get("model_type") in _TRANSPOSED else 1
    layers = (info.shape for info in tensors if len(info.shape) == 2 and matrices_in(info.name, info.shape))
    return (shape[side] ** 2 for shape in layers)
