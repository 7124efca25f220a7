"""Merge in memory, any number of times from the same checkpoints, and write nothing.

The merged task vector of a method and a preference is found once; models for any scaling coefficient
follow from it, the same to the bit as the files that `merging.merge` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hub_magmax import methods
from hub_magmax.checkpoints.opening import as_checkpoints, open_held
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.stored import torch_dtype
from hub_magmax.kernels import reference
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.chunks import JoinedChunks, StoredChunks
from hub_magmax.merging.combine import one_thread
from hub_magmax.merging.copying import copied_chunks
from hub_magmax.merging.survey import survey
from hub_magmax.merging.tensors import apply_rule, tensor_rule
from hub_magmax.methods import TensorRule, get_method, surveys_model
from hub_magmax.planning.layout import make_plan
from hub_magmax.planning.plan import CHUNK_ELEMENTS, Plan, TensorJob
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe


@dataclass(frozen=True)
class MergedVector:
    """What a method made of the task vectors under one preference, before it is scaled.

    Attributes:
        task_vector: float32 by tensor, flat; of the tensors that are merged.
    """

    workbench: Workbench
    task_vector: Mapping[str, Tensor]

    def weights(self, scaling: float) -> dict[str, Tensor]:
        """Return all tensors of the merged model, in the dtypes and shapes of its files."""
        return {job.name: self._tensor(job, scaling).view(job.shape) for job in self.workbench.plan.jobs}

    def _tensor(self, job: TensorJob, scaling: float) -> Tensor:
        bench = self.workbench
        if not job.merged:
            tasks = tuple(bench.plan.lock.tasks)
            copied = [part.tensor for part in copied_chunks(job, bench.sources, tasks, CHUNK_ELEMENTS)]
            return torch.cat(copied) if copied else torch.empty(0, dtype=torch_dtype(job.dtype))
        base = bench.sources["base_model"].read(job.name, 0, job.num_elements)
        factor = torch.tensor(scaling, dtype=torch.float64)
        return reference.apply_update(base, self.task_vector[job.name], factor, torch_dtype(job.dtype))


class Workbench:
    """A recipe's checkpoints, open for merging.

    Holds one merged task vector per call of `merge` that is kept, four bytes per element. Checkpoints on
    the Hub are fetched whole into memory, once; local ones are read again for each merge.

    Args:
        recipe: Its tensors' rules and output dtype decide what is merged, and how it is stored.
        lock: Pins the checkpoints; its method and preference play no part.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        LockError: If a source is no longer what was locked.
    """

    def __init__(self, recipe: Recipe, lock: Lock) -> None:
        with ExitStack() as stack:
            opened = {
                name: stack.enter_context(closing(open_held(recipe, locked)))
                for name, locked in lock.sources.items()
            }
            whole = as_checkpoints(recipe, lock, opened)
            self.sources: Mapping[str, TensorSource] = whole
            indexes = {name: source.index for name, source in whole.items()}
            self.plan: Plan = make_plan(recipe, lock, indexes)
            self._reader = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def merge(self, method: Mapping[str, Any], weights: tuple[float, ...]) -> MergedVector:
        """Return the merged task vector of one method under one preference.

        Args:
            method: `name` and every option, as a lock has them; `scaling` plays no part.
            weights: One per task, non-negative, summing to 1.

        Raises:
            NonFiniteError: At a NaN or infinity in a checkpoint.
        """
        unread = get_method(method["name"]).unread(weights)
        base, *tasks = self.sources.values()
        # The base model in place of a checkpoint makes its task vector zero.
        read = tuple(base if task in unread else source for task, source in enumerate(tasks))
        chunks = {job.name: self._chunks(job, base, read) for job in self.plan.jobs if job.merged}
        with one_thread(), torch.inference_mode():
            rule_of = self._rules(chunks, method, weights)
            return MergedVector(self, {name: _merged(rule_of(name), found) for name, found in chunks.items()})

    def _rules(
        self, chunks: Mapping[str, StoredChunks], method: Mapping[str, Any], weights: tuple[float, ...]
    ) -> Callable[[str], TensorRule]:
        jobs, seed = {job.name: job for job in self.plan.jobs}, self.plan.lock.seed
        if chunks and surveys_model(method):
            joined = JoinedChunks(tuple(chunks.values()), lambda in_part: None)
            return survey([jobs[name] for name in chunks], joined, method, weights, seed).part

        def rule_of(name: str) -> TensorRule:
            generator = CounterGenerator(seed, name)
            return tensor_rule(chunks[name], jobs[name].shape, method, weights, generator)

        return rule_of

    def _chunks(self, job: TensorJob, base: TensorSource, tasks: tuple[TensorSource, ...]) -> StoredChunks:
        return StoredChunks(job.name, job.num_elements, base, tasks, CHUNK_ELEMENTS, self._reader)


def _merged(rule: TensorRule, chunks: StoredChunks) -> Tensor:
    found = [apply_rule(rule, start, task_vectors) for start, task_vectors in chunks]
    return torch.cat(found) if found else torch.empty(0)


@dataclass(frozen=True)
class Candidate:
    """One way to merge.

    Attributes:
        method: `name`, `scaling` and every option.
        preference: What the weights are called: `recipe`, `uniform`, or a name from `compare`.
        weights: One per task.
    """

    method: Mapping[str, Any]
    preference: str
    weights: tuple[float, ...]

    def same_as(self, other: Candidate) -> bool:
        """Say whether both give the same model."""
        return (self.method, self.weights) == (other.method, other.weights)

    @property
    def distance_to_default(self) -> float:
        """How far the scaling coefficient is from the method's own, as the logarithm of their ratio."""
        ratio = self.method["scaling"] / (methods.get_method(self.method["name"]).scaling or math.inf)
        return abs(math.log(ratio)) if ratio > 0 else math.inf

    @property
    def label(self) -> str:
        """Return the method as a person would name it: without what most share."""
        selection = self.method.get("selection")
        return f"{self.method['name']} {selection}" if selection else str(self.method["name"])
