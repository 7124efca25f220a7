"""Layout of an output: tensors merged, copied or left out, and their shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from hub_magmax.checkpoints.index import (
    EXACT_DTYPES,
    MERGEABLE_DTYPES,
    CheckpointIndex,
    TensorInfo,
)
from hub_magmax.checkpoints.layer_takes import taken_by_layers
from hub_magmax.checkpoints.own_bases import own_base_indexes
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import MismatchError, RecipeError
from hub_magmax.kernels.chunk import LOOP_DTYPES
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.planning.fitting.architectures import check_heads
from hub_magmax.planning.fitting.mismatch import refuse_differences
from hub_magmax.planning.fitting.other_heads import other_heads
from hub_magmax.planning.layers import LAYERS_REASON, in_order_of_blocks
from hub_magmax.planning.plan import EXACT_REASON, MEAN, Plan, Shard, TensorJob
from hub_magmax.planning.reads import bytes_looked_at, bytes_read
from hub_magmax.planning.rule_coverage import check_rules, check_values
from hub_magmax.planning.statistics import kind_of, may_lack, without_share
from hub_magmax.planning.tied import copies_in, refuse_lacking, with_copies, without_copies
from hub_magmax.planning.weight_files import file_stem, kept_metadata, lost_metadata
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.merge_values import MergeValues, RuleValues, rule_values
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tensor_rules import TensorRule, factor_of, rule_for
from hub_magmax.text import rule_text

OUTPUT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def make_plan(recipe: Recipe, lock: Lock, opened: Mapping[str, TensorSource]) -> Plan:
    """Check that the checkpoints fit each other and lay out the output.

    Args:
        recipe: For the output's dtype and shard size.
        lock: For sources, method, preference and rules.
        opened: The base model and the tasks by name, as `opening.as_checkpoints` returns them.

    Raises:
        MismatchError: If tensors are missing, surplus, or differ in shape or kind, naming them
            and the rule that would settle it.
        RecipeError: If a rule matches nothing, or the rules leave nothing.
    """
    rules, bases = recipe.tensors, own_base_indexes(opened)
    indexes = {name: source.index for name, source in opened.items()}
    check_rules(indexes.values(), rules)
    refuse_lacking(lock, indexes, rules)
    base = indexes["base_model"].tensors
    copies = copies_in(lock, base, rules)
    own = without_copies(indexes, copies)
    layered = taken_by_layers(lock, indexes)
    heads = partial(other_heads, lock, opened)
    refuse_differences({**own, **without_copies(bases, copies)}, rules, layered, heads)
    check_heads(lock.sources, rules)
    added = _added_names(indexes, rules, layered)
    names = in_order_of_blocks(own["base_model"].tensors, added, lock)
    decided = [(name, _take(name, rules, layered)) for name in names]
    every = in_order_of_blocks(base, added, lock)
    own_values = rule_values(rules, lock.method, tuple(lock.tasks), every)
    unread = {own: _Unread(lock, own) for own in (None, *dict.fromkeys(own_values.values()))}
    jobs = [
        _job(name, take, indexes, recipe.output.dtype, unread[own_values.get(name)])
        for name, take in decided
        if take is None or take.source != "nothing"
    ]
    check_values(rules, [job.name for job in jobs if job.uses_values], copies, every)
    jobs = with_copies(every, jobs, copies)
    if not jobs:
        raise RecipeError("the rules leave out every tensor", key=("tensors",))
    left_out = dict.fromkeys((*_left_out(decided), *_surplus_names(indexes, rules, layered)))
    files_from = recipe.output.files_from
    stem = file_stem(indexes[files_from], lock.sources[files_from])
    made = Plan(
        recipe,
        lock,
        _layout(jobs, recipe.output.shard_size, stem),
        tuple(left_out),
        bytes_read(jobs, opened),
        metadata=kept_metadata(indexes[files_from]),
        lost_metadata=lost_metadata(indexes[files_from]),
        stored_item_bytes=_stored_item_bytes(jobs, indexes, lock),
        needs_torch=_needs_torch(jobs, lock, indexes),
        unchanged=_unchanged(jobs, lock, opened),
        own_values=own_values,
    )
    return replace(made, bytes_in=made.bytes_in + bytes_looked_at(made, opened))


@dataclass(frozen=True)
class _Unread:
    """Sources that do not count for a tensor."""

    lock: Lock
    own: RuleValues | None

    @property
    def _values(self) -> MergeValues:
        return self.lock.values if self.own is None else self.own.over(self.lock.values)

    @cached_property
    def of_merges(self) -> tuple[str, ...]:
        """The tasks that play no part in its merge."""
        return self._values.unread(self.lock.tasks)

    @cached_property
    def of_means(self) -> tuple[str, ...]:
        """The sources that play no part in a mean of statistics."""
        return without_share(self.lock.sources, self._values)


def _unchanged(jobs: Iterable[TensorJob], lock: Lock, opened: Mapping[str, TensorSource]) -> frozenset[str]:
    """Return the merged tensors that no task which counts changes, as far as headers tell."""

    def is_kept(job: TensorJob) -> bool:
        return all(opened[task].keeps(job.tensor) for task in lock.tasks if task not in job.unread)

    return frozenset(job.name for job in jobs if job.merged and is_kept(job))


def _stored_item_bytes(jobs: Iterable[TensorJob], indexes: Mapping[str, CheckpointIndex], lock: Lock) -> int:
    if lock.bases or lock.lengths:  # see `own_bases` and `scaled`
        return ITEM_BYTES["F64"]
    stored = [_dtypes_of(job, indexes, lock) for job in jobs if job.merged]
    if any(len(dtypes) > 1 for dtypes in stored):  # as stored, and in float32
        return ITEM_BYTES["F64"]
    return max((ITEM_BYTES[dtype] for dtypes in stored for dtype in dtypes), default=4)


def _dtypes_of(job: TensorJob, indexes: Mapping[str, CheckpointIndex], lock: Lock) -> set[str]:
    return {indexes[name].tensors[job.tensor].dtype for name in lock.sources}


def _needs_torch(jobs: Iterable[TensorJob], lock: Lock, indexes: Mapping[str, CheckpointIndex]) -> bool:
    """Say whether a merge by compiled loops imports torch all the same."""
    sources = lock.sources.values()
    if (
        lock.token_rows
        or lock.bases
        or lock.lengths
        or lock.plugin
        or any(s.adapter_config or s.added_rows or s.label_rows for s in sources)
    ):
        return True
    return any(_takes_torch(job, indexes) for job in jobs)


def _takes_torch(job: TensorJob, indexes: Mapping[str, CheckpointIndex]) -> bool:
    if job.source == MEAN:
        return True
    if job.factor != 1:
        return True
    if not job.merged:
        info = indexes[job.source].tensors.get(job.tensor)
        return info is not None and info.dtype != job.dtype
    stored = {index.tensors[job.tensor].dtype for index in indexes.values() if job.tensor in index.tensors}
    return stored != {job.dtype} or job.dtype not in LOOP_DTYPES


@dataclass(frozen=True)
class _Take:
    """A source that a tensor is copied from, or `nothing`, and what says so."""

    source: str
    reason: str
    factor: float = 1.0


def _take(name: str, rules: tuple[TensorRule, ...], layered: Mapping[str, str]) -> _Take | None:
    """Return whose a tensor is: by the first rule that covers it, or else by the stack of layers; or None."""
    if (rule := rule_for(name, rules)) is not None:
        return _Take(rule.source, f"rule {rule.match!r}", 1.0 if rule.factor is None else rule.factor)
    return _Take(layered[name], LAYERS_REASON, factor_of(name, rules)) if name in layered else None


def _added_names(
    indexes: Mapping[str, CheckpointIndex], rules: tuple[TensorRule, ...], layered: Mapping[str, str]
) -> list[str]:
    """Return tensors that the base model lacks and that come from a task."""
    base = indexes["base_model"].tensors
    added = []
    for task, index in indexes.items():
        for name in index.tensors:
            take = _take(name, rules, layered) if name not in base else None
            if take is not None and take.source == task:
                added.append(name)
    return added


def _left_out(decided: Iterable[tuple[str, _Take | None]]) -> Iterator[str]:
    return (name for name, take in decided if take is not None and take.source == "nothing")


def _surplus_names(
    indexes: Mapping[str, CheckpointIndex], rules: tuple[TensorRule, ...], layered: Mapping[str, str]
) -> Iterator[str]:
    """Yield tensors that the base model lacks and that a stack leaves out, or that it needs not have."""
    base = indexes["base_model"].tensors
    for index in indexes.values():
        for name, info in index.tensors.items():
            if name in base or rule_for(name, rules) is not None:
                continue
            if layered.get(name) == "nothing" or (name not in layered and may_lack(info)):
                yield name


def _job(
    name: str,
    take: _Take | None,
    indexes: Mapping[str, CheckpointIndex],
    dtype: str,
    unread: _Unread,
) -> TensorJob:
    if take is not None:
        if name not in indexes[take.source].tensors:
            raise MismatchError(
                f"tensor {name!r} is not there, and the {take.reason} takes it from there",
                where=indexes[take.source].label,
            )
        info = indexes[take.source].tensors[name]
        if take.factor != 1 and info.dtype not in MERGEABLE_DTYPES:
            raise MismatchError(
                f"dtype {info.dtype} is not floating point, and is not multiplied by {take.factor:g}",
                where=f"{indexes[take.source].label}, tensor {name!r}",
                hint=f"Leave factor out for this tensor, by a rule before: {rule_text(name, take.source)}.",
            )
        return replace(_copy(info, take.source, take.reason, dtype), factor=take.factor)
    return _job_without_rule(indexes["base_model"].tensors[name], indexes, dtype, unread)


def _job_without_rule(
    base: TensorInfo,
    indexes: Mapping[str, CheckpointIndex],
    dtype: str,
    unread: _Unread,
) -> TensorJob:
    name = base.name
    kind = kind_of(base)
    if kind is not None:
        aside = unread.of_means if kind.source == MEAN else _lacking(name, indexes)
        return replace(_copy(base, kind.source, kind.reason, dtype), unread=aside)
    if base.dtype in EXACT_DTYPES:
        return _copy(base, "base_model", EXACT_REASON, dtype)
    if base.num_elements == 0 or len(indexes) == 1:
        return _copy(base, "base_model", "no elements" if len(indexes) > 1 else "no tasks", dtype)
    out = base.dtype if dtype == "auto" else OUTPUT_DTYPES[dtype]
    return TensorJob(name, base.shape, out, base.num_elements, "merge", unread=unread.of_merges)


def _lacking(name: str, indexes: Mapping[str, CheckpointIndex]) -> tuple[str, ...]:
    return tuple(source for source, index in indexes.items() if name not in index.tensors)


def _copy(info: TensorInfo, source: str, reason: str, dtype: str) -> TensorJob:
    # A cast of the whole model includes its copied weights, but never counts or packed formats.
    cast = dtype != "auto" and info.dtype in MERGEABLE_DTYPES
    out = OUTPUT_DTYPES[dtype] if cast else info.dtype
    return TensorJob(info.name, info.shape, out, info.num_elements, source, reason)


def _layout(jobs: list[TensorJob], shard_size: int, stem: str) -> tuple[Shard, ...]:
    """Fill files in order; one larger than `shard_size` holds a single tensor."""
    groups: list[list[TensorJob]] = [[]]
    size = 0
    for job in jobs:
        if groups[-1] and size + job.num_bytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.num_bytes
    if len(groups) == 1:
        return (Shard(f"{stem}.safetensors", tuple(jobs)),)
    return tuple(
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )
