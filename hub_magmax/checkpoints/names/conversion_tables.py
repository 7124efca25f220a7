"""Names of a checkpoint's tensors in transformers' model classes, by the tables of the installed version.

transformers 5 renames, stacks and splits tensors when it loads a checkpoint, and undoes that when it saves
one, unless told otherwise (`save_original_format=False`). So files of one architecture hold the same numbers
under different names. Both lead to the names of the model class, by which they can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hub_magmax.checkpoints.config import with_special_floats

#: Operations of the tables that put tensors beside each other or take them apart.
_BESIDE = ("Concatenate", "Chunk", "Split")

#: Keys of a configuration that say nothing about names, and can ask for code or packages.
_ASIDE = ("model_type", "quantization_config", "auto_map")

#: Tables of transformers that give the class of a configuration that names none: with its usual head.
_CLASSES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_MAPPING",
)


@dataclass(frozen=True)
class Joint:
    """One tensor that holds several others: experts stacked, or projections side by side.

    The parts lie side by side along `axis`; where they are stacked, every row of `parts` is one entry of
    the new first axis, and `axis` counts from there.

    Attributes:
        whole: Name of the tensor that holds all.
        parts: Names of the tensors that it holds: a row for each that is stacked, one row otherwise.
        axis: Axis of `whole` along which the parts of a row lie side by side; unused where a row has one.
        is_stacked: Whether the rows are stacked along a first axis that the parts lack.
    """

    whole: str
    parts: tuple[tuple[str, ...], ...]
    axis: int
    is_stacked: bool


@dataclass(frozen=True)
class ModelNames:
    """Names that a model class gives to the tensors of one checkpoint.

    Attributes:
        of_file: Name in the model by name in the file, of tensors that are only renamed, or not.
        joined: Tensors of the model that are several in the file: `parts` are the file's.
        split: Tensors of the file that are several in the model: `whole` is the file's.
        other: Names in the file of tensors whose numbers have another order in the model, which no `Joint`
            describes, by what is done to them.
    """

    of_file: Mapping[str, str]
    joined: tuple[Joint, ...] = ()
    split: tuple[Joint, ...] = ()
    other: Mapping[str, str] = field(default_factory=dict)

    @property
    def of_model(self) -> dict[str, str]:
        """Name in the file by name in the model, the inverse of `of_file`."""
        return {model: file for file, model in self.of_file.items()}


def model_names(config: Mapping[str, Any], names: Iterable[str]) -> ModelNames | None:
    """Return what transformers' model class calls the tensors of a checkpoint.

    Builds the class that the configuration names without memory for weights, which takes seconds: call it
    only where names do not match otherwise. Nothing is read, and no code of a checkpoint is run.

    A layer `vit.layers.0.attention.q_proj` of the class whose file says
    `vit.encoder.layer.0.attention.attention.query` is found by
    `model_names(config, names).of_model["vit.layers.0.attention.q_proj.weight"]`.

    Args:
        config: Values of the checkpoint's config.json.
        names: Names of its tensors, in any form that transformers reads.

    Returns:
        The names, or None if transformers does not know the architecture or has no tables.
    """
    model = _model_of(config)
    if model is None:
        return None
    from transformers.core_model_loading import dot_natural_key

    renamings, converters = _table_of(model)
    known, prefix = model.state_dict(), model.base_model_prefix
    plain: dict[str, str] = {}
    gathered: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(names, key=dot_natural_key):  # some entries count on this order
        found, pattern = _renamed(name, renamings, converters, prefix, known)
        if pattern is None:
            plain[name] = found
        else:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            _, sources = gathered.setdefault(found, (converter, {}))
            sources.setdefault(pattern, []).append(name)
    return _sorted_out(plain, gathered)


#: Names of an expert's matrices, and of the tensor that holds those of all experts, stacked.
_EXPERTS = (
    (("w1", "w3"), "gate_up_proj"),
    (("w2",), "down_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    (("down_proj",), "down_proj"),
)
_EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<row>\d+)\.(?P<part>\w+)\.weight")


def expert_names(names: Iterable[str]) -> ModelNames:
    """Return the names of mixtures of experts in the way of transformers 5, without asking it.

    For architectures that it does not know. Experts that are stored one by one belong to stacked tensors,
    and `block_sparse_moe` is called `mlp`.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    plain = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            part = found.setdefault(match["before"], {}).setdefault(match["part"], {})
            part[int(match["row"])] = name
        else:
            plain[name] = name.replace(".block_sparse_moe.", ".mlp.")
    return ModelNames(plain, tuple(joint for before in found for joint in _stacked(before, found[before])))


def _stacked(before: str, parts: Mapping[str, Mapping[int, str]]) -> Iterator[Joint]:
    """Yield the stacked tensors of one layer's experts, given the names of their matrices by kind and row."""
    for kinds, whole in _EXPERTS:
        columns = [parts.get(kind, {}) for kind in kinds]
        count = len(columns[0])
        if count and all(sorted(column) == [*range(count)] for column in columns):
            rows = tuple(tuple(column[row] for column in columns) for row in range(count))
            name = f"{before}.{whole}".replace(".block_sparse_moe.", ".mlp.")
            yield Joint(name, rows, 1 if len(kinds) > 1 else 0, is_stacked=True)


def _table_of(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the entries of the tables that rename, and those that convert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return [entry for entry in table if not isinstance(entry, WeightConverter)], converters


def _renamed(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, known: dict[str, Any]
) -> tuple[str, str | None]:
    """Return the first name in the model, and the pattern of the conversion if there is one."""
    from transformers.core_model_loading import rename_source_key

    found: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, known)
    if found[0] not in known and name in known:
        found = rename_source_key(name, [], [], prefix, known)
    return found


def _sorted_out(
    plain: Mapping[str, str], gathered: Mapping[str, tuple[Any, Mapping[str, list[str]]]]
) -> ModelNames:
    """Sort conversions into those that join, those that split, and the rest."""
    joined, split, other = [], [], {}
    for first, (converter, sources) in gathered.items():
        joint = _joint(first, converter, sources)
        if joint is None:
            kinds = " and ".join(type(operation).__name__ for operation in converter.operations)
            other.update({name: kinds for found in sources.values() for name in found})
        elif joint.whole == first:
            joined.append(joint)
        else:
            split.append(joint)
    return ModelNames(plain, tuple(joined), tuple(split), other)


def _joint(first: str, converter: Any, sources: Mapping[str, list[str]]) -> Joint | None:
    """Return what a conversion does as a `Joint`, or None if it is something else."""
    operations = {type(operation).__name__: operation for operation in converter.operations}
    is_stacked = operations.pop("MergeModulelist", None) is not None
    rows = _rows(converter, sources, is_stacked=is_stacked)
    if rows is None or len(operations) > 1 or not operations.keys() <= set(_BESIDE):
        return None
    axis = next((operation.dim for operation in operations.values()), 0)
    targets = converter.target_patterns
    if len(targets) == 1:
        return Joint(first, rows, axis, is_stacked)
    parts = tuple(first.replace(targets[0], one) for one in targets)
    return None if is_stacked or len(rows[0]) > 1 else Joint(rows[0][0], (parts,), axis, is_stacked=False)


def _rows(
    converter: Any, sources: Mapping[str, list[str]], *, is_stacked: bool
) -> tuple[tuple[str, ...], ...] | None:
    """Return the file's names as rows of parts, or None where some are missing."""
    columns = [sources.get(pattern, []) for pattern in converter.source_patterns]
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        return None
    if is_stacked:
        return tuple(zip(*columns, strict=True))
    return (tuple(name for column in columns for name in column),)


def layer_kinds(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the class of every module of a model that has a weight, by name; None where it is not known.

    Builds the model's class as `model_names` does. A convolution of groups is "grouped".
    """
    model = _model_of(config)
    if model is None:
        return None
    return {
        name: "grouped" if getattr(module, "groups", 1) != 1 else type(module).__name__
        for name, module in model.named_modules()
        if getattr(module, "_parameters", {}).get("weight") is not None
    }


def _model_of(config: Mapping[str, Any]) -> Any:
    """Return the model of a configuration without memory for its weights, or None if it is not known."""
    import torch

    with _quiet():
        try:
            from transformers import AutoConfig

            stated = {key: value for key, value in config.items() if key not in _ASIDE}
            built = AutoConfig.for_model(config["model_type"], **with_special_floats(stated))
            with torch.device("meta"):
                return _class_of(built)(built)
        except Exception:  # whatever a configuration of a stranger makes a class raise: then it is not known
            return None


def _class_of(config: Any) -> Any:
    """Return the class that a configuration names, or else the usual one of its type."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = (getattr(transformers, str(name), None) for name in config.architectures or ())
    tables = (getattr(modeling_auto, table) for table in _CLASSES)
    usual = (table[type(config)] for table in tables if type(config) in table)
    return next(kind for kind in (*named, *usual) if kind is not None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning about a configuration that nobody asked it to load."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
