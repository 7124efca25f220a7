"""Merges in memory, any number of them from the same checkpoints, without writing.

A method surveys the tensors once for a preference; models for any scaling coefficient follow, the same to the
bit as the files that `merging.merge` writes, by the same backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from hub_magmax.checkpoints.data_statistics import DataStatistics, open_statistics
from hub_magmax.checkpoints.opening import as_checkpoints, as_merged, open_held
from hub_magmax.checkpoints.scaled import read_by_merges
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.backend import Backend
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import num_threads, one_thread
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.chunk_memory import ChunkMemory
from hub_magmax.merging.chunks import JoinedChunks, StoredChunks
from hub_magmax.merging.combine import merged_chunks
from hub_magmax.merging.copying import unmerged_chunks
from hub_magmax.merging.lengths import find_lengths
from hub_magmax.merging.survey import survey_all
from hub_magmax.merging.tensors import tensor_rule
from hub_magmax.methods import Rule, surveys_model
from hub_magmax.methods.data_statistics import OF_THE_MERGE, StatisticsKind
from hub_magmax.planning.budget import CHUNK_ELEMENTS, MAX_THREADS
from hub_magmax.planning.fitting.data_statistics import merged_by_statistics
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.planning.statistics import shares_of
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.merge_values import MergeValues
from hub_magmax.recipe.schema import Recipe

T = TypeVar("T")

#: Merges for which loading or compiling loops must pay: a comparison makes more.
_EXPECTED_MERGES = 16


@dataclass(frozen=True)
class MergedModel:
    """A method under one preference, with its tensors surveyed: merges with any scaling coefficient.

    Attributes:
        by_rules: Whether the numbers of the recipe's rules count for their tensors.
    """

    merger: InMemoryMerger
    values: MergeValues
    by_rules: bool
    rules: Mapping[str, Rule]
    chunks: Mapping[str, StoredChunks]

    def weights(self, scaling: float) -> dict[str, Tensor]:
        """Return all tensors of the merged model, in the dtypes and shapes of its files.

        Args:
            scaling: Scaling coefficient of the tensors about which no rule names one.

        Raises:
            NonFiniteError: At a NaN or infinity in a checkpoint or in the merged model.
        """
        scaled = replace(self.values, method={**self.values.method, "scaling": scaling})

        def tensor(job: TensorJob) -> Tensor:
            values = self.merger.plan.values_of(job.tensor, scaled) if self.by_rules else scaled
            return self._tensor(job, values).view(job.shape)

        return self.merger.for_each(self.merger.plan.jobs, tensor)

    def _tensor(self, job: TensorJob, values: MergeValues) -> Tensor:
        out = torch.empty(job.num_elements, dtype=torch_dtype(job.dtype))
        if job.merged:
            for start, merged in merged_chunks(
                self.chunks[job.name], self.rules[job.name], job.dtype, values.scaling
            ):
                out[start : start + len(merged.values.bits)] = merged.values.tensor
        else:
            shares = shares_of(values.method, values.weights, values.scaling)
            for start, found in self.merger.unmerged(job, shares):
                out[start : start + len(found.bits)] = found.tensor
        return out


class InMemoryMerger:
    """A recipe's checkpoints, open for merging.

    Holds what methods find out about a tensor, a byte per element at most for built-in ones, for each call of
    `merge` that is kept. Checkpoints on the Hub are fetched whole into memory, once; local ones are read
    again for each merge.

    Args:
        recipe: Its tensors' rules and output dtype decide what is merged, and how it is stored.
        lock: Pins the checkpoints; its method and preference play no part.
        backend: Computes; by default the one for the recipe's `output.device`, or what is fastest on the CPU
            for this many elements. The bytes are the same for all.
        sources: Checkpoints by name, `base_model` first, in place of those that the lock pins.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        LockError: If a source is no longer what was locked.
        RecipeError: If the recipe corrects what is merged, which is done in files alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        lock: Lock,
        backend: Backend | None = None,
        sources: Mapping[str, TensorSource] | None = None,
    ) -> None:
        if recipe.correction is not None:
            raise RecipeError(
                "models that are tried are merged without the correction",
                key=("correction",),
                expected="a recipe without it",
                hint="Leave correction out to compare or sweep, and put it back for the merge.",
            )
        with ExitStack() as stack:
            if sources is None:
                opened = {
                    name: stack.enter_context(closing(open_held(recipe, locked)))
                    for name, locked in lock.every_source.items()
                }
                sources = as_checkpoints(recipe, lock, opened)
            self.sources = sources
            self.plan: Plan = make_plan(recipe, lock, sources)
            expected = _EXPECTED_MERGES * self.plan.merged_elements
            self._backend = backend or choose_backend(expected, recipe.output.device)
            self._num_threads = min(num_threads(), MAX_THREADS)
            self._lengths = lock.lengths
            if recipe.norms is not None and lock.lengths is None:
                merged = as_merged(recipe, lock, sources, self.plan.values_of)
                self._lengths = find_lengths(self.plan, merged)
            self._threads = stack.enter_context(ThreadPoolExecutor(self._num_threads))
            self._memory = ChunkMemory()
            self._opened_statistics: dict[StatisticsKind | None, DataStatistics | None] = {}
            self._stack = stack.pop_all()

    def __enter__(self) -> InMemoryMerger:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def merge(
        self,
        method: Mapping[str, Any],
        weights: tuple[float, ...],
        seed: int | None = None,
        *,
        by_rules: bool = True,
    ) -> MergedModel:
        """Survey all tensors for one method under one preference.

        Args:
            method: `name` and every option, as a lock has them; `scaling` plays no part.
            weights: One per task, non-negative, summing to 1.
            seed: Of draws; the lock's by default.
            by_rules: Merge tensors by the numbers of the recipe's rules, where these have some.

        Raises:
            NonFiniteError: At a NaN or infinity in a checkpoint, if the method surveys it.
        """
        values, seed = MergeValues(method, weights), self.plan.lock.seed if seed is None else seed

        def values_of(tensor: str) -> MergeValues:
            return self.plan.values_of(tensor, values) if by_rules else values

        merged = as_merged(self.plan.recipe, self.plan.lock, self.sources, values_of)
        sources = read_by_merges(merged, self._lengths, values_of)
        jobs = [*filter(attrgetter("merged"), self.plan.jobs)]
        chunks = {job.name: self._chunks(job, sources, values_of(job.tensor)) for job in jobs}

        def joined(values: MergeValues) -> JoinedChunks:
            each = tuple(self._chunks(job, sources, values) for job in self.plan.merged)
            return JoinedChunks(each, lambda in_part: None, self._num_threads)

        sets = {
            found.surveyed: found for job in jobs if surveys_model((found := values_of(job.tensor)).method)
        }
        with one_thread(), torch.no_grad():
            whole = survey_all(sets.values(), self.plan.merged, joined, seed)

        statistics = self._statistics(values.how.statistics)
        self._check_preference(values)

        def rule_of(job: TensorJob) -> Rule:
            own, generator = values_of(job.tensor), CounterGenerator(seed, job.tensor)
            known = statistics.of(job.tensor) if statistics else None
            return whole.part(job.tensor, own) or tensor_rule(
                chunks[job.name], job.shape, own.method, own.weights, generator, known
            )

        return MergedModel(self, values, by_rules, self.for_each(jobs, rule_of), chunks)

    def _statistics(self, kind: StatisticsKind | None) -> DataStatistics | None:
        """Return the statistics of a kind, which stay open."""
        if kind not in self._opened_statistics:
            opened = open_statistics(self.plan.recipe, self.plan.lock, kind)
            found = self._opened_statistics[kind] = self._stack.enter_context(opened)
            if found is not None:
                merged_by_statistics(self.plan, found)
        return self._opened_statistics[kind]

    def _check_preference(self, values: MergeValues) -> None:
        """Raise RecipeError where statistics are of the merge under another preference."""
        if values.how.statistics == OF_THE_MERGE and tuple(values.weights) != self.plan.lock.weights:
            raise RecipeError(
                f"the statistics of {values.how.name} are of one preference, and this is another one",
                where=values.how.label,
                hint="Choose regmean, whose statistics do not depend on it, or lock each preference alone.",
            )

    def for_each(self, jobs: Sequence[TensorJob], work: Callable[[TensorJob], T]) -> dict[str, T]:
        """Return what `work` returns, by name; tensors are shared between threads, large ones first."""

        def in_one_thread(job: TensorJob) -> T:
            with torch.no_grad():  # tensors made in inference mode could not be trained on
                return work(job)

        with one_thread():
            begun = {
                job.name: self._threads.submit(in_one_thread, job)
                for job in sorted(jobs, key=lambda job: -job.num_elements)
            }
            try:
                return {job.name: begun[job.name].result() for job in jobs}
            finally:
                for one in begun.values():
                    one.cancel()
                wait(begun.values())

    def unmerged(self, job: TensorJob, shares: tuple[float, ...]) -> Iterator[tuple[int, Stored]]:
        """Yield the parts of a tensor that is not merged, and the index of the first element of each."""
        start = 0
        for values in unmerged_chunks(job, self.sources, shares, CHUNK_ELEMENTS):
            yield start, values
            start += len(values.bits)

    def _chunks(
        self, job: TensorJob, sources: Mapping[str, TensorSource], values: MergeValues
    ) -> StoredChunks:
        size, (base, *tasks) = job.num_elements, sources.values()
        unread = values.how.unread(values.weights)
        # The base model in place of a checkpoint makes its task vector zero.
        read = tuple(base if task in unread else one for task, one in enumerate(tasks))
        return StoredChunks(job.tensor, size, base, read, CHUNK_ELEMENTS, None, self._backend, self._memory)
