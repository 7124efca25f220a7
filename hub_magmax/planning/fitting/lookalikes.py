"""Tensors that one checkpoint lacks and that look like tensors it has: no rule may drop these."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.names.matching import Matching, match_names
from hub_magmax.planning.fitting.globs import grouped
from hub_magmax.recipe.renaming import collapsed
from hub_magmax.text import listed, shown

_RENAME = (
    "Give them the base model's names: python -c \"from safetensors.torch import load_file as load, "
    "save_file as save; save({k.replace('OLD', 'NEW', 1): v for k, v in load('IN').items()}, 'OUT', "
    "{'format': 'pt'})\"."
)
#: Brings two layouts of the same numbers to one.
SAVE_AGAIN = (
    "Bring both to one layout: load each with transformers, in one version, and save it with "
    "`save_pretrained('OUT', save_original_format=False)`."
)
_LEAVE_OUT = "Rules use the base model's names: leave out the rules for the task's own names."
_LOCK_AGAIN = "Lock the recipe again: `hub-magmax lock` finds which tensor stands for which."
_ANOTHER = (
    "It is another model, or an adapter or a part of one in a format that is not known: name a whole model "
    "that was fine-tuned from this base model. An adapter is merged first, by the program that trained it."
)

#: Share of the base model's tensors from which on a task that lacks them is not what a rule is for.
_MOST = 0.5


@dataclass(frozen=True)
class Lookalikes:
    """Tensors of both sides that seem to be the same.

    Attributes:
        own, base: Their names in the checkpoint and in the base model.
        what: Says so, as a clause about the checkpoint.
        step: What to do, as a sentence.
    """

    own: tuple[str, ...]
    base: tuple[str, ...]
    what: str
    step: str


def lookalikes(
    index: CheckpointIndex,
    base: CheckpointIndex,
    missing: Sequence[str],
    surplus: Sequence[str],
    is_ruled: Callable[[str], bool],
) -> Lookalikes | None:
    """Return tensors that a checkpoint lacks and that seem to be there otherwise, or None.

    All of them where it holds nothing else: no rule makes it a checkpoint of the base model.

    Args:
        index, base: Of the checkpoint, and of the base model.
        missing: Names that the checkpoint lacks and no rule is about.
        surplus: Names that the base model lacks.
        is_ruled: Says whether a rule of the recipe decides about a name.
    """
    if not missing or not surplus:
        return None
    matching = match_names(
        {name: index.tensors[name] for name in surplus}, {name: base.tensors[name] for name in missing}
    )
    if matching.pairs or matching.doubtful:
        return _renamed(matching, is_ruled)
    own, others = _renumbered(index, base, missing, surplus)
    if others:
        what = f"has {_few(own)} in place of {_few(others)}, which differ in numbers alone"
        return Lookalikes(own, others, what, _RENAME)
    own, others = _in_another_layout(index, base, missing, surplus)
    if others:
        what = (
            f"has {_few(own)} in place of {_few(others)}, which looks like another layout of the same numbers"
        )
        return Lookalikes(own, others, what, SAVE_AGAIN)
    return _of_all(index, base, missing, surplus)


def _of_all(
    index: CheckpointIndex, base: CheckpointIndex, missing: Sequence[str], surplus: Sequence[str]
) -> Lookalikes | None:
    """Return all tensors where most have other names, or where a checkpoint holds none of the base model."""
    if _is_most(index, base, missing, surplus):
        what = f"calls {len(missing):,} of {len(base.tensors):,} tensors otherwise, such as {_few(missing)}"
        return Lookalikes(tuple(surplus), tuple(missing), f"{what}, and has {_few(surplus)}", SAVE_AGAIN)
    if len(missing) == len(base.tensors):
        what = f"holds none of the base model's {len(missing):,} tensors, but {_few(surplus)}"
        return Lookalikes(tuple(surplus), tuple(missing), what, _ANOTHER)
    return None


def _renamed(matching: Matching, is_ruled: Callable[[str], bool]) -> Lookalikes:
    """Return names that stand for one of the base model's, or could stand for several."""
    if matching.pairs:
        own, others = tuple(matching.pairs), tuple(matching.pairs.values())
        step = _LEAVE_OUT if any(map(is_ruled, own)) else _LOCK_AGAIN
        return Lookalikes(own, others, f"calls {_few(others)} of the base model {_few(own)}", step)
    own = tuple(matching.doubtful)
    others = tuple(dict.fromkeys(name for names in matching.doubtful.values() for name in names))
    return Lookalikes(own, others, f"has {_few(own)}, which could be {_few(others, 'or')}", _RENAME)


def _few(names: Iterable[str], word: str = "and") -> str:
    return listed([shown(pattern) for pattern in grouped(names)], 3).replace(" and ", f" {word} ")


def _renumbered(
    index: CheckpointIndex, base: CheckpointIndex, missing: Sequence[str], surplus: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return tensors of both sides whose names differ in numbers alone, such as layers counted from 1."""
    mine = {(collapsed(name)[0], index.tensors[name].shape): name for name in surplus}
    theirs = {(collapsed(name)[0], base.tensors[name].shape): name for name in missing}
    both = mine.keys() & theirs.keys()
    return (
        tuple(name for name in surplus if (collapsed(name)[0], index.tensors[name].shape) in both),
        tuple(name for name in missing if (collapsed(name)[0], base.tensors[name].shape) in both),
    )


def _in_another_layout(
    index: CheckpointIndex, base: CheckpointIndex, missing: Sequence[str], surplus: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return tensors of layers in which both sides have as many elements that the other one lacks.

    Layers are those of one name, or of one number where there are none: an inner model can be renamed too.
    """
    for is_named in (True, False):
        mine, theirs = _by_layer(surplus, is_named=is_named), _by_layer(missing, is_named=is_named)
        alike = [
            layer
            for layer in theirs.keys() & mine.keys()
            if 0 < _num_elements(index, mine[layer]) == _num_elements(base, theirs[layer])
        ]
        if alike:
            return _in_layers(alike, mine), _in_layers(alike, theirs)
    return (), ()


def _in_layers(layers: Iterable[str], names: Mapping[str, list[str]]) -> tuple[str, ...]:
    return tuple(sorted(chain.from_iterable(names[layer] for layer in layers)))


def _num_elements(index: CheckpointIndex, names: Iterable[str]) -> int:
    return sum(index.tensors[name].num_elements for name in names)


def _by_layer(names: Iterable[str], *, is_named: bool) -> dict[str, list[str]]:
    """Return names by their first number, with what stands before it if that names the layer too."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        segments = name.split(".")
        first = next((place for place, segment in enumerate(segments) if segment.isdecimal()), None)
        if first is not None:
            found[".".join(segments[0 if is_named else first : first + 1])].append(name)
    return found


def _is_most(
    index: CheckpointIndex, base: CheckpointIndex, missing: Sequence[str], surplus: Sequence[str]
) -> bool:
    """Say whether most of the base model is missing, and tensors of its shapes are there."""
    shapes = Counter(base.tensors[name].shape for name in missing)
    there = shapes & Counter(index.tensors[name].shape for name in surplus)
    return len(missing) > _MOST * len(base.tensors) and there.total() > _MOST * len(missing)
