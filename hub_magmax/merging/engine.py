"""The merge engine: threads that read each tensor in chunks, merge, write and record."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from hub_magmax.checkpoints.data_statistics import open_statistics
from hub_magmax.checkpoints.scaled import read_by_merges
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.files import os_errors
from hub_magmax.kernels.arrays import IN_MEMORY_BYTES, Scratch
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.kernels.lazy_imports import Tensor, inference
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.merging.adapters import SolvedLayer, factor_values, solved_together
from hub_magmax.merging.bundles import Bundle, UnfitError, bundled, merge_bundle
from hub_magmax.merging.chunks import JoinedChunks, StoredChunks
from hub_magmax.merging.combine import merged_chunks, merged_vector
from hub_magmax.merging.copying import unmerged_chunks
from hub_magmax.merging.correcting import CorrectedWriter, correction_of
from hub_magmax.merging.making import FileInMaking, Steps, Unit, make_in_turn, starting_order
from hub_magmax.merging.one_pass import OnePassMerge
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.merging.output.shard import ShardFile, shard_header
from hub_magmax.merging.output.tensor import Tally, TensorWriter, record_of
from hub_magmax.merging.profile import Clock, Progress
from hub_magmax.merging.survey import ModelRules, survey_all
from hub_magmax.merging.tensors import tensor_rule
from hub_magmax.merging.workers import Workers
from hub_magmax.methods import Rule, get_method
from hub_magmax.methods.magmax import always
from hub_magmax.planning.budget import HELD_CHUNKS, OPEN_CHUNKS, gives_elements
from hub_magmax.planning.plan import FactorJob, Plan, Shard, SolvedJob, TensorJob
from hub_magmax.planning.statistics import shares_of
from hub_magmax.recipe.merge_values import MergeValues


class Engine:
    """Makes files: each thread merges one tensor after the other, and what they wrote is read back meanwhile.

    No tensor depends on another, so which thread makes which, and when, changes no byte.

    Args:
        workers: Threads and their memory.
        num_open: Files that may be incomplete at a time.
        backend: Computes.

    Attributes:
        surveys: Whether methods look at values before they merge.
    """

    surveys = True

    def __init__(
        self,
        plan: Plan,
        sources: Mapping[str, TensorSource],
        place: PartialFolder,
        progress: Progress,
        workers: Workers,
        num_open: int,
        backend: Backend,
    ) -> None:
        self.plan, self.sources, self.place, self.num_open = plan, sources, place, num_open
        self.backend, self._read = backend, read_by_merges(sources, plan.lock.lengths, plan.values_of)
        self.workers, self.budget, self.reader = workers, workers.budget, workers.reader
        self.scratch = Scratch(place.folder, IN_MEMORY_BYTES // workers.num_sites)
        self.model_rules = ModelRules({})
        self._not_looked_at = plan.looked_at_bytes
        self._progress = progress
        self.clock = Clock()
        kind, self._opened = get_method(plan.lock.method["name"]).statistics, ExitStack()
        self._statistics = self._opened.enter_context(open_statistics(plan.recipe, plan.lock, kind))
        by_statistics = frozenset(plan.by_statistics)
        self._by_statistics = {job.tensor for job in plan.jobs if job.name in by_statistics}

    def expect(self, names: Mapping[str, Iterable[str]], in_part: bool = False) -> None:
        """Tell each source which of its tensors are read next, in order."""
        budget_bytes = self.budget.read_ahead_bytes // len(self.sources)
        for name, source in self.sources.items():
            source.expect(names[name], budget_bytes, in_part=in_part)

    def look_at_model(self, missing: Sequence[Shard], folder: Path | None) -> None:
        """Find the rules of a method whose scope is the model, where any of these files needs them.

        A folder keeps it for other processes.
        """
        if self.surveys and any(job.merged for shard in missing for job in shard.jobs):
            with inference(), self.clock.spend("compute"):
                self.model_rules = survey_all(
                    self.plan.surveyed, self.plan.merged, self._all_chunks, self.plan.lock.seed, folder
                )
        if self._not_looked_at:  # by another process, or earlier
            self._progress(self._not_looked_at)

    def _all_chunks(self, values: MergeValues) -> JoinedChunks:
        """Return the chunks of all merged tensors, one after the other, of the tasks that count."""
        unread = values.unread(self.plan.lock.tasks)
        jobs = [replace(job, unread=unread) for job in self.plan.merged]
        num_bytes = {job.name: job.num_bytes for job in jobs}

        def looked_at(name: str) -> None:
            with self.workers.progress_lock:
                if found := num_bytes.pop(name, 0):
                    self._not_looked_at -= found
                    self._progress(found)

        return JoinedChunks(
            tuple(self.chunks(job, self.reader) for job in jobs),
            partial(self.expect, self.plan.tensors_read(jobs)),
            self.budget.num_threads,
            looked_at,
        )

    def close(self) -> None:
        """Stop, and return once nobody writes to a file any more."""
        self.clock.stop()
        self.workers.close()
        self._opened.close()

    def make(self, shards: Sequence[Shard]) -> Iterator[ShardRecord]:
        """Write files, and yield their records in order; of several errors the first in order is raised."""
        self.expect(
            self.plan.tensors_read(
                [
                    job
                    for shard in shards
                    for job in starting_order(shard.jobs, in_order=self.workers.in_order)
                ]
            )
        )
        with ExitStack() as unfinished:
            begun: deque[FileInMaking] = deque()
            try:
                for shard in shards:
                    begun.append(self.begin(shard, unfinished))
                    for unit in begun[-1].order:
                        make_in_turn(self.workers.makers, [begun[-1].begin(unit)])
                    if len(begun) == self.num_open:
                        yield begun.popleft().wait()
                while begun:
                    yield begun.popleft().wait()
            finally:
                self.close()  # before a file is abandoned

    def begin(self, shard: Shard, unfinished: ExitStack) -> FileInMaking:
        """Open a file and write its header; what is unfinished when the stack is closed is removed."""
        path = self.place.folder / shard.file
        with os_errors(path):
            file = ShardFile(path)
            unfinished.callback(file.abandon)
            header = shard_header(self.plan, shard)
            file.write(header, 0)
        places, position = {}, len(header)
        for job in shard.jobs:
            places[job.name] = position
            position += job.num_bytes
        units = self.units(shard)

        def steps(unit: Unit) -> Steps:
            return self._unit(file, unit, places)

        def finish(tallies: Iterable[Tally]) -> ShardRecord:
            counted = []
            with os_errors(path):
                for unit, tally in zip(units, tallies, strict=True):
                    counted.append(tally)
                    last = unit if isinstance(unit, TensorJob) else unit.jobs[-1]
                    with self.clock.spend("store"):
                        file.read_back(places[last.name] + last.num_bytes)
                with self.clock.spend("store"):
                    return record_of(shard.file, file, counted)

        order = starting_order(units, in_order=self.workers.in_order)
        return FileInMaking(units, order, steps, self.clock, finish)

    def units(self, shard: Shard) -> Sequence[Unit]:
        """Return what is made at a time: a tensor, small neighbours in files, or a layer of an adapter."""
        if self.plan.ranks:
            return [*solved_together(shard.jobs)]
        is_bundled = get_method(self.plan.lock.method["name"]).is_bundled and not self.plan.lock.lengths
        if self.workers.in_order or not is_bundled or self.plan.lock.correction:
            return shard.jobs
        return [*bundled(shard.jobs, self.sources, self.budget.chunk_elements, self.plan.values_of)]

    def _unit(self, file: ShardFile, unit: Unit, places: Mapping[str, int]) -> Steps:
        """Write what is made at a time, at its place in a file."""
        if isinstance(unit, SolvedLayer):
            return self._layer(file, unit, places)
        if not isinstance(unit, Bundle):
            return (yield from self._tensor(file, unit, places[unit.name]))
        try:
            if len({self.is_unchanged(job) for job in unit.jobs}) > 1:
                raise UnfitError  # what is counted differs
            return self._bundle(file, unit, places[unit.jobs[0].name])
        except UnfitError:  # nothing was written
            whole = Tally(len(self.plan.lock.tasks))
            for job in unit.jobs:
                whole.include((yield from self._tensor(file, job, places[job.name])))
            return whole

    def _layer(self, file: ShardFile, layer: SolvedLayer, places: Mapping[str, int]) -> Tally:
        tally = Tally(len(self.plan.lock.tasks))
        vector = self._merged_vector(layer.jobs[0]) if layer.is_whole else None
        factors, lost = layer.solve(self.plan, self.sources, self.backend, vector)
        tally.lost.append(lost)
        for job, factor in zip(layer.jobs, factors, strict=True):
            with self.clock.spend("write"):
                file.write(Stored.of(factor).content, places[job.name])
            self.advance(job.num_bytes)
        return tally

    def _merged_vector(self, job: SolvedJob) -> Tensor:
        """Return the merged task vector of a layer's matrix, scaled."""
        values, chunks = self.plan.values_of(job.name), self.chunks(job.whole, self.reader)
        rule = self.rule(chunks, job.of_shape, values)
        return merged_vector(chunks, rule).view(job.sides) * values.scaling

    def _bundle(self, file: ShardFile, bundle: Bundle, position: int) -> Tally:
        tally, sources = Tally(len(self.plan.lock.tasks)), self._read_sources(bundle.jobs[0])
        merged, rule = merge_bundle(
            bundle,
            sources,
            self.plan.lock.seed,
            self.backend,
            self.workers.memory,
            self.clock,
            self.model_rules,
            self.workers.shared,
        )
        tally.add(rule)
        tally.count(merged.counts)
        if self.is_unchanged(bundle.jobs[0]):
            tally.set_apart()
        with self.clock.spend("write"):
            file.write(merged.values.content, position)
        for source in sources:
            for job in bundle.jobs:
                source.release(job.tensor, job.num_elements)
        self.advance(bundle.num_bytes)
        return tally

    def _tensor(self, file: ShardFile, job: TensorJob, position: int) -> Steps:
        """Write one tensor at `position` of a file."""
        tally = Tally(len(self.plan.lock.tasks))
        is_corrected = job.name == self.plan.lock.correction.get("tensor")
        kind = partial(CorrectedWriter, job) if is_corrected else TensorWriter
        slot = kind(file, position, ITEM_BYTES[job.dtype], self.clock, self.advance)
        if job.merged and not isinstance(job, FactorJob):
            yield from self.merge(job, tally, slot)
            if self.is_unchanged(job):
                tally.set_apart()
        else:
            self._copy(job, tally, slot)
        if isinstance(slot, CorrectedWriter):
            slot.finish(correction_of(self.plan.recipe, self.plan.lock))
        return tally

    def advance(self, num_bytes: int) -> None:
        """Tell of progress."""
        with self.workers.progress_lock:
            self._progress(num_bytes)

    def _copy(self, job: TensorJob, tally: Tally, slot: TensorWriter) -> None:
        """Write a tensor that needs no task vectors."""
        if isinstance(job, FactorJob):
            slot.write(0, Stored.of(factor_values(job, self.sources)))
            return
        values, start = self.plan.values_of(job.tensor), 0
        shares = shares_of(values.method, values.weights, values.scaling)
        for found in unmerged_chunks(job, self.sources, shares, self.budget.chunk_elements, self.clock):
            if not found.is_finite():
                tally.not_finite = [job.name]
            slot.write(start, found)
            start += len(found.bits)

    def known_rule(self, job: TensorJob, values: MergeValues) -> Rule | None:
        """Return how one tensor is merged, where that is known without a look at it."""
        rule = self.model_rules.part(job.tensor, values)
        if rule is None and job.name in self.plan.unchanged and gives_elements(values):
            return always(0)  # all tasks have the base model's elements, and a survey would keep every tie
        return rule

    def merge(self, job: TensorJob, tally: Tally, slot: TensorWriter) -> Generator[None]:
        """Write a merged tensor, with a pause after each chunk that other sites may merge too."""
        values, chunks, early = self.plan.values_of(job.tensor), self.chunks(job, self.reader), None
        rule = self.known_rule(job, values)
        if rule is None:
            if chunks.shared is None:
                early = self._early(job, values.scaling, slot)
                chunks = replace(chunks, one_pass=early.chunk)
            rule = self.rule(chunks, job.shape, values)
        tally.add(rule)
        if early is not None and (total := early.finish(rule)) is not None:
            tally.count(total)
            return
        for start, merged in merged_chunks(chunks, rule, job.dtype, values.scaling):
            tally.count(merged.counts)
            slot.write(start, merged.values)
            stop = start + len(merged.values.bits)
            del merged  # which would be held while other sites merge the chunk
            if chunks.is_turn_over(stop):
                yield

    def rule(self, chunks: StoredChunks, shape: tuple[int, ...], values: MergeValues) -> Rule:
        """Return how one tensor is merged."""
        generator = CounterGenerator(self.plan.lock.seed, chunks.name)
        known = None
        if self._statistics:
            is_known = chunks.name in self._by_statistics
            known = self._statistics.of(chunks.name) if is_known else (None,) * chunks.num_tasks
        return tensor_rule(chunks, shape, values.method, values.weights, generator, known)

    def _early(self, job: TensorJob, scaling: float, slot: TensorWriter) -> OnePassMerge:
        most_open, most_held = (number * self.budget.chunk_elements for number in (OPEN_CHUNKS, HELD_CHUNKS))
        held = None
        if job.num_elements <= most_held and job.num_elements:
            held = self.workers.merged_memory.rows(bits_dtype(job.dtype), job.num_elements, [0])[0]
        return OnePassMerge(
            job.num_elements, job.dtype, scaling, most_open, held, slot.write, slot.read_again
        )

    def chunks(self, job: TensorJob, reader: ThreadPoolExecutor | None) -> StoredChunks:
        """Return the chunks of one tensor, of all checkpoints."""
        base, *tasks = self._read_sources(job)
        # A rule with numbers for each element is not held while other sites merge the tensor. What is one
        # chunk is surveyed and merged by one site after the other.
        is_one = job.num_elements <= self.budget.chunk_elements
        is_shared = is_one or self.plan.values_of(job.tensor).how.is_light
        return StoredChunks(
            job.tensor,
            job.num_elements,
            base,
            tuple(tasks),
            self.budget.chunk_elements,
            reader,
            self.backend,
            self.workers.memory if reader is None else None,
            self.clock,
            self.scratch,
            shared=self.workers.shared if is_shared else None,
        )

    def is_unchanged(self, job: TensorJob) -> bool:
        """Say whether no task changes a tensor, as far as is known without a look at its values."""
        base, *tasks = self._read_sources(job)
        return all(task is base or task.keeps(job.tensor) for task in tasks)

    def _read_sources(self, job: TensorJob) -> list[TensorSource]:
        # The base model in place of a checkpoint makes its task vector zero.
        return [self._read["base_model" if name in job.unread else name] for name in self.plan.lock.sources]
