"""Label rows: classification heads whose labels are numbered otherwise, with their rows in one order.

A classifier's configuration names its labels (`id2label`), and its head has a row for each. Where two
checkpoints name the same labels in another order, a row of one means what another row of the other means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hub_magmax.checkpoints.config import CONFIG_NAME, stated_config
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.source import ComputedRows, TensorSource
from hub_magmax.kernels.stored import Stored
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.schema import Recipe

#: Names by which transformers numbers labels that nobody named.
_UNNAMED = re.compile(r"(label|class)?[_ -]?\d+", re.IGNORECASE)

#: Weights and biases of heads, by a part of their names; layers before the last one are `dense`.
_HEAD = re.compile(
    r"(.*\.)?(\w*classifier\w*|score|\w*head\w*|fc|logits_proj|qa_outputs|summary|class_\w+)(\.(?!dense\b)\w+)*"
    r"\.(weight|bias)"
)


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of labels by row, in one spelling; None where a configuration does not name them."""
    try:
        named = _named(config)
    except (ValueError, AttributeError, TypeError):
        return None
    labels = tuple(named.get(row, "") for row in range(len(named)))
    is_clear = "" not in labels and len(set(labels)) == len(labels)
    return labels if is_clear and not all(map(_UNNAMED.fullmatch, labels)) else None


def _named(values: Mapping[str, Any]) -> dict[int, str]:
    if stated := values.get("id2label"):
        return {int(row): _spelled(name) for row, name in stated.items()}
    return {int(row): _spelled(name) for name, row in (values.get("label2id") or {}).items()}


def _spelled(name: Any) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def head_tensors(index: CheckpointIndex, num_labels: int) -> tuple[str, ...]:
    """Return the tensors with a row for each label, or with one more, as detectors have for no object."""
    return tuple(
        name
        for name, info in index.tensors.items()
        if info.shape[:1] in ((num_labels,), (num_labels + 1,)) and _HEAD.fullmatch(name)
    )


def rows_in_order(labels: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...] | None:
    """Return the row of each wanted label; None if the labels are not the same."""
    places = {label: row for row, label in enumerate(labels)}
    return tuple(places[label] for label in wanted) if places.keys() == set(wanted) else None


def with_label_orders(
    recipe: Recipe, sources: Mapping[str, LockedSource], opened: Mapping[str, TensorSource]
) -> dict[str, LockedSource]:
    """Return pinned sources with the order of their labels' rows, where it is not the merged model's.

    Args:
        recipe: Says whose configuration the merged model gets.
        sources: `base_model`, then the tasks; pinned.
        opened: The same, open.
    """
    if len({source.side_files.get(CONFIG_NAME) for source in sources.values()} - {None}) < 2:
        return dict(sources)
    labels = {name: labels_of(stated_config(source)) for name, source in opened.items()}
    found = label_rows(labels, recipe.output.files_from, opened["base_model"].index)
    return {name: replace(locked, label_rows=found.get(name)) for name, locked in sources.items()}


def label_rows(
    labels: Mapping[str, tuple[str, ...] | None], files_from: str, index: CheckpointIndex
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return by source, and by tensor, the rows that have the merged model's labels, where these are others.

    Args:
        labels: By source.
        files_from: The source whose configuration names the merged model's labels.
        index: Of the base model.
    """
    wanted = labels[files_from]
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, own in labels.items():
        rows = rows_in_order(own, wanted) if own and wanted else None
        if rows and rows != tuple(range(len(rows))):
            shapes = {tensor: index.tensors[tensor].shape[0] for tensor in head_tensors(index, len(rows))}
            found[name] = {tensor: (*rows, *range(len(rows), num)) for tensor, num in shapes.items()}
    return {name: rows for name, rows in found.items() if rows}


def with_label_rows(
    sources: Mapping[str, TensorSource], locked: Mapping[str, LockedSource]
) -> dict[str, TensorSource]:
    """Return the sources with the rows of their heads in the merged model's order."""
    return {
        name: LabelRows(source, rows) if (rows := locked[name].label_rows) else source
        for name, source in sources.items()
    }


class LabelRows(ComputedRows):
    """A checkpoint with the rows of some tensors in another order; a `TensorSource`.

    Args:
        source: The checkpoint.
        rows: By tensor, which row comes first, second, and so on.
    """

    def __init__(self, source: TensorSource, rows: Mapping[str, Sequence[int]]) -> None:
        super().__init__(source, rows)
        self._rows = rows

    @property
    def index(self) -> CheckpointIndex:
        return self.source.index

    def read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Stored:
        if name not in self._names or stop == start:
            return self.source.read_stored(name, start, stop, out)
        info = self.index.tensors[name]
        width = info.num_elements // info.shape[0]
        first, last = start // width, -(-stop // width)
        parts = [
            self.source.read_stored(name, row * width, (row + 1) * width)
            for row in self._rows[name][first:last]
        ]
        bits = np.concatenate([part.bits for part in parts])[start - first * width : stop - first * width]
        if out is None:
            return Stored(bits, parts[0].dtype)
        out[:] = bits
        return Stored(out, parts[0].dtype)
