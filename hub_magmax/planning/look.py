"""A look at samples of checkpoints' values before they are merged, judged by the rules of a diagnosis.

Some blocks of some tensors are read of every checkpoint on this machine. What is on the Hub is not looked at,
since each block would be a request; checkpoints that are the same are known by their hashes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.kernels.stored import Stored
from hub_magmax.planning.faults import MIN_PRINT, PRINT_ELEMENTS, Evidence, Geometry, faults, swaps
from hub_magmax.planning.findings import Finding
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.planning.stated import stated_findings
from hub_magmax.recipe.lockfile import Lock, LockedSource

#: Tensors that are looked at, and the elements of a block: there is one at the start and one in the middle.
_MOST_TENSORS, _BLOCK_ELEMENTS = 256, 4096

#: Rules that do not hold for adapters, which are added to the base model's weights and not made from them.
_OF_WHOLE = ("other base", "scaled", "zeros", "long")

#: Elements that are compared at a time where no difference was found among those.
_READ_ON_ELEMENTS = 2**20


def with_findings(plan: Plan, cache: SourceCache, in_spite_of: Iterable[str] = ()) -> Plan:
    """Return a plan with what is odd about its checkpoints, by their files and by samples of their values.

    Args:
        plan: From headers.
        cache: Checkpoints that are open already.
        in_spite_of: Names of faults that are accepted.
    """
    with open_checkpoints(plan.recipe, plan.lock, cache) as opened:
        findings = (
            *stated_findings(plan.recipe, plan.lock, opened),
            *_same_files(plan.lock, [name for name in plan.lock.tasks if name not in plan.unread]),
        )
        told = {(finding.rule, finding.task) for finding in findings}
        seen = tuple(one for one in _seen(plan, opened) if (one.rule, one.task) not in told)
    return replace(plan, findings=findings + seen, in_spite_of=tuple(in_spite_of))


# Complex, and flat: conditions under which nothing can be said, and findings that count.
def _seen(plan: Plan, opened: Mapping[str, TensorSource]) -> Iterator[Finding]:
    """Yield what samples of the checkpoints on this machine show, if the base model is among them."""
    lock, here = plan.lock, [name for name in plan.lock.sources if _is_here(plan, name)]
    tasks = tuple(name for name in here if name in lock.tasks and name not in plan.unread)
    if "base_model" not in here or not tasks:
        return
    if plan.ranks:  # an adapter's factors are no tensors of the checkpoints
        plan = make_plan(plan.recipe, lock, {name: opened[name].index for name in opened})
    for finding in Look(plan.jobs, opened, tasks).findings():
        if finding.rule not in _OF_WHOLE or lock.sources[finding.task].adapter_config is None:
            yield finding


def _is_here(plan: Plan, name: str) -> bool:
    return not location_of(plan.lock.sources[name], plan.recipe.folder).is_remote


def _same_files(lock: Lock, tasks: Sequence[str]) -> Iterator[Finding]:
    """Yield checkpoints whose weights have the hashes of the base model's, or of an earlier task's."""
    known: dict[object, str] = {}
    if base := _hashes(lock.base_model):
        known[base] = "base_model"
    for task in tasks:
        hashes = _hashes(lock.tasks[task])
        if not hashes:
            continue
        first = known.setdefault(hashes, task)
        if first == "base_model":
            yield Finding("unchanged", task, f"{task} is the base model, unchanged", True)
        elif first != task:
            yield Finding("near-identical", task, f"{task} is {first}: their files are the same", True)


def _hashes(source: LockedSource) -> tuple[str | None, ...] | None:
    """Return hashes that tell the checkpoint; None if one of them is not known."""
    found = tuple(file.sha256 for file in source.files)
    return (*found, source.adapter_config) if all(found) else None


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
        self._sources = [sources[name] for name in ("base_model", *tasks)]
        self._whole, self._matrices = _Sums(len(tasks)), _Sums(len(tasks))
        self._differs = np.zeros(len(tasks), bool)
        self._broken: dict[str, str] = {}  # the first tensor with a NaN or an infinity, by source
        self._prints: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        every = -(-len(jobs) // _MOST_TENSORS) or 1
        for job in jobs[::every]:
            for start in (0,) if job.num_elements <= _BLOCK_ELEMENTS else (0, job.num_elements // 2):
                self._add(job, start)

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
                    swaps(self._tasks, self._prints),
                )
            )

    def _add(self, job: TensorJob, start: int) -> None:
        stop = min(start + _BLOCK_ELEMENTS, job.num_elements)
        stored = [source.read_stored(job.name, start, stop) for source in self._sources]
        broken = [number for number, values in enumerate(stored) if not values.is_finite()]
        for number in broken:
            self._broken.setdefault(("base_model", *self._tasks)[number], job.name)
        if not broken:
            self._count(job, start, np.stack([_numbers(values) for values in stored]))

    def _count(self, job: TensorJob, start: int, rows: np.ndarray) -> None:
        """Add a block, of the base model first; the rows become task vectors."""
        size = rows.shape[1]
        if start == 0 and size >= MIN_PRINT:
            self._prints[job.name] = (job.shape, rows[:, :PRINT_ELEMENTS].copy())
        rows[1:] -= rows[0]
        self._differs |= rows[1:].any(axis=1)
        products = (rows @ rows.T).astype(np.float64)
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
