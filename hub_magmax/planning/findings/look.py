"""A look at samples of checkpoints' values before they are merged, judged by the rules of a diagnosis.

Some blocks of some tensors are read of every checkpoint on this machine. Whole checkpoints on the Hub are not
looked at, since each block would be a request; those that are the same are known by their hashes there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.checkpoints.opening import open_checkpoints, open_source
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import CheckpointError, SourceError
from hub_magmax.files import digest
from hub_magmax.kernels.stored import Stored
from hub_magmax.planning.findings.faults import Evidence, Geometry, faults
from hub_magmax.planning.findings.finding import Finding, unchanged
from hub_magmax.planning.findings.stated import stated_findings
from hub_magmax.planning.findings.swapped import SwapSearch
from hub_magmax.planning.layers import shifted_blocks
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.lockfile import Lock, LockedSource, ResolvedPreference
from hub_magmax.recipe.tensor_rules import takes_any
from hub_magmax.text import step

#: Tensors that are looked at, and the elements of a block: there is one at the start and one in the middle.
_MOST_TENSORS, _BLOCK_ELEMENTS = 256, 4096

#: Factors of adapters in PEFT's names: the layer, and which of the two it is.
_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?([AB])\b.*")

#: Elements that are compared at a time where no difference was found among those.
_READ_ON_ELEMENTS = 2**20


@step("looking at samples of values")
def with_findings(plan: Plan, cache: SourceCache, in_spite_of: Iterable[str] = ()) -> Plan:
    """Return a plan with what is odd about its checkpoints, by their files and by samples of their values.

    Args:
        plan: From headers.
        cache: Checkpoints that are open already.
        in_spite_of: Names of faults that are accepted.
    """
    with open_checkpoints(plan.recipe, plan.lock, cache) as opened:
        findings: tuple[Finding, ...] = (
            *stated_findings(plan.recipe, plan.lock, opened),
            *_same_files(plan.lock, [name for name in plan.lock.tasks if _counts(name, plan)]),
        )
        told = {(finding.rule, finding.task) for finding in findings}
        here = _looked_at(plan)
        with suppress(CheckpointError, SourceError):  # the merge stops there, and says more
            seen = (*_empty_adapters(plan, cache), *_seen(plan, opened, here, cache))
            findings += tuple(one for one in seen if (one.rule, one.task) not in told)
    findings = tuple(_as_meant(finding, plan.lock) for finding in findings)
    unseen = tuple(task for task in plan.lock.tasks if task not in (*here, *plan.unread))
    return replace(plan, findings=findings, unseen=unseen, in_spite_of=tuple(in_spite_of))


def _counts(task: str, plan: Plan) -> bool:
    """Say whether a task is merged with others: one that a stack of layers is taken from may be any model."""
    return task not in plan.unread and (bool(plan.merged) or not plan.lock.layers)


def _as_meant(found: Finding, lock: Lock) -> Finding:
    """Return a finding; a task that the recipe gives the base model's own name is no fault."""
    own = lock.tasks.get(found.task)
    if found.rule != "unchanged" or own is None or own.reference != lock.base_model.reference:
        return found
    return unchanged(found.task, "is the base model, as the recipe says", is_fault=False)


def _looked_at(plan: Plan) -> tuple[str, ...]:
    """Return the tasks whose values cost no request, where those of the base model cost none."""
    sources, folder = plan.lock.sources, plan.recipe.folder
    here = [name for name, source in sources.items() if not location_of(source, folder).is_remote]
    tasks = tuple(name for name in plan.lock.tasks if name in here and name not in plan.unread)
    return tasks if "base_model" in here else ()


def _seen(
    plan: Plan, opened: Mapping[str, TensorSource], tasks: Sequence[str], cache: SourceCache
) -> Iterator[Finding]:
    """Yield what samples of the values of the base model and of whole checkpoints show.

    Adapters are added to the base model's weights, whatever these are, and their products take time.
    """
    whole = tuple(task for task in tasks if not plan.lock.tasks[task].adapter_config)
    taken = {job.source for job in plan.jobs}
    for found in _of_samples(plan, opened, whole, cache) if whole else ():
        if found.rule != "unchanged" or not takes_any(plan.recipe.tensors):
            yield found
        elif found.task not in taken:
            where = "is the base model, unchanged, in all tensors that no rule covers"
            yield unchanged(found.task, where, is_fault=False)


def _of_samples(
    plan: Plan, opened: Mapping[str, TensorSource], tasks: tuple[str, ...], cache: SourceCache
) -> tuple[Finding, ...]:
    """Return what samples show, found once for all sites of a recipe."""
    jobs = [(job.name, job.shape, job.num_elements) for job in _comparable(plan) if job.merged]
    # Sites differ in this lock's method and preference, which change neither values nor names.
    alike = replace(plan.lock, method={}, preference=ResolvedPreference({}, ""))
    asked = ("samples", tasks, digest([alike.digest, plan.recipe.output.files_from, jobs]))

    def look() -> tuple[Finding, ...]:
        return tuple(Look(_comparable(plan), opened, tasks).findings())

    return cache.recall(asked, look)


def _comparable(plan: Plan) -> list[TensorJob]:
    """Return the jobs but for those of blocks that are others in the base model: they are no change of it."""
    shifted = shifted_blocks(plan.lock)
    return [job for job in plan.whole_jobs if (block_of(job.name) or ())[:2] not in shifted]


def _empty_adapters(plan: Plan, cache: SourceCache) -> Iterator[Finding]:
    """Yield adapters whose products are all zero, as before training."""
    for task, locked in plan.lock.tasks.items():
        if locked.adapter_config and task not in plan.unread:
            with closing(open_source(plan.recipe, locked, cache)) as adapter:
                if _is_empty(adapter):
                    yield unchanged(task, "is an adapter of zeros, as before training")


def _is_empty(adapter: TensorSource) -> bool:
    """Say whether one factor of every layer is zero; reads up to the first layer where none is.

    Of a trained adapter on the Hub that is a request or two.
    """
    layers: dict[str, list[str]] = {}
    for name in sorted(adapter.index.tensors, reverse=True):  # B first, which is zero before training
        match = _FACTOR.fullmatch(name)
        layers.setdefault(match[1] if match else name, []).append(name)
    return all(
        len(names) == 2 and any(_is_zero(adapter, name) for name in names) for names in layers.values()
    )


def _is_zero(source: TensorSource, name: str) -> bool:
    return not _numbers(source.read_stored(name, 0, source.index.tensors[name].num_elements)).any()


def _same_files(lock: Lock, tasks: Sequence[str]) -> Iterator[Finding]:
    """Yield checkpoints whose weights have the hashes of the base model's, or of an earlier task's."""
    known: dict[object, str] = {_hashes(lock.base_model): "base_model"}
    for task in tasks:
        if task in lock.bases:
            if _hashes(lock.tasks[task]) == _hashes(lock.bases[task]):
                yield unchanged(task, "is its own base model, unchanged")
            continue
        first = known.setdefault(_hashes(lock.tasks[task]), task)
        if first == "base_model":
            yield unchanged(task)
        elif first != task:
            yield Finding("near-identical", task, f"{task} is {first}: their files are the same", True)


def _hashes(source: LockedSource) -> tuple[object, ...]:
    """Return what tells a checkpoint: hashes, or its name where they are not known."""
    found = tuple(file.sha256 for file in source.files)
    return (*found, source.adapter_config) if all(found) else (source.reference,)


class Look:
    """Sums over samples of the values of a base model and of tasks.

    Args:
        jobs: Of a plan; those whose tensors are merged count.
        sources: Open checkpoints by name.
        tasks: Those that are looked at.
    """

    def __init__(
        self, jobs: Sequence[TensorJob], sources: Mapping[str, TensorSource], tasks: tuple[str, ...]
    ) -> None:
        jobs = self._jobs = [job for job in jobs if job.merged and job.num_elements]
        self._tasks = tasks
        base = sources["base_model"]
        self._sources = [base, *(sources[name].merged_with(base) for name in tasks)]
        self._whole, self._matrices = _Sums(len(tasks)), _Sums(len(tasks))
        self._differs = np.zeros(len(tasks), bool)
        self._broken: dict[str, str] = {}  # the first tensor with a NaN or an infinity, by source
        self._swaps = SwapSearch(tasks)
        every = -(-len(jobs) // _MOST_TENSORS) or 1
        for job in jobs[::every]:
            starts = (0,) if job.num_elements <= _BLOCK_ELEMENTS else (0, job.num_elements // 2)
            for start in starts:
                self._add(job, start, job.num_elements // len(starts))

    def findings(self) -> Iterator[Finding]:
        """Yield what is odd."""
        for source, tensor in self._broken.items():
            text = f"{source} holds a NaN or an infinity in {tensor}, at which the merge will stop"
            yield Finding("not finite", source, text, False)
        if self._whole.count:
            yield from faults(
                Evidence(
                    self._tasks,
                    self._whole.geometry,
                    (self._matrices if self._matrices.count else self._whole).geometry,
                    tuple(self._is_unchanged(number) for number in range(len(self._tasks))),
                    self._swaps.found(),
                )
            )

    def _add(self, job: TensorJob, start: int, stands_for: int) -> None:
        """Read a block of a tensor, which stands for so many of its elements."""
        stop = min(start + _BLOCK_ELEMENTS, job.num_elements)
        stored = [source.read_stored(job.name, start, stop) for source in self._sources]
        broken = [number for number, values in enumerate(stored) if not values.is_finite()]
        for number in broken:
            self._broken.setdefault(("base_model", *self._tasks)[number], job.name)
        if not broken:
            self._count(job, start, stands_for, np.stack([_numbers(values) for values in stored]))

    def _count(self, job: TensorJob, start: int, stands_for: int, rows: np.ndarray) -> None:
        """Add a block, of the base model first; the rows become task vectors."""
        size = rows.shape[1]
        if start == 0:
            self._swaps.add([job.name], job.shape, rows[None])
        rows[1:] -= rows[0]
        self._differs |= rows[1:].any(axis=1)
        products = (rows @ rows.T).astype(np.float64) * (stands_for / size)
        self._whole.add(products, size)
        if len(job.shape) >= 2:
            self._matrices.add(products, size)

    def _is_unchanged(self, number: int) -> bool:
        """Say whether a task is the base model in every value; read on where the samples do not differ."""
        if self._differs[number] or self._broken:
            return False
        base, task = self._sources[0], self._sources[number + 1]
        return all(
            _is_equal(base.read_stored(job.name, *part), task.read_stored(job.name, *part))
            for job in self._jobs
            for part in _parts(job.num_elements)
        )


class _Sums:
    """Inner products of the base model and the task vectors, added up."""

    def __init__(self, num_tasks: int) -> None:
        self.count, self._products = 0, np.zeros((num_tasks + 1, num_tasks + 1))

    def add(self, products: np.ndarray, count: int) -> None:
        self._products += products
        self.count += count

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.count, self._products)


def _parts(num_elements: int) -> Iterator[tuple[int, int]]:
    starts = range(0, num_elements, _READ_ON_ELEMENTS)
    return ((start, min(start + _READ_ON_ELEMENTS, num_elements)) for start in starts)


def _is_equal(base: Stored, task: Stored) -> bool:
    if base.dtype == task.dtype:
        return np.array_equal(base.bits, task.bits)
    return np.array_equal(_numbers(base), _numbers(task))


def _numbers(stored: Stored) -> np.ndarray:
    """Return values as float32; without torch, which takes seconds to load, for the usual dtypes."""
    bits = stored.bits
    if stored.dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype in _KNOWN:
        return bits.view(_KNOWN[stored.dtype]).astype(np.float32)
    found: np.ndarray = stored.tensor.float().numpy()
    return found


#: numpy's names of dtypes.
_KNOWN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
