"""Execution of a plan: the public `merge`, from sources to a finished folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from hub_magmax.checkpoints.opening import check_hashes, open_inputs, versions_of
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import ArgumentError, DamagedError, HubMagmaxError, OutputError
from hub_magmax.files import from_here, os_errors
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import (
    REPORT_NAME,
    MergeReport,
    ShardRecord,
    read_report,
)
from hub_magmax.merging.output.side_files import report_of, write_beside_weights
from hub_magmax.merging.profile import MemoryWatch, Progress, Spent
from hub_magmax.merging.selections.engines import engine_of
from hub_magmax.merging.workers import Workers
from hub_magmax.planning.budget import budget_of, threads_of
from hub_magmax.planning.findings.finding import refuse_faults
from hub_magmax.planning.findings.look import with_findings
from hub_magmax.planning.headers import plan_from_headers
from hub_magmax.planning.plan import Plan, Shard
from hub_magmax.planning.process_memory import takes_torch
from hub_magmax.processes import Processes, find_processes
from hub_magmax.recipe.arguments import check_named, checked
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import number_of

LOG = logging.getLogger(__name__)


# Most decisions are the defaults of its arguments; the steps are one story.
@checked
def merge(
    plan: Plan,
    output: Path | str | None = None,
    *,
    sources: Mapping[str, TensorSource] | None = None,
    progress: Progress | None = None,
    chunk_elements: int | None = None,
    processes: Processes | None = None,
    cache: SourceCache | None = None,
    backend: Backend | None = None,
) -> MergeReport:
    """Carry out `plan` and return what was done.

    Writes shards, index, the files that belong to the model, the recipe, the lock and the report
    into a folder that appears by one rename at the end. Called again after an interruption it
    goes on with the first unfinished shard; called after its end it returns the stored report.
    Under `accelerate launch` every process makes its share of the shards; the bytes are the same
    for any number of processes and any chunk size.

    Args:
        plan: From `pipeline.plan`.
        output: Folder to create; by default the recipe's `output.path`.
        sources: Open checkpoints by name, instead of those the lock names; for an adapter, the adapters.
        progress: Called with the number of bytes each finished chunk wrote; where a method looks at the whole
            model, before that with as many for each tensor. `Plan.progress_bytes` in all.
        chunk_elements: Elements per task in memory at a time; by default what is fastest.
        processes: Which of how many processes this is; found from the launcher by default.
        cache: Checkpoints that are open already.
        backend: Computes; by default the one for the recipe's `output.device`, or what is fastest on the CPU
            for this many elements. The bytes are the same for all.

    Raises:
        MismatchError: If the plan's findings have faults that are not accepted.
        LockError: If a file is not what was locked.
        RecipeError: If this machine lacks the recipe's `output.device`.
        NonFiniteError: At a NaN or infinity. Nothing appears at `output`.
        OutputError: If `output` is taken or cannot be written.
    """
    if chunk_elements is not None and chunk_elements < 1:
        raise ArgumentError(f"{chunk_elements} elements at a time", where="merge", expected="at least 1")
    if output is not None:
        check_named(output, "merge, output")
    started = time.perf_counter()
    processes, cache = processes or find_processes(), cache or SourceCache()
    place = PartialFolder(plan.recipe.output_path if output is None else Path(output), plan.digest)
    if (done := processes.first_decides(lambda: finished(place))) is not None:
        LOG.info("%s is finished already, nothing is merged again", from_here(place.output))
        return done
    refuse_faults(plan.findings, plan.in_spite_of)
    own = plan if sources is None else None
    if (refusal := processes.first_decides(lambda: prepare(place, own, cache))) is not None:
        raise refusal
    LOG.info("%s into %s", told(plan, processes), from_here(place.output))
    with ExitStack() as stack:
        stack.callback(place.abandon)
        if sources is None:
            sources = stack.enter_context(open_inputs(plan.recipe, plan.lock, cache))
        spent = make_shards(plan, sources, place, place.journal, progress, chunk_elements, processes, backend)
        processes.wait()
        report = report_of(plan, place, time.perf_counter() - started, spent)
        if processes.is_first:
            report = write_beside_weights(plan, sources, place.folder, report)
            place.publish()
    processes.wait()
    return report


def told(plan: Plan, processes: Processes) -> str:
    """Say in words what is merged, how, and by how many processes."""
    method, count, files = plan.lock.method, processes.count, len(plan.shards)
    tensors = number_of(len(plan.jobs), "tensor")
    text = f"merging {tensors} by {method['name']}, scaling {method['scaling']:g},"
    if not plan.merged and plan.lock.layers:
        text = f"copying {tensors}"
    if count == 1:
        return text
    text += f" in {count} processes"
    if count > files:
        idle = count - files
        text += f" ({idle} with nothing to do: {number_of(files, 'file')}, and more by output.shard_size)"
    return text


def is_finished(plan: Plan) -> bool:
    """Say whether the recipe's output is this very merge, complete."""
    return finished(PartialFolder(plan.recipe.output_path, plan.digest)) is not None


class ShardSink(Protocol):
    """Keeps the finished files of a merge.

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
    sink: ShardSink,
    progress: Progress | None,
    chunk_elements: int | None,
    processes: Processes,
    backend: Backend | None = None,
) -> Spent:
    """Make this process's share of the output's files in `place`, but those that `sink` has.

    Returns:
        Time and memory, as the merge report has them.
    """
    with MemoryWatch() as memory, _raising(progress or (lambda num_bytes: None)) as advance:
        own = share(plan.shards, processes)
        missing = [*unfinished(own, sink, advance)]
        if len(missing) < len(own):
            LOG.info("resuming: %d of %d files are there", len(own) - len(missing), len(own))
        budget = budget_of(plan, threads_of(plan))
        if chunk_elements:
            budget = replace(budget, chunk_elements=chunk_elements)
        backend = backend or backend_of(plan)
        LOG.debug(
            "computing by %s in %d threads, %d elements at a time",
            type(backend).__name__.lower(),
            budget.num_threads,
            budget.chunk_elements,
        )
        workers = Workers(budget, in_order=plan.num_remote > 0)
        engine = engine_of(plan)(plan, sources, place, advance, workers, sink.num_open, backend)
        with one_thread(), _telling_what_is_kept(len(own), len(own) - len(missing)) as count:
            try:
                engine.look_at_model(missing, place.survey_folder if processes.count > 1 else None)
                for record in engine.make(missing):
                    with os_errors(place.folder / record.file), engine.clock.spend("store"):
                        sink.record(record)
                    count()
            except DamagedError:
                place.forget()  # what is finished may be made of the same bytes
                raise
    return Spent(engine.clock.seconds, memory.peak_bytes)


@contextmanager
def _telling_what_is_kept(num_files: int, num_finished: int) -> Iterator[Callable[[], None]]:
    """Say after an interruption how many files are finished; what this yields counts another one."""

    def count() -> None:
        nonlocal num_finished
        num_finished += 1

    try:
        yield count
    except KeyboardInterrupt:
        more = "" if num_finished else " (a smaller output.shard_size makes more files)"
        LOG.info("%d of %d files are finished, and kept%s", num_finished, num_files, more)
        raise


def unfinished(shards: tuple[Shard, ...], sink: ShardSink, advance: Progress) -> Iterator[Shard]:
    """Yield the shards that `sink` does not have; the bytes of the others are progress."""
    for shard in shards:
        if sink.intact(shard.file) is None:
            yield shard
        else:
            advance(shard.data_bytes)


def backend_of(plan: Plan) -> Backend:
    """Return the backend of the recipe's device, or the fastest on the CPU for this many elements."""
    if takes_torch(plan):
        import_module("torch")  # now, for its settings to hold in all threads
    return choose_backend(plan.merged_elements, plan.recipe.output.device)


class _Cancelled(BaseException):
    """Carries an error of a progress through code that turns the errors of methods into messages."""

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


def prepare(place: PartialFolder, plan: Plan | None, cache: SourceCache) -> HubMagmaxError | None:
    """Prepare the output, or return why not, so that every process ends with the same message.

    Whole files whose sha256 the lock of `plan` holds are compared first.
    """
    try:
        if plan is not None:
            check_hashes(plan.recipe, plan.lock, cache)
        place.prepare(versions_of(plan.recipe, plan.lock, cache) if plan is not None else "")
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


def share(shards: tuple[Shard, ...], processes: Processes) -> tuple[Shard, ...]:
    """Return the shards that this process makes, in order.

    The largest go first, each to the process with the fewest bytes so far (the lowest rank of
    equal ones), so that all of them end at about the same time.
    """
    loads = [0] * processes.count
    mine = set()
    for shard in sorted(shards, key=lambda shard: (-shard.data_bytes, shard.file)):
        rank = min(range(processes.count), key=lambda rank: (loads[rank], rank))
        loads[rank] += shard.data_bytes
        if rank == processes.rank:
            mine.add(shard.file)
    return tuple(shard for shard in shards if shard.file in mine)


def plan_unfinished(
    recipe: Recipe, locked: Lock, cache: SourceCache, processes: Processes, in_spite_of: Iterable[str] = ()
) -> tuple[Plan, bool]:
    """Return everything that merging will do, and whether the recipe's folder holds it, complete.

    What is finished has passed its faults, and gets no findings.

    Args:
        recipe, locked: What to merge.
        cache: Checkpoints that are open already.
        processes: Of which the first decides.
        in_spite_of: Names of faults that are accepted.
    """
    made = plan_from_headers(recipe, locked, cache=cache)
    if processes.first_decides(lambda: is_finished(made)):
        return replace(made, in_spite_of=tuple(in_spite_of)), True
    return with_findings(made, cache, in_spite_of), False
