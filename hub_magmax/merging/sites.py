"""Merges of the same checkpoints for several sites: each tensor is read once, and merged for all of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from hub_magmax.checkpoints.opening import open_together
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import DamagedError, HubMagmaxError, LockError
from hub_magmax.files import from_here, os_errors
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.merging.engine import Engine
from hub_magmax.merging.execution import backend_of, finished, prepare, share, told, unfinished
from hub_magmax.merging.making import FileInMaking, Unit, UnitInMaking, make_in_turn, starting_order
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.merging.output.side_files import report_of, write_beside_weights
from hub_magmax.merging.profile import MemoryWatch, Progress, Spent
from hub_magmax.merging.selections.engines import engine_of
from hub_magmax.merging.workers import Workers
from hub_magmax.planning.budget import budget_of, threads_of
from hub_magmax.planning.findings.finding import refuse_faults
from hub_magmax.planning.plan import Plan, Shard, TensorJob
from hub_magmax.processes import Processes, find_processes

LOG = logging.getLogger(__name__)


@dataclass
class _Site:
    """The merge for one site under way, until it failed.

    Attributes:
        missing: Files that are still to be made, by name.
    """

    plan: Plan
    place: PartialFolder
    engine: Engine
    missing: dict[str, Shard]
    error: HubMagmaxError | None = None

    def fail(self, error: HubMagmaxError) -> None:
        """Note an error, and stop this merge."""
        self.error = self.error or error
        self.engine.clock.stop()


def merge_sites(
    plans: Mapping[str, Plan],
    *,
    progress: Progress | None = None,
    processes: Processes | None = None,
    cache: SourceCache | None = None,
) -> dict[str, MergeReport | HubMagmaxError]:
    """Carry out several plans of the same checkpoints, and return the report of each, or why it failed.

    Each folder is what `merge` makes of its plan, byte for byte, and appears when it is complete. What every
    plan reads is read once: a tensor is merged for all sites before the next one. A method whose scope is the
    model reads all tensors before that, once for each site. What fails for one site (its disk, its output)
    leaves the others whole; called again, what is missing is made.

    Args:
        plans: By site, from `pipeline.plan`; of recipes that differ in method, preference and output.
        progress: Called with the number of bytes that each finished chunk wrote; `Plan.progress_bytes` of all
            plans that are not finished in all.
        processes: Which of how many processes this is; found from the launcher by default.
        cache: Checkpoints that are open already.

    Raises:
        LockError: If the plans pin different checkpoints.
        SourceError, CheckpointError: What concerns a checkpoint, and so every site. Finished files are kept.
    """
    started = time.perf_counter()
    processes, cache = processes or find_processes(), cache or SourceCache()
    progress = progress or (lambda num_bytes: None)
    _check_alike(plans)
    with ExitStack() as stack, MemoryWatch() as memory, one_thread():
        results, places = _look_at_outputs(plans, processes, cache)
        for place in places.values():
            stack.callback(place.abandon)
        if places:
            merges = [(plans[name].recipe, plans[name].lock) for name in places]
            inputs = dict(zip(places, stack.enter_context(open_together(merges, cache)), strict=True))
            sites = _begin(plans, places, inputs, progress, processes)
            _make(sites, processes)
            for name, site in sites.items():
                spent = Spent(site.engine.clock.seconds, memory.peak_bytes)
                results[name] = _finish(site, time.perf_counter() - started, spent, processes)
            processes.wait()
    return {name: results[name] for name in plans}


def _look_at_outputs(
    plans: Mapping[str, Plan], processes: Processes, cache: SourceCache
) -> tuple[dict[str, MergeReport | HubMagmaxError], dict[str, PartialFolder]]:
    """Return reports of finished merges and why some cannot be made; and folders of those to make."""
    results: dict[str, MergeReport | HubMagmaxError] = {}
    places: dict[str, PartialFolder] = {}
    for name, plan in plans.items():
        place = PartialFolder(plan.recipe.output_path, plan.digest)
        found = processes.first_decides(partial(_look, plan, place, cache))
        if found is None:
            places[name] = place
        else:
            results[name] = found
    return results, places


def _check_alike(plans: Mapping[str, Plan]) -> None:
    """Raise LockError unless all plans pin the same checkpoints."""
    (first, one), *others = plans.items()
    for name, other in others:
        if other.lock.every_source != one.lock.every_source:
            raise LockError(
                f"the sites {first} and {name} pin different checkpoints",
                where="sites",
                hint="Remove the locks of both, so that they are made anew from the same commits.",
            )


def _look(plan: Plan, place: PartialFolder, cache: SourceCache) -> MergeReport | HubMagmaxError | None:
    """Return the report of a finished merge, or why it cannot be made; None where it has to be made."""
    if (done := finished(place)) is not None:
        return done
    try:
        refuse_faults(plan.findings, plan.in_spite_of)
    except HubMagmaxError as error:
        return error
    return prepare(place, plan, cache)


def _begin(
    plans: Mapping[str, Plan],
    places: Mapping[str, PartialFolder],
    inputs: Mapping[str, Mapping[str, TensorSource]],
    progress: Progress,
    processes: Processes,
) -> dict[str, _Site]:
    """Return the merges, with threads and memory that all of them share."""
    own = [plans[name] for name in places]
    budgets = [budget_of(plan, threads_of(plan)) for plan in own]
    least = min(budgets, key=lambda one: (one.num_threads, one.chunk_elements))
    workers = Workers(
        least,
        in_order=any(plan.num_remote for plan in own),
        num_sites=len(own),
        is_limited=any(plan.recipe.output.memory is not None for plan in own),
    )
    sites: dict[str, _Site] = {}
    for name, place in places.items():
        plan = plans[name]
        missing = unfinished(share(plan.shards, processes), place.journal, progress)
        LOG.info("%s into %s", told(plan, processes), from_here(place.output))
        engine = engine_of(plan)(
            plan, inputs[name], place, progress, workers, place.journal.num_open, backend_of(plan)
        )
        sites[name] = _Site(plan, place, engine, {shard.file: shard for shard in missing})
    return sites


# Complex, and flat: the story of the files, from rules to records, and what ends it.
def _make(sites: Mapping[str, _Site], processes: Processes) -> None:
    """Write the files of all sites, a file of each at a time."""
    everyone = [*sites.values()]
    with ExitStack() as open_files:
        try:
            for site in everyone:
                folder = site.place.survey_folder if processes.count > 1 else None
                with processes.failing(site.fail):
                    site.engine.look_at_model([*site.missing.values()], folder)
            files = dict.fromkeys(file for site in everyone for file in site.missing)
            _expect(everyone, files)
            begun: deque[list[tuple[_Site, FileInMaking]]] = deque()
            for file in files:
                begun.append(_start(file, everyone, open_files, processes))
                if len(begun) == everyone[0].engine.num_open:
                    _record(begun.popleft(), processes)
            while begun:
                _record(begun.popleft(), processes)
        except DamagedError:
            for site in everyone:
                site.place.forget()  # what is finished may be made of the same bytes
            raise
        finally:
            for site in everyone:
                site.engine.close()


def _expect(sites: Sequence[_Site], files: Iterable[str]) -> None:
    """Tell the sources which tensors any site reads next, in order."""
    first = sites[0].engine
    reads: dict[str, dict[str, None]] = {name: {} for name in first.sources}
    for file in files:
        lacking = [site for site in sites if file in site.missing]
        for jobs in zip(*(_in_order(site, file) for site in lacking), strict=True):
            for site, job in zip(lacking, jobs, strict=True):
                for name, tensors in site.plan.tensors_read([job]).items():
                    reads[name].update(dict.fromkeys(tensors))
    first.expect(reads)


def _in_order(site: _Site, file: str) -> Sequence[TensorJob]:
    return starting_order(site.missing[file].jobs, in_order=site.engine.workers.in_order)


def _start(
    file: str, sites: Sequence[_Site], open_files: ExitStack, processes: Processes
) -> list[tuple[_Site, FileInMaking]]:
    """Begin a file of every site that lacks it, its tensors one after the other for all of them.

    A thread merges a tensor for a share of the sites, each chunk for one after the other, and reads it once.
    """
    begun: list[tuple[_Site, FileInMaking]] = []
    for site in sites:
        if file in site.missing and site.error is None:
            with processes.failing(site.fail):
                begun.append((site, site.engine.begin(site.missing[file], open_files)))
    alike: dict[tuple[str, ...], list[UnitInMaking]] = {}
    for _, making in begun:
        for unit in making.order:
            alike.setdefault(_names(unit), []).append(making.begin(unit))
    for units in alike.values():
        workers = sites[0].engine.workers
        for first in range(workers.budget.num_threads):  # which end together
            if share := units[first :: workers.budget.num_threads]:
                make_in_turn(workers.makers, share)
    return begun


def _names(unit: Unit) -> tuple[str, ...]:
    """Return the names of the tensors that are made together."""
    return (unit.name,) if isinstance(unit, TensorJob) else tuple(job.name for job in unit.jobs)


def _record(begun: Sequence[tuple[_Site, FileInMaking]], processes: Processes) -> None:
    """Wait for files, and note each that is finished."""
    for site, making in begun:
        if site.error is None:
            with processes.failing(site.fail):
                record = making.wait()
                with os_errors(site.place.folder / record.file), site.engine.clock.spend("store"):
                    site.place.journal.record(record)


def _finish(site: _Site, seconds: float, spent: Spent, processes: Processes) -> MergeReport | HubMagmaxError:
    """Write what lies beside the weights, and make the folder the output."""
    processes.wait()
    with processes.failing(site.fail):
        if site.error is None:
            report = report_of(site.plan, site.place, seconds, spent)
            if processes.is_first:
                report = write_beside_weights(site.plan, site.engine.sources, site.place.folder, report)
                site.place.publish()
            return report
    assert site.error is not None
    return site.error
