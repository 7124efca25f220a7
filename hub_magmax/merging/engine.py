"""The one loop: read each tensor in chunks, merge, write, record."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME, INDEX_NAME, ITEM_BYTES
from hub_magmax.checkpoints.opening import (
    CONFIG_NAME,
    HubSources,
    check_hashes,
    open_inputs,
    read_side_file,
    versions_of,
)
from hub_magmax.checkpoints.side_files import is_side_file
from hub_magmax.checkpoints.source import RowMemory, TensorSource
from hub_magmax.checkpoints.stored import Stored, bits_dtype
from hub_magmax.errors import DamagedError, HubMagmaxError, OutputError
from hub_magmax.files import os_errors, sha256_of, write_text
from hub_magmax.kernels.arrays import Scratch
from hub_magmax.kernels.lazy_imports import inference
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.chunks import ChunkMemory, JoinedChunks, StoredChunks, copied_chunks
from hub_magmax.merging.combine import compiles, make_step, num_threads, one_thread
from hub_magmax.merging.one_pass import EarlyMerge
from hub_magmax.merging.output.folder import PartialFolder, ShardFile
from hub_magmax.merging.output.provenance import PROVENANCE_NAME, provenance
from hub_magmax.merging.output.report import (
    REPORT_NAME,
    MergeReport,
    ShardRecord,
    read_report,
    software_versions,
)
from hub_magmax.merging.profile import Clock
from hub_magmax.merging.survey import ModelRule, survey
from hub_magmax.merging.tensors import tensor_rule
from hub_magmax.methods import TensorRule, surveys_model
from hub_magmax.planning.adapters import adapter_config, factor_values
from hub_magmax.planning.plan import HELD_CHUNKS, OPEN_CHUNKS, Budget, FactorJob, Plan, Shard, TensorJob
from hub_magmax.processes import Processes, find_processes, share
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.recipe.schema import RECIPE_NAME

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int], None]

#: Each holds chunks of its own, and what a rule remembers of a whole tensor.
_MAX_THREADS = 8


def merge(
    plan: Plan,
    output: Path | str | None = None,
    *,
    sources: Mapping[str, TensorSource] | None = None,
    progress: Progress | None = None,
    chunk_elements: int | None = None,
    processes: Processes | None = None,
    hub: HubSources | None = None,
) -> MergeReport:
    """Carry out `plan` and return what was done.

    Writes shards, index, the files that belong to the model, the recipe, the lock and the report
    into a folder that appears by one rename at the end. Called again after an interruption it
    goes on with the first unfinished shard; called after its end it returns the stored report.
    Under `accelerate launch` every process makes its share of the shards; the bytes are the same
    for any number of processes and any chunk size.

    Args:
        plan: From `planning.make_plan`.
        output: Folder to create; by default the recipe's `output.path`.
        sources: Open checkpoints by name, instead of those the lock names; for an adapter, the adapters.
        progress: Called with the number of bytes each finished chunk wrote; where a method looks at the whole
            model, before that with as many for each tensor. `Plan.progress_bytes` in all.
        chunk_elements: Elements per task in memory at a time; by default what is fastest.
        processes: Which of how many processes this is; found from the launcher by default.
        hub: Repositories that are open already.

    Raises:
        LockError: If a file is not what was locked.
        NonFiniteError: At a NaN or infinity. Nothing appears at `output`.
        OutputError: If `output` is taken or cannot be written.
    """
    started = time.perf_counter()
    processes = processes or find_processes()
    place = PartialFolder(Path(output or plan.recipe.output_path), plan.digest)
    if (done := processes.first_decides(lambda: finished(place))) is not None:
        return done
    own = plan if sources is None else None
    if (refusal := processes.first_decides(lambda: prepare(place, own))) is not None:
        raise refusal
    with ExitStack() as stack:
        stack.callback(place.abandon)
        if sources is None:
            sources = stack.enter_context(open_inputs(plan.recipe, plan.lock, hub))
        profile = make_shards(plan, sources, place, place, progress, chunk_elements, processes)
        processes.wait()
        report = report_of(plan, place, time.perf_counter() - started, profile)
        if processes.is_first:
            report = write_beside_weights(plan, sources, place.folder, report)
            place.publish()
    processes.wait()
    return report


class Shelf(Protocol):
    """Where finished files of a merge are kept.

    Attributes:
        num_open: Files that may be in the making at a time.
    """

    num_open: int

    def intact(self, file: str) -> ShardRecord | None:
        """Return the record of a file that was finished earlier and is as it was then, else None."""
        ...

    def record(self, record: ShardRecord) -> None:
        """Note that a file is finished."""
        ...


def make_shards(
    plan: Plan,
    sources: Mapping[str, TensorSource],
    place: PartialFolder,
    shelf: Shelf,
    progress: Progress | None,
    chunk_elements: int | None,
    processes: Processes,
) -> dict[str, float]:
    """Make this process's share of the output's files in `place`, but those that `shelf` has.

    Returns:
        Seconds by kind of work, as the merge report has them.
    """
    with _raising(progress or (lambda num_bytes: None)) as advance:
        missing = []
        for shard in share(plan.shards, processes):
            if shelf.intact(shard.file) is None:
                missing.append(shard)
            else:
                advance(shard.data_bytes)
        in_order = any(source.repo_id is not None for source in plan.lock.sources.values())
        budget = plan.budget(1 if in_order else min(num_threads(), _MAX_THREADS))
        if chunk_elements:
            budget = replace(budget, chunk_elements=chunk_elements)
        engine = _Engine(plan, sources, place, advance, budget, shelf.num_open, in_order=in_order)
        if not engine.is_compiled:
            import_module("torch")  # now, by one thread, for its settings to hold from the beginning
        with one_thread():
            try:
                engine.look_at_model(missing, place.survey_folder if processes.count > 1 else None)
                for record in engine.make(missing):
                    with os_errors(place.folder / record.file), engine.clock.spend("store"):
                        shelf.record(record)
            except DamagedError:
                place.forget()  # what is finished may be made of the same bytes
                raise
    return engine.clock.seconds


class _Cancelled(BaseException):
    """What a progress raised, on its way through code that turns the errors of methods into messages."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _raising(progress: Progress) -> Iterator[Progress]:
    """Give a progress that may be called from anywhere; what it raises comes out as it is."""

    def advance(num_bytes: int) -> None:
        try:
            progress(num_bytes)
        except Exception as error:
            raise _Cancelled(error) from error

    try:
        yield advance
    except _Cancelled as cancelled:
        raise cancelled.error from None


def prepare(place: PartialFolder, plan: Plan | None) -> HubMagmaxError | None:
    """Prepare the output, or return why not, so that every process ends with the same message.

    Whole files whose sha256 the lock of `plan` holds are compared first.
    """
    try:
        if plan is not None:
            check_hashes(plan.recipe, plan.lock)
        place.prepare(versions_of(plan.recipe, plan.lock) if plan is not None else "")
    except HubMagmaxError as error:
        return error
    return None


def finished(place: PartialFolder) -> MergeReport | None:
    """Return the stored report if the output is this very merge, complete; else None."""
    with suppress(OutputError):
        report = read_report(place.output / REPORT_NAME)
        if report.plan_digest == place.plan_digest:
            place.clean_up()  # left by a process that was killed after the rename
            return report
    return None


#: A tensor is large that is more than this part of its file.
_LARGE_PART = 16


class _Engine:
    """Makes files: each thread merges one tensor after the other, and what they wrote is read back meanwhile.

    No tensor depends on another, so which thread makes which, and when, changes no byte. What is read from
    the Hub comes in order, so there one thread makes all tensors, and a second one reads ahead.

    Args:
        budget: How much to work with at a time.
        num_open: Files that may be incomplete at a time.
        in_order: Some of what is read comes from the Hub.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Mapping[str, TensorSource],
        place: PartialFolder,
        progress: Progress,
        budget: Budget,
        num_open: int,
        *,
        in_order: bool,
    ) -> None:
        self.plan, self.sources, self.place, self.num_open = plan, sources, place, num_open
        self.is_compiled = compiles(sum(job.num_elements for job in plan.jobs if job.merged))
        self.budget, self.in_order = budget, in_order
        self.scratch = Scratch(place.folder)
        self.model_rule: ModelRule | None = None
        self._not_looked_at = plan.looked_at_bytes
        self.reader = ThreadPoolExecutor(1) if in_order else None
        self.makers = ThreadPoolExecutor(budget.num_threads)
        self._progress, self._progress_lock = progress, Lock()
        self._memory, self._merged_memory = ChunkMemory(), RowMemory()
        self.clock = Clock()

    def expect(self, names: Mapping[str, Iterable[str]], in_part: bool = False) -> None:
        """Tell each source which of its tensors are read next, in order."""
        budget_bytes = self.budget.read_ahead_bytes // len(self.sources)
        for name, source in self.sources.items():
            source.expect(names[name], budget_bytes, in_part=in_part)

    def look_at_model(self, missing: Sequence[Shard], folder: Path | None) -> None:
        """Find the rule of a method whose scope is the model, where any of these files needs it.

        A folder keeps it for other processes.
        """
        lock = self.plan.lock
        if surveys_model(lock.method) and any(job.merged for shard in missing for job in shard.jobs):
            jobs = [job for job in self.plan.jobs if job.merged]
            with inference(), self.clock.spend("compute"):
                chunks = self._all_chunks(jobs)
                self.model_rule = survey(jobs, chunks, lock.method, lock.weights, lock.seed, folder)
        if self._not_looked_at:  # by another process, or earlier
            self._progress(self._not_looked_at)

    def _all_chunks(self, jobs: Sequence[TensorJob]) -> JoinedChunks:
        """Return the chunks of these tensors, one after the other."""
        num_bytes = {job.name: job.num_bytes for job in jobs}

        def looked_at(name: str) -> None:
            with self._progress_lock:
                if found := num_bytes.pop(name, 0):
                    self._not_looked_at -= found
                    self._progress(found)

        return JoinedChunks(
            tuple(self._chunks(job, self.reader) for job in jobs),
            partial(self.expect, self.plan.tensors_read(jobs)),
            self.budget.num_threads,
            looked_at,
        )

    def in_turn(self, shard: Shard) -> Sequence[TensorJob]:
        """Return a file's tensors as they are begun: large ones first, so that all threads end together, and
        the others as they lie in the file, which is read back in that order.
        """
        if self.in_order:
            return shard.jobs
        large = sum(job.num_elements for job in shard.jobs) // _LARGE_PART
        return sorted(shard.jobs, key=lambda job: -job.num_elements if job.num_elements > large else 0)

    def close(self) -> None:
        self.makers.shutdown(cancel_futures=True)
        if self.reader is not None:
            self.reader.shutdown(cancel_futures=True)

    def make(self, shards: Sequence[Shard]) -> Iterator[ShardRecord]:
        """Write files, and yield their records in order; of several errors the first in order is raised."""
        self.expect(self.plan.tensors_read([job for shard in shards for job in self.in_turn(shard)]))
        with ExitStack() as unfinished:
            begun: deque[Callable[[], ShardRecord]] = deque()
            try:
                for shard in shards:
                    begun.append(self._begin(shard, unfinished))
                    if len(begun) == self.num_open:
                        yield begun.popleft()()
                while begun:
                    yield begun.popleft()()
            finally:
                self.close()  # nobody writes to a file any more when it is abandoned

    def _begin(self, shard: Shard, unfinished: ExitStack) -> Callable[[], ShardRecord]:
        """Have one file made, and return what waits for it."""
        path = self.place.folder / shard.file
        with os_errors(path):
            file = ShardFile(path)
            unfinished.callback(file.abandon)
            header = self.plan.header(shard)
            file.write(header, 0)
        places, position = {}, len(header)
        for job in shard.jobs:
            places[job.name] = position
            position += job.num_bytes
        begun = {
            job.name: self.makers.submit(self._tensor, file, job, places[job.name])
            for job in self.in_turn(shard)
        }

        def wait() -> ShardRecord:
            tallies = []
            with os_errors(path):
                for job in shard.jobs:
                    tallies.append(begun[job.name].result())
                    with self.clock.spend("store"):
                        file.read_back(places[job.name] + job.num_bytes)
                with self.clock.spend("store"):
                    return _record(shard.file, file, tallies)

        return wait

    def _tensor(self, file: ShardFile, job: TensorJob, position: int) -> _Tally:
        """Write one tensor at `position` of a file."""
        tally = _Tally(len(self.plan.lock.tasks))
        slot = _Slot(file, position, ITEM_BYTES[job.dtype], self.clock, self._advance)
        with inference(), self.clock.spend("compute"):
            if job.merged and not isinstance(job, FactorJob):
                self._merge(job, tally, slot)
            else:
                self._copy(job, tally, slot)
        return tally

    def _advance(self, num_bytes: int) -> None:
        with self._progress_lock:
            self._progress(num_bytes)

    def _copy(self, job: TensorJob, tally: _Tally, slot: _Slot) -> None:
        """Write what needs no task vectors."""
        if isinstance(job, FactorJob):
            slot.write(0, Stored.of(factor_values(job, self.sources)))
            return
        tasks, start = tuple(self.plan.lock.tasks), 0
        for values in copied_chunks(job, self.sources, tasks, self.budget.chunk_elements, self.clock):
            if not values.is_finite():
                tally.not_finite = [job.name]
            slot.write(start, values)
            start += len(values.bits)

    def _merge(self, job: TensorJob, tally: _Tally, slot: _Slot) -> None:
        lock, chunks, early = self.plan.lock, self._chunks(job, self.reader), None
        scaling = float(lock.method["scaling"])
        if self.model_rule is not None:
            rule = self.model_rule.part(job.name)
        else:
            early = self._early(job, scaling, slot)
            chunks = replace(chunks, early=early.chunk)
            generator = CounterGenerator(lock.seed, job.name)
            rule = tensor_rule(chunks, job.shape, lock.method, lock.weights, generator)
        tally.add(rule)
        if early is not None and (total := early.finish(rule)) is not None:
            tally.count(total)
            return
        step = make_step(rule, job.dtype, scaling, is_compiled=self.is_compiled)
        for chunk in chunks.last_pass():
            merged, counts, probe = step(chunk, rule.per_element(chunk.start, chunk.num_elements))
            chunks.check(probe, chunk, merged)
            tally.count(counts)
            slot.write(chunk.start, merged)

    def _early(self, job: TensorJob, scaling: float, slot: _Slot) -> EarlyMerge:
        most_open, most_held = (number * self.budget.chunk_elements for number in (OPEN_CHUNKS, HELD_CHUNKS))
        held = None
        if job.num_elements <= most_held and job.num_elements:
            held = self._merged_memory.rows(bits_dtype(job.dtype), job.num_elements, [0])[0]
        return EarlyMerge(job.num_elements, job.dtype, scaling, most_open, held, slot.write, slot.read_again)

    def _chunks(self, job: TensorJob, reader: ThreadPoolExecutor | None) -> StoredChunks:
        # The base model in place of a checkpoint makes its task vector zero.
        base, *tasks = [
            self.sources["base_model" if name in job.unread else name] for name in self.plan.lock.sources
        ]
        return StoredChunks(
            job.name,
            job.num_elements,
            base,
            tuple(tasks),
            self.budget.chunk_elements,
            reader,
            self.is_compiled,
            self._memory if reader is None else None,
            self.clock,
            self.scratch,
        )


class _Slot:
    """Where one tensor lies in a file: at `position`, so many bytes per item."""

    def __init__(
        self, file: ShardFile, position: int, item_bytes: int, clock: Clock, progress: Progress
    ) -> None:
        self._file, self._position, self._item_bytes = file, position, item_bytes
        self._clock, self._progress = clock, progress
        self._written: set[int] = set()

    def write(self, start: int, values: Stored) -> None:
        """Write values from an element on, perhaps once more."""
        with self._clock.spend("write"):
            self._file.write(values.content, self._place(start))
        if start not in self._written:
            self._written.add(start)
            self._progress(len(values.content))

    def read_again(self, start: int) -> bytearray:
        """Return what was written from an element on."""
        with self._clock.spend("write"):
            return self._file.read_again(self._place(start))

    def _place(self, start: int) -> int:
        return self._position + start * self._item_bytes


class _Tally:
    """What the report says about a tensor: selections in it, or its name where a copy is not finite."""

    def __init__(self, num_tasks: int) -> None:
        self.counts = [0] * num_tasks
        self.unaligned = [0] * num_tasks
        self.gap: float | None = None
        self.not_finite: list[str] = []

    def add(self, rule: TensorRule) -> None:
        for task, count in enumerate(rule.num_unaligned):
            self.unaligned[task] += count
        self.gap = rule.duality_gap

    def count(self, counts: np.ndarray) -> None:
        for task, count in enumerate(counts.tolist()):
            self.counts[task] += count


def _record(name: str, file: ShardFile, tallies: Sequence[_Tally]) -> ShardRecord:
    """Finish a file whose tensors are all written, and return its record."""
    counts = tuple(map(sum, zip(*(tally.counts for tally in tallies), strict=True)))
    unaligned = tuple(map(sum, zip(*(tally.unaligned for tally in tallies), strict=True)))
    gap = max((tally.gap for tally in tallies if tally.gap is not None), default=None)
    odd = tuple(name for tally in tallies for name in tally.not_finite)
    sha256 = file.finish()
    return ShardRecord(name, file.size_bytes, sha256, counts if any(counts) else (), unaligned, gap, odd)


def report_of(plan: Plan, place: PartialFolder, seconds: float, profile: Mapping[str, float]) -> MergeReport:
    """Return what a merge did whose files are all recorded in `place`."""
    records = tuple(place.recorded(shard.file) for shard in plan.shards)
    shards = tuple(record for record in records if record is not None)
    assert len(shards) == len(plan.shards), "every process records its shards before the barrier"
    names = tuple(plan.lock.tasks)
    elements = sum(job.num_elements for job in plan.jobs if job.merged)
    counts = [sum(column) for column in zip(*(s.counts for s in shards if s.counts), strict=True)]
    unaligned = [sum(column) for column in zip(*(s.num_unaligned for s in shards), strict=True)]
    gaps = [shard.duality_gap for shard in shards if shard.duality_gap is not None]
    return MergeReport(
        plan_digest=plan.digest,
        shards=shards,
        shares={name: count / elements for name, count in zip(names, counts, strict=False)},
        num_unaligned=dict(zip(names, unaligned, strict=True)) if any(unaligned) else {},
        duality_gap=max(gaps, default=None),
        elements_merged=elements,
        bytes_in=plan.bytes_in,
        bytes_out=sum(shard.size_bytes for shard in shards),
        seconds=seconds,
        profile=dict(profile),
        peak_memory_bytes=peak_memory_bytes(),
        versions=software_versions(),
        notices=(*plan.notices, *_not_finite_notice(plan, shards)),
    )


def _not_finite_notice(plan: Plan, shards: Sequence[ShardRecord]) -> tuple[str, ...]:
    """Return a line about copied tensors that hold a NaN or an infinity, if there are any."""
    names = {name for shard in shards for name in shard.not_finite}
    places = [f"{job.name} of {job.source}" for job in plan.jobs if job.name in names]
    if not places:
        return ()
    listed = ", ".join(places[:5]) + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")
    return (f"copied as they are, with NaN or infinity among their values: {listed}",)


def write_beside_weights(
    plan: Plan, sources: Mapping[str, TensorSource], folder: Path, report: MergeReport
) -> MergeReport:
    """Write what lies beside the weights, and return the report with the hashes of all of it."""
    _write_side_files(plan, sources, folder)
    write_text(folder / PROVENANCE_NAME, provenance(plan.recipe, plan.lock, report))
    report = replace(report, files=_hashes(folder, report))
    write_text(folder / REPORT_NAME, report.to_json())
    return report


def _hashes(folder: Path, report: MergeReport) -> dict[str, str]:
    """Return the sha256 of the files in `folder` that hold no weights, by name."""
    names = sorted({path.name for path in folder.iterdir()} - {shard.file for shard in report.shards})
    return {name: sha256_of(folder / name) for name in names}


def peak_memory_bytes() -> int:
    """Return the largest resident set this process had."""
    with suppress(OSError, StopIteration):
        # Not from getrusage, which on Linux counts from before the program was started: the parent's.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_side_files(plan: Plan, sources: Mapping[str, TensorSource], folder: Path) -> None:
    """Write the index, what the model needs besides weights, and what the merge was made from."""
    files_from = plan.recipe.output.files_from
    source, locked = sources[files_from], plan.lock.sources[files_from]
    # transformers takes a folder with both configurations for a whole model with an adapter beside it.
    kept_out = CONFIG_NAME if plan.ranks else ADAPTER_CONFIG_NAME
    for path in filter(is_side_file, source.sizes):
        if path == kept_out:
            continue
        with os_errors(folder / path):
            (folder / path).write_bytes(read_side_file(source, path, locked))
    if len(plan.shards) > 1:
        weight_map = {job.name: shard.file for shard in plan.shards for job in shard.jobs}
        index = {"metadata": {"total_size": plan.bytes_out}, "weight_map": weight_map}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    if plan.ranks:
        write_text(folder / ADAPTER_CONFIG_NAME, adapter_config(plan, sources))
    write_text(folder / RECIPE_NAME, plan.recipe.to_yaml())
    write_text(folder / LOCK_NAME, plan.lock.to_json())
