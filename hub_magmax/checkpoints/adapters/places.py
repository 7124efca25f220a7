"""Places of an adapter's layers in the files of its base model, where both have other names for them.

An adapter has the names of the class it was trained with. That class can have a prefix more or less than the
base model's files, and transformers 5 renames layers, and splits or joins them, between files and class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.names.conversion_tables import Joint, ModelNames, model_names

#: A name with rows, as `find_places` writes it: `attn.Wqkv.weight[0:32]`.
_WITH_ROWS = re.compile(r"(?P<name>.*)\[(?P<start>\d+):(?P<stop>\d+)\]")

#: Rows from one to before another.
Rows = tuple[int, int]


class Place(NamedTuple):
    """One place of a tensor of an adapter in the base model's files.

    Attributes:
        name: Tensor of the base model.
        start_row: Its row at which the adapter's tensor begins.
        rows: Rows of the adapter's tensor that belong there; None: all.
        num_rows: How many rows of the base model's tensor they are; None: all.
    """

    name: str
    start_row: int = 0
    rows: Rows | None = None
    num_rows: int | None = None


#: From the name of a tensor in an adapter to its places in the base model's files.
Places = Callable[[str], list[Place]]


def places_by_prefix(base: CheckpointIndex, modules: list[str]) -> Places | None:
    """Return the places of tensors whose names differ by a prefix, or not; None where layers are not there.

    Args:
        base: Tensors of the base model.
        modules: Names of the adapter's layers.
    """
    names = base.tensors
    for more, less in _prefixes(names, modules[0] if modules else ""):
        if all(f"{more}{module.removeprefix(less)}.weight" in names for module in modules):
            return lambda name: [Place(f"{more}{name.removeprefix(less)}")]
    return None


def _prefixes(names: Iterable[str], module: str) -> list[tuple[str, str]]:
    """Return prefixes to add and to remove, in the order of trying, given one of the layers."""
    ends = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    added = dict.fromkeys(end.removesuffix(module) for end in ends if end.endswith(f".{module}"))
    first, dot, _ = module.partition(".")
    return [("", ""), *((prefix, "") for prefix in added), *([("", first + dot)] if dot else [])]


def known_places(base: CheckpointIndex, modules: list[str], found: Mapping[str, str] | None) -> Places | None:
    """Return the places that `find_places` found, or where it was not asked, those that names tell."""
    return places_by_prefix(base, modules) if found is None else _places_by_name(found)


def _places_by_name(found: Mapping[str, str]) -> Places:
    """Return the places that `find_places` found; other tensors keep their names."""
    places: dict[str, list[Place]] = {}
    for written, where in found.items():
        (name, rows), (tensor, in_tensor) = _parsed(written), _parsed(where)
        start, stop = in_tensor or (0, None)
        places.setdefault(name, []).append(Place(tensor, start, rows, None if stop is None else stop - start))
    return lambda name: places.get(name) or [Place(name)]


def _parsed(written: str) -> tuple[str, Rows | None]:
    if match := _WITH_ROWS.fullmatch(written):
        return match["name"], (int(match["start"]), int(match["stop"]))
    return written, None


def find_places(
    known: CheckpointIndex, base: CheckpointIndex, config: Mapping[str, Any], names: list[str]
) -> dict[str, str] | None:
    """Return where tensors of an adapter are in the base model's files, by transformers' tables.

    Builds the base model's class without memory for weights, which takes seconds.

    Args:
        known: Tensors of the base model, tied ones under all of their names.
        base: Tensors of its files.
        config: Values of its config.json.
        names: Tensors that the adapter changes, as it calls them, `.weight` included.

    Returns:
        Names of the base model by the adapter's, where they differ. Where only some rows correspond, as of
        projections side by side, a name ends in them: `attn.Wqkv.weight[0:32]`. None where transformers does
        not know the base model.
    """
    ours = model_names(config, base.tensors) if config else None
    theirs = model_names(config, names) if ours else None
    if ours is None or theirs is None:
        return None
    found: dict[str, str] = {}
    for name in names:
        if name not in known.tensors:
            found |= _found(name, theirs.of_file.get(name, name), ours, base)
    return found


def _found(name: str, in_model: str, ours: ModelNames, base: CheckpointIndex) -> dict[str, str]:
    """Return the places of one tensor, by its name in the model's class; none where it has none."""
    if in_model in (of_model := ours.of_model):
        return {name: of_model[in_model]}
    for joint in ours.split:
        if in_model in joint.parts[0] and (rows := _part_of(joint, in_model, base)):
            return {name: f"{joint.whole}[{rows[0]}:{rows[1]}]"}
    for joint in ours.joined:
        if joint.whole == in_model and not joint.is_stacked and joint.axis == 0:
            return _parts(name, joint, base)
    return {}


def _part_of(joint: Joint, part: str, base: CheckpointIndex) -> Rows | None:
    """Return the rows of one of several parts of a tensor in the base model's file, as if all were equal.

    Where they are not, the product does not have as many rows, and is refused for that.
    """
    num_rows, left_over = divmod(base.tensors[joint.whole].shape[0], len(joint.parts[0]))
    if left_over or joint.axis or joint.is_stacked:
        return None
    start = joint.parts[0].index(part) * num_rows
    return start, start + num_rows


def _parts(name: str, joint: Joint, base: CheckpointIndex) -> dict[str, str]:
    """Return the places of a tensor whose rows are several tensors in the base model's file."""
    found, start = {}, 0
    for part in joint.parts[0]:
        stop = start + base.tensors[part].shape[0]
        found[f"{name}[{start}:{stop}]"] = part
        start = stop
    return found
