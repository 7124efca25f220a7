"""Renamings of the tasks' tensors to the base model's, found when a recipe is locked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import CheckpointIndex, TensorInfo
from hub_magmax.checkpoints.names.conversion_tables import Joint, ModelNames, expert_names, model_names
from hub_magmax.checkpoints.names.matching import (
    fits,
    match_names,
    names_without_wrappers,
    plain_name,
    unwrapped,
)
from hub_magmax.checkpoints.names.renamed import places, unwrapped_base
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.renaming import NUMBER, ROW, LockedJoint, Renaming, collapsed, filled
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import rule_for


def with_renamings(
    recipe: Recipe, sources: Mapping[str, LockedSource], opened: Mapping[str, TensorSource]
) -> dict[str, LockedSource]:
    """Return the sources, each with the renaming that brings its tensors to the base model's plain names.

    A task whose names are the base model's, and one of which no renaming is sure, stays as it is; planning
    then says what differs. Tensors that a rule of the recipe names by the task's own name keep it.

    Args:
        recipe: For its rules.
        sources: `base_model`, then the tasks; pinned.
        opened: The same, open.
    """
    unwrapping = find_unwrapping(opened["base_model"], recipe)
    base = unwrapped_base(opened["base_model"], unwrapping)
    tasks = {
        name: locked
        if locked.adapter_config
        else replace(locked, renamed=find_renaming(opened[name], base, recipe))
        for name, locked in sources.items()
        if name != "base_model"
    }
    return {"base_model": replace(sources["base_model"], renamed=unwrapping), **tasks}


def find_unwrapping(base: TensorSource, recipe: Recipe) -> Renaming | None:
    """Return the renaming of a base model whose names wrappers changed, such as `_orig_mod.`, or None.

    A library that loads the merged model would find none of its tensors. `module.` is taken from all names
    only where config.json says that transformers loads the model, which has no such names.
    """
    is_known = isinstance(stated_config(base).get("model_type"), str)
    pairs = names_without_wrappers(base.index.tensors, is_outer_known=is_known)
    free = {name: plain for name, plain in pairs.items() if _is_free(name, plain, recipe)}
    return Renaming(tuple(_name_patterns(free))) if free else None


@dataclass
class _Found:
    """Tensors of a task that stand for the base model's under other names.

    Attributes:
        pairs: The base model's name by the task's.
        joints: Tensors that are one on one side and several on the other; whether the whole is the task's.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    joints: list[tuple[Joint, bool]] = field(default_factory=list)

    @property
    def own_names(self) -> set[str]:
        joined = (joint for joint, is_own in self.joints if not is_own)
        wholes = {joint.whole for joint, is_own in self.joints if is_own}
        return {*self.pairs, *wholes, *(name for joint in joined for row in joint.parts for name in row)}

    @property
    def base_names(self) -> set[str]:
        split = (joint for joint, is_own in self.joints if is_own)
        wholes = {joint.whole for joint, is_own in self.joints if not is_own}
        return {
            *self.pairs.values(),
            *wholes,
            *(name for joint in split for row in joint.parts for name in row),
        }


def find_renaming(own: TensorSource, base: TensorSource, recipe: Recipe) -> Renaming | None:
    """Return the renaming from a task's names to the base model's, or None where there is none to find."""
    mine, theirs = _lacking(own.index, base.index), _lacking(base.index, own.index)
    if not mine or not theirs:
        return None
    found = _Found(dict(match_names(mine, theirs).pairs))
    if found.pairs.keys() < mine.keys() and set(found.pairs.values()) < theirs.keys():
        _add_by_tables(found, own, base)
    found.pairs |= _surplus(found, own.index, base.index)
    found.pairs = {one: other for one, other in found.pairs.items() if _is_free(one, other, recipe)}
    found.joints = [joint for joint in found.joints if _is_joint_free(*joint, recipe)]
    return _as_patterns(found, own.index, base.index)


def _lacking(one: CheckpointIndex, other: CheckpointIndex) -> dict[str, TensorInfo]:
    """Return the tensors that the other checkpoint lacks; names with signs of patterns stay what they are."""
    if one.tensors.keys() <= other.tensors.keys():
        return {}
    return {
        name: info
        for name, info in one.tensors.items()
        if name not in other.tensors and NUMBER not in name and ROW not in name
    }


def _surplus(found: _Found, own: CheckpointIndex, base: CheckpointIndex) -> dict[str, str]:
    """Return the names that tensors get which the base model lacks, such as another head's.

    A prefix that is on all names is no part of theirs either, and wrappers' segments are of no name.
    """
    starts = {one.removesuffix(other) for one, other in found.pairs.items()}
    start = starts.pop() if len(starts) == 1 else ""
    if not all(name.startswith(start) for name in own.tensors):
        start = ""
    taken, names = found.own_names, dict[str, str]()
    for name in _lacking(own, base).keys() - taken:
        shorter = unwrapped(name.removeprefix(start))
        if shorter != name and shorter not in own.tensors and shorter not in base.tensors:
            names[name] = shorter
    return names if len(set(names.values())) == len(names) else {}


def _is_free(own: str, base: str, recipe: Recipe) -> bool:
    """Say whether no rule means a tensor by the task's own name."""
    rule = rule_for(own, recipe.tensors)
    return rule is None or rule.covers(base)


def _is_joint_free(joint: Joint, is_own: bool, recipe: Recipe) -> bool:
    parts = [name for row in joint.parts for name in row]
    own, base = ([joint.whole], parts) if is_own else (parts, [joint.whole])
    return all(_is_free(one, other, recipe) for one in own for other in base)


def _add_by_tables(found: _Found, own: TensorSource, base: TensorSource) -> None:
    """Add what transformers' tables know, or, where it does not know the architecture, the usual experts."""
    config = stated_config(base) or stated_config(own)
    plain = {name: plain_name(name) for name in own.index.tensors}
    for table in (lambda names: model_names(config, names), expert_names):
        mine, theirs = table(plain.values()), table(base.index.tensors)
        if mine is not None and theirs is not None:
            by_plain = {short: name for name, short in plain.items()}
            _add(found, _under(mine, by_plain), theirs, own.index, base.index)


def _under(names: ModelNames, stored: Mapping[str, str]) -> ModelNames:
    """Return the same names with those of the file as they are stored."""

    def rows(joint: Joint) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(stored[name] for name in row) for row in joint.parts)

    return ModelNames(
        {stored[name]: model for name, model in names.of_file.items()},
        tuple(replace(joint, parts=rows(joint)) for joint in names.joined),
        tuple(replace(joint, whole=stored[joint.whole]) for joint in names.split),
    )


def _add(
    found: _Found, mine: ModelNames, theirs: ModelNames, own: CheckpointIndex, base: CheckpointIndex
) -> None:
    """Add tensors that have one name in the model; those that were found before stay."""
    free_own = _lacking(own, base).keys() - found.own_names
    free_base = _lacking(base, own).keys() - found.base_names
    of_mine, of_theirs = mine.of_model, theirs.of_model

    def pair(one: str | None, other: str | None) -> None:
        if one in free_own and other in free_base and fits(own.tensors[one], base.tensors[other]):
            found.pairs[one] = other

    for model, other in of_theirs.items():
        pair(of_mine.get(model), other)
    for joint, is_own in _joints(mine, theirs):
        parts = {name for row in joint.parts for name in row}
        wholes, rest = (free_own, free_base) if is_own else (free_base, free_own)
        if joint.whole in wholes and parts <= rest:
            found.joints.append((joint, is_own))
    for one, other in _same_joints(mine, theirs):
        pair(one, other)


def _joints(mine: ModelNames, theirs: ModelNames) -> Iterator[tuple[Joint, bool]]:
    """Yield tensors that are one on one side and several on the other, by their names in the files."""
    for side, other, is_own in ((mine, theirs, True), (theirs, mine, False)):
        of_model = other.of_model
        for joint in side.split:  # the whole is this side's, and the model's parts are in the other file
            parts = [[of_model[name] for name in row if name in of_model] for row in joint.parts]
            if [*map(len, parts)] == [*map(len, joint.parts)]:
                yield replace(joint, parts=tuple(map(tuple, parts))), is_own
        for joint in side.joined:  # the parts are this side's, and the model's whole is in the other file
            if joint.whole in of_model:
                yield replace(joint, whole=of_model[joint.whole]), not is_own


def _same_joints(mine: ModelNames, theirs: ModelNames) -> Iterator[tuple[str, str]]:
    """Yield the parts, or wholes, of tensors that both files divide in the same way under other names."""
    for joint in mine.joined:
        for other in theirs.joined:
            if (joint.whole, len(joint.parts)) == (other.whole, len(other.parts)):
                for row, others in zip(joint.parts, other.parts, strict=True):
                    yield from zip(row, others, strict=False)
    wholes = {joint.parts: joint.whole for joint in theirs.split}
    yield from ((joint.whole, wholes[joint.parts]) for joint in mine.split if joint.parts in wholes)


def _as_patterns(found: _Found, own: CheckpointIndex, base: CheckpointIndex) -> Renaming | None:
    """Return a renaming as patterns, checked to give the same names again."""
    joints = _joint_patterns(found.joints, own, base)
    names = _name_patterns(found.pairs)
    renaming = Renaming(tuple(names), tuple(joints))
    again = {place.own: name for name, place in places(Renaming(renaming.names), own, base).items()}
    if again != found.pairs:  # a pattern says more than was found
        renaming = replace(renaming, names=tuple(sorted(found.pairs.items())))
    return renaming if renaming.names or renaming.joints else None


def _name_patterns(pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return pairs of patterns, and the names themselves where numbers are not the same on both sides."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for one, other in pairs.items():
        (mine, numbers), (theirs, others) = collapsed(one), collapsed(other)
        groups[(mine, theirs) if numbers == others else (one, other)].append((one, other))
    return sorted(groups)


def _joint_patterns(
    joints: Iterable[tuple[Joint, bool]], own: CheckpointIndex, base: CheckpointIndex
) -> list[LockedJoint]:
    """Return joints as patterns; those whose names or shapes do not follow from the pattern are left out."""
    patterns = dict.fromkeys(
        pattern for joint, is_own in joints if (pattern := _joint_pattern(joint, is_own)) is not None
    )
    return [pattern for pattern in patterns if places(Renaming((), (pattern,)), own, base)]


def _joint_pattern(joint: Joint, is_own: bool) -> LockedJoint | None:
    whole, numbers = collapsed(joint.whole)
    parts = []
    for column, name in enumerate(joint.parts[0]):
        names = [row[column] for row in joint.parts]
        candidates = _row_patterns(name, joint.is_stacked)
        fitting = [
            pattern
            for pattern in candidates
            if pattern.count(NUMBER) == len(numbers)
            and all(filled(pattern, numbers, row) == real for row, real in enumerate(names))
        ]
        if len(fitting) != 1:
            return None
        parts.append(fitting[0])
    return LockedJoint(whole, tuple(parts), joint.axis, joint.is_stacked, is_own)


def _row_patterns(name: str, is_stacked: bool) -> list[str]:
    """Return the patterns that a part's name can be of: one, or with any of its numbers as the row."""
    segments = collapsed(name)[0].split(".")
    places = [index for index, segment in enumerate(segments) if segment == NUMBER]
    if not is_stacked:
        return [".".join(segments)]
    return [".".join([*segments[:index], ROW, *segments[index + 1 :]]) for index in places]
