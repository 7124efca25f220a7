"""Tied weights that adapters train: what is one parameter in the base model, and no longer with an adapter.

PEFT adapts modules. An adapter of one module of a tied model, or of several with factors of their own, leaves
the others as they are in the base model, so the tie is gone where the adapter is loaded. (PEFT's
`merge_and_unload` adds a product to the one parameter, and so to all.) With `ensure_weight_tying` PEFT trains
one parameter, and stores it under all names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hub_magmax.checkpoints.adapters.layout import sorted_names
from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.names.conversion_tables import model_names
from hub_magmax.checkpoints.names.model_classes import declares_ties, tied_names
from hub_magmax.checkpoints.source import TensorSource


def may_untie(adapter: CheckpointIndex, base: CheckpointIndex) -> bool:
    """Say whether an adapter may change what models tie: embeddings, whole matrices, what is not stored."""
    factors, whole = sorted_names(adapter)
    return (
        any(is_embedding or f"{module}.weight" not in base.tensors for module, is_embedding in factors)
        or any(len(adapter.tensors[path].shape) == 2 for path in whole.values())
        or any(name not in base.tensors for name in whole)
    )


def ties_of_class(base: TensorSource) -> dict[str, str]:
    """Return tensors that the base model's files lack, since its class ties them, with the stored ones.

    The installed transformers is asked, which takes a second or two. Empty where nothing is tied.
    """
    config, stored = stated_config(base), base.index.tensors
    if not declares_ties(config):
        return {}
    ties = tied_names(config)
    names = None if stored.keys() >= {*ties.values()} else model_names(config, stored)
    in_file: Mapping[str, str] = names.of_model if names else {}
    found = {in_file.get(name, name): in_file.get(of, of) for name, of in ties.items()}
    return {name: of for name, of in found.items() if of in stored and name not in stored}


def with_tied_names(index: CheckpointIndex, ties: Mapping[str, str]) -> CheckpointIndex:
    """Return an index that has tied tensors under all of their names."""
    tied = {name: replace(index.tensors[of], name=name) for name, of in ties.items()}
    return replace(index, tensors={**tied, **index.tensors})


def untie(ties: Mapping[str, str], trained: Iterable[str]) -> dict[str, str] | None:
    """Return the ties of a base model with an adapter; None where they are the base model's.

    Args:
        ties: Of the base model: names, and the tensor that each is.
        trained: Tensors that the adapter changes.
    """
    trained, groups = {*trained}, dict[str, list[str]]()
    for name, of in ties.items():
        groups.setdefault(of, [of]).append(name)
    if not any(trained.intersection(group) for group in groups.values()):
        return None
    found: dict[str, str] = {}
    for group in groups.values():
        as_before = [name for name in group if name not in trained]
        found |= dict.fromkeys(as_before[1:], as_before[0]) if as_before else {}
    return found


def completed_ties(source: TensorSource, found: Mapping[str, str], ties: Mapping[str, str]) -> dict[str, str]:
    """Return the ties of a whole checkpoint, with names that it lacks and that an adapter trains apart.

    Args:
        source: The checkpoint, under the base model's names.
        found: Its ties.
        ties: Of the base model.
    """
    stored = source.index.tensors
    lacking = {
        name: found.get(of, of)
        for name, of in ties.items()
        if name not in stored and found.get(of, of) in stored
    }
    if lacking.keys() <= found.keys() or declares_ties(stated_config(source)) is False:
        return dict(found)
    return {**lacking, **found}
