"""Small tensors that lie side by side in the output: read, merged and written by one call.

Tensor by tensor, a merge takes .4 ms of each, as long as merging half a million elements: files are lent and
looked at, memory is taken, loops are called. A model of many small experts has ten thousands of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np

from hub_magmax.checkpoints.source import RowMemory, TensorSource
from hub_magmax.files import read_fully
from hub_magmax.kernels.backend import Backend, Merged
from hub_magmax.kernels.chunk import RawChunk
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.stored import Stored, bits_dtype
from hub_magmax.merging.chunk_memory import ChunkMemory, SharedChunk
from hub_magmax.merging.profile import Clock
from hub_magmax.merging.survey import ModelRules
from hub_magmax.methods import Rule
from hub_magmax.methods.rescaling import restores_sums
from hub_magmax.methods.small_tensors import Tensors, looks_at_values, rule_side_by_side
from hub_magmax.planning.budget import SMALL_ELEMENTS
from hub_magmax.planning.plan import FactorJob, TensorJob
from hub_magmax.recipe.merge_values import MergeValues


@dataclass(frozen=True)
class Bundle:
    """Tensors that follow each other in an output file, and are stored alike.

    Attributes:
        jobs: In the order of the file.
        stored_dtype: Of all of them in all sources.
        values: By which all of them are merged.
    """

    jobs: tuple[TensorJob, ...]
    stored_dtype: str
    values: MergeValues

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        return tuple(job.tensor for job in self.jobs)

    @cached_property
    def num_elements(self) -> int:
        return sum(job.num_elements for job in self.jobs)

    @property
    def num_bytes(self) -> int:
        return sum(job.num_bytes for job in self.jobs)


def bundled(
    jobs: Sequence[TensorJob],
    sources: Mapping[str, TensorSource],
    most_elements: int,
    values_of: Callable[[str], MergeValues],
) -> Iterator[TensorJob | Bundle]:
    """Yield the jobs of a file in order, small neighbours together, of at most `most_elements`.

    Tensors with other numbers, `values_of` their names, are not put together.
    """
    for kind, alike in groupby(jobs, partial(_kind, sources, values_of)):
        if kind is None:
            yield from alike
            continue
        firsts, total = list[TensorJob](), 0
        for job in alike:
            if total + job.num_elements > most_elements and firsts:
                yield Bundle(tuple(firsts), kind[0], kind[-1])
                firsts, total = [], 0
            firsts.append(job)
            total += job.num_elements
        yield Bundle(tuple(firsts), kind[0], kind[-1])


def _kind(
    sources: Mapping[str, TensorSource], values_of: Callable[[str], MergeValues], job: TensorJob
) -> tuple[str, str, tuple[str, ...], MergeValues] | None:
    """Return what tensors of a bundle have in common; None of one that is merged alone."""
    if not job.merged or isinstance(job, FactorJob) or not 0 < job.num_elements <= SMALL_ELEMENTS:
        return None
    values = values_of(job.tensor)
    if restores_sums(values.method):  # by a number of the tensor's own
        return None
    dtype = sources["base_model"].index.tensors[job.tensor].dtype
    for source in sources.values():
        if source.index.tensors[job.tensor].dtype != dtype or source.tensor_file(job.tensor) is None:
            return None
    return dtype, job.dtype, job.unread, values


class UnfitError(Exception):
    """A bundle holds a non-finite value or a short file.

    Its tensors are then merged one by one, which names the tensor.
    """


def merge_bundle(
    bundle: Bundle,
    sources: Sequence[TensorSource],
    seed: int,
    backend: Backend,
    memory: ChunkMemory,
    clock: Clock,
    model_rules: ModelRules,
    shared: SharedChunk | None = None,
) -> tuple[Merged, Rule]:
    """Return the merged values of a bundle, and the rule that merged them.

    Args:
        bundle: The tensors.
        sources: The base model, and what is read of each task.
        seed: Of the recipe.
        backend: Computes.
        memory: Holds stored values and task vectors.
        clock: Told when values are read.
        model_rules: Of a method whose scope is the model.
        shared: Holds what was read, where the thread merges it for several sites.

    Raises:
        UnfitError: If a value is not finite, or a file is too short.
    """
    with clock.spend("read"):
        if shared is None:
            stored = _read(bundle, sources, memory.stored)
        else:
            key = (bundle.tensors, *sources)
            stored = shared.values(key, partial(_read, bundle, sources, shared.memory))
    chunk = _chunk(stored)
    found = (model_rules.part(job.tensor, bundle.values) for job in bundle.jobs)
    parts = [part for part in found if part is not None]
    if parts:
        rule = _joined(parts, bundle.jobs)
    else:
        rule, is_zero = _rule(bundle, chunk, seed, backend, memory)
        if is_zero is not None:
            chunk = _chunk(_without(stored, is_zero, is_kept=shared is not None))
    inputs = rule.inputs(0, bundle.num_elements)
    merged = backend.merge(rule.op, chunk, inputs, bundle.jobs[0].dtype, bundle.values.scaling)
    if not math.isfinite(merged.probe):
        raise UnfitError
    return merged, rule


def _chunk(stored: Stored) -> RawChunk:
    chunk = RawChunk([(0, stored.bits.shape[1])], lambda: stored)
    chunk.checked_by = _check
    return chunk


def _check(probe: float, chunk: RawChunk) -> None:
    if not math.isfinite(probe):
        raise UnfitError


def _without(stored: Stored, is_zero: np.ndarray, *, is_kept: bool) -> Stored:
    """Return rows whose task vectors are zero in some places; what is kept for other sites is copied."""
    rows = stored.bits.copy() if is_kept else stored.bits
    for row, zeros in zip(rows[1:], is_zero, strict=True):
        np.copyto(row, rows[0], where=zeros)
    return Stored(rows, stored.dtype)


def _read(bundle: Bundle, sources: Sequence[TensorSource], memory: RowMemory) -> Stored:
    """Read a row of all tensors of each source: what follows each other in a file, by one call."""
    dtype = bits_dtype(bundle.stored_dtype)
    places = [file.start_byte for source in sources if (file := source.tensor_file(bundle.jobs[0].tensor))]
    rows = memory.rows(dtype, bundle.num_elements, places)
    with ExitStack() as opened:
        for row, source in zip(rows.view(np.uint8), sources, strict=True):
            descriptors: dict[str, int] = {}
            position = 0
            for path, reading, start, length in _pieces(bundle, source, dtype.itemsize):
                if path not in descriptors:
                    descriptors[path] = opened.enter_context(reading())
                buffer = row[position : position + length].data
                if read_fully(descriptors[path], start, buffer) < length:
                    raise UnfitError
                position += length
    return Stored(rows, bundle.stored_dtype)


def _pieces(
    bundle: Bundle, source: TensorSource, item_bytes: int
) -> Iterator[tuple[str, Callable[[], Any], int, int]]:
    """Yield path, opener, first byte and length of what can be read at a time of a source."""
    files = [source.tensor_file(job.tensor) for job in bundle.jobs]
    before: tuple[str, Callable[[], Any], int, int] | None = None
    for file, job in zip(files, bundle.jobs, strict=True):
        assert file is not None, "bundles are of tensors in files"
        length = job.num_elements * item_bytes
        if before is not None and (file.path, file.start_byte) == (before[0], before[2] + before[3]):
            before = (*before[:3], before[3] + length)
            continue
        if before is not None:
            yield before
        before = file.path, file.reading, file.start_byte, length
    assert before is not None
    yield before


def _rule(
    bundle: Bundle, chunk: RawChunk, seed: int, backend: Backend, memory: ChunkMemory
) -> tuple[Rule, np.ndarray | None]:
    """Return the rule of all tensors, and which elements of task vectors it sets to zero before."""
    values, num_tasks = bundle.values, len(bundle.values.weights)

    def room() -> np.ndarray:
        return memory.vectors.rows(np.dtype(np.float32), bundle.num_elements, [0] * num_tasks)

    is_seen = looks_at_values(values.how)
    vectors = backend.task_vectors(chunk, room) if is_seen else np.empty((num_tasks, 0), np.float32)
    sizes = [job.num_elements for job in bundle.jobs]
    generators = [CounterGenerator(seed, job.tensor) for job in bundle.jobs]
    tensors = Tensors(vectors, sizes, generators, backend)
    found = rule_side_by_side(values.how, tensors, values.weights, values.options)
    return found.rule, found.is_zero


def _joined(rules: Sequence[Rule], jobs: Sequence[TensorJob]) -> Rule:
    """Return the rule of all tensors, from parts of one rule for the model."""
    parts = [rule.per_element(0, job.num_elements) for rule, job in zip(rules, jobs, strict=True)]
    whole = tuple(
        np.concatenate([np.asarray(values) for values in column]) for column in zip(*parts, strict=True)
    )
    unaligned = [rule.num_unaligned for rule in rules if rule.num_unaligned]
    gaps = [rule.duality_gap for rule in rules if rule.duality_gap is not None]
    return Rule(
        rules[0].op,
        lambda start, count: tuple(values[start : start + count] for values in whole),
        rules[0].per_task,
        tuple(map(sum, zip(*unaligned, strict=True))),
        max(gaps, default=None),
    )
