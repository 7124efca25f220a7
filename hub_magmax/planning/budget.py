"""Memory of a merge: bytes per element by holder, and sizes of chunks, threads and read-ahead."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hub_magmax import methods
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.arrays import IN_MEMORY_BYTES
from hub_magmax.kernels.lazy_imports import num_threads
from hub_magmax.methods.matrices import decomposition_bytes, matrices_in
from hub_magmax.methods.rescaling import restores_sums
from hub_magmax.planning import surveys
from hub_magmax.planning.plan import Plan, SolvedJob, TensorJob
from hub_magmax.planning.process_memory import beside_bytes, has_parts, runtime_bytes, takes_torch
from hub_magmax.planning.surveys import VECTOR, correction_bytes, solving_bytes
from hub_magmax.recipe.merge_values import MergeValues
from hub_magmax.text import format_bytes

#: Elements of one tensor that are in memory at a time, per task. Half as many take an eighth longer with two
#: threads, because each call into the system gives the interpreter away; twice as many leave the caches.
CHUNK_ELEMENTS = 2**19

#: Bytes that a merge may hold ahead of what is being read from the Hub.
READ_AHEAD_BYTES = 256 * 2**20

#: Threads that merge tensors at most: each holds chunks, and what a rule keeps of a whole tensor.
MAX_THREADS = 8

#: Chunks' worth of undecided elements of one tensor that a single pass holds at most.
OPEN_CHUNKS = 8

#: Most chunks of a tensor that is written only when all its elements are merged. Writing, reading and writing
#: it again takes a twenty-fifth of a merge, measured.
HELD_CHUNKS = 32

#: Methods that take least memory.
LIGHT_METHODS = ("average", "magmax")

#: A limit below this is less than Python takes.
_FEWEST_BYTES = 10**7

#: A tensor of more elements is merged alone; smaller ones together, as many as a chunk holds.
SMALL_ELEMENTS = 2**14

#: A merge that must not take much works on pieces no smaller than these.
LEAST_CHUNK_ELEMENTS, _LEAST_READ_AHEAD_BYTES = 2**14, 2**25


#: Bytes an element that `merging` allocates where torch computes, by what holds them. A chunk is held as task
#: vectors in float32 besides as stored, and merged, with temporaries.
MERGED = 24

#: Bytes of the place of an element that is undecided at first, or that is collected.
PLACE = 8

#: Elements of a tensor that `top-n` collects, measured with random values.
_COLLECTED = 0.04

#: Draws: bytes an element of a chunk, and those of the random keys, which are made piece by piece.
DRAWN, KEYS = 12, 2**21

#: Where rows or columns have weights of their own, bytes of an element of each vector, and of each inner
#: product of a row; elements of a row, of which most have more. Measured.
WEIGHED, PRODUCT, ROW = 28, 48, 1024

#: Bytes of the share that a task has in an element, by its statistics.
SHARE = 4

#: Bytes an element of its choice, of whether it needs one, and of steps on the way.
CHOICE = 6

#: Bytes an element while a task is read with a base model of its own, or scaled: three rows of float64.
_MOVED = 24

#: Bytes an element of a merged adapter's factor: the parts, these joined, and in the output's dtype.
FACTOR = 12


@dataclass(frozen=True)
class Budget:
    """Threads, chunk size and read-ahead of one process of a merge.

    Attributes:
        num_threads: Each merges one tensor after the other.
        chunk_elements: Elements per task that each thread has in memory.
        read_ahead_bytes: Bytes held of what is read from the Hub.
    """

    num_threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    read_ahead_bytes: int = READ_AHEAD_BYTES


def memory_bytes(plan: Plan, budget: Budget, *, with_files: bool = False) -> int:
    """Return about how much memory one process needs that works with this much at a time.

    Args:
        plan: Of the merge.
        budget: What is worked with at a time.
        with_files: Count files that are mapped, as a resident set does; the system takes them back at need.
            `output.memory` does not limit these.
    """
    sizes = sorted((job.num_elements for job in plan.jobs if job.merged), reverse=True)
    runtime = runtime_bytes(plan, with_files=with_files) + correction_bytes(plan) + beside_bytes(plan)
    if plan.ranks:
        factors = map(partial(_of_factor, plan, budget), plan.jobs)
        at_once = heapq.nlargest(budget.num_threads, factors)
        return runtime + int(sum(at_once)) + _ahead_bytes(plan, budget, is_repeated=False)
    held = [_Held(plan, values, budget, with_files, takes_torch(plan)) for values in plan.surveyed]
    chunks = max(sum(map(each.of_chunk, _chunked(sizes, budget))) for each in held)
    models = sum(each.of_tensor(sum(sizes)) for each in held if each.surveys_model)
    surveyed = models + max(each.of_tensors(_looked_at(plan)) for each in held)
    is_repeated = plan.lock.values.how.form not in ("elementwise", "linear")
    return runtime + int(chunks + surveyed) + _ahead_bytes(plan, budget, is_repeated=is_repeated)


def _looked_at(plan: Plan) -> list[int]:
    """Return the elements of each tensor that a survey may look at, the most first."""
    left_out = plan.unchanged if all(map(gives_elements, plan.surveyed)) else ()
    return sorted((job.num_elements for job in plan.merged if job.name not in left_out), reverse=True)


def gives_elements(values: MergeValues) -> bool:
    """Say whether a method gives elements to tasks by quotas: what no task changes needs no survey."""
    return "selection" in values.method


def _of_factor(plan: Plan, budget: Budget, job: TensorJob) -> float:
    """Return what a thread holds for one factor of a merged adapter, or for both that are solved for."""
    if not isinstance(job, SolvedJob):
        return FACTOR * job.num_elements
    if job.of_shape:
        size = job.whole.num_elements
        held = _Held(plan, plan.values_of(job.name), budget, with_files=False, by_torch=True)
        method = held.of_matrices(job.whole) if held.method.form == "matrix" else held.of_tensor(size)
        # The vector, in float64 too, its factors' product, and the difference.
        chunk = held.of_chunk(min(size, budget.chunk_elements))
        return chunk + method + 28 * size + decomposition_bytes(*job.sides)
    return solving_bytes(plan, job)


def _chunked(sizes: Sequence[int], budget: Budget) -> list[int]:
    """Return the elements that each thread has in memory: of a large tensor, or of small ones together."""
    small = sum(size for size in sizes if size <= SMALL_ELEMENTS)
    return sorted((min(size, budget.chunk_elements) for size in (*sizes, small)), reverse=True)[
        : budget.num_threads
    ]


def peak_memory_bytes(plan: Plan, *, with_files: bool = False) -> int:
    """Return about how much memory one process needs on this machine; see `memory_bytes`."""
    return memory_bytes(plan, budget_of(plan, threads_of(plan)), with_files=with_files)


def threads_of(plan: Plan) -> int:
    """Return how many threads merge: one where checkpoints are read from the Hub, which is in order."""
    return 1 if plan.num_remote else min(num_threads(), MAX_THREADS)


@dataclass(frozen=True)
class _Held:
    """Memory that a method takes of a plan's tensors, with these options and weights."""

    plan: Plan
    values: MergeValues
    budget: Budget
    with_files: bool
    by_torch: bool

    @property
    def method(self) -> methods.MergeMethod:
        return self.values.how

    @property
    def num_tasks(self) -> int:
        return len(self.values.weights)

    @property
    def surveys_model(self) -> bool:
        return methods.surveys_model(self.values.method)

    @property
    def _row_bytes(self) -> int:
        """Bytes of an element as stored, of the base model and every task."""
        moved = _MOVED if self.plan.lock.bases or self.plan.lock.lengths else 0
        return self.plan.stored_item_bytes * (self.num_tasks + 1) + moved

    @property
    def _sees_files(self) -> bool:
        """Whether loops read a few elements at a time from files, so that no chunk is held as stored."""
        in_memory = self.by_torch or self.method.name in surveys.HELD_OF_CHUNK
        return not in_memory and self.method.held_bytes == 0 and not self._chooses

    @property
    def _chooses(self) -> bool:
        """Whether what each task gives is looked at, to write a selection or to read one."""
        return self.plan.recipe.output.is_selection or self.plan.selection is not None

    def of_chunk(self, size: int) -> float:
        """Return what a thread holds of a chunk of `size` elements."""
        merged = self.plan.stored_item_bytes if not self.by_torch else MERGED
        rows = 0 if self._sees_files and size > SMALL_ELEMENTS else self._row_bytes
        vectors = VECTOR * self.num_tasks if self.by_torch or size <= SMALL_ELEMENTS else 0
        surveyed = surveys.held_of_chunk(self.values.method, self.num_tasks, by_torch=self.by_torch)
        draws = self.method.held_bytes == 0 and "generator" in self.method.supplied and not surveyed
        parts = WEIGHED * (1 + self.num_tasks) * has_parts(self.values)
        shares = SHARE * (1 + self.num_tasks) * (self.method.statistics == "fisher")
        chosen = (2 * merged + CHOICE) * self._chooses
        by_element = rows + vectors + merged + surveyed + DRAWN * draws + parts + shares + chosen
        return by_element * size + KEYS * draws

    def of_tensor(self, size: int) -> float:
        """Return what is held of a tensor of `size` elements, or of a whole model, that is surveyed."""
        if self.method.form == "tensor":
            num_vectors = self.num_tasks + ("base" in self.method.supplied)
            return (VECTOR * num_vectors + 8 + (self.method.held_bytes or 0)) * size
        if not self.method.is_built_in:
            return (self.method.held_bytes or 0) * size
        if self.method.name in surveys.RANKED:
            return self._ranks(size)
        if self.method.name == "sce":
            return self._spreads(size)
        if self.method.held_bytes is None:
            return self._thresholds(size, self.num_tasks) + self._one_pass(size)
        return self._selection(size) + PRODUCT * (1 + self.num_tasks) ** 2 * size / ROW * has_parts(
            self.values
        )

    def _selection(self, size: int) -> float:
        """Return what is held to give each element of a tensor to a task, where a method does so."""
        selection = self.values.method.get("selection")
        if selection == "top-n":
            collected = _COLLECTED * (PLACE + VECTOR * self.num_tasks) * size
            look = (PLACE + VECTOR * self.num_tasks) * min(size, self.budget.chunk_elements)
            return self._array(1, size) + collected + look + self._one_pass(size)
        codes = next(width for width in (1, 2, 4, 8) if self.num_tasks <= 8 * width)
        return (self._array(1, size) + self._array(codes, size)) * (selection == "algorithm-1")

    def of_tensors(self, sizes: Sequence[int]) -> float:
        """Return what all threads hold of tensors surveyed one by one; the largest size is the first."""
        if self.surveys_model:
            return 0
        if self.method.form == "matrix":
            averaged = {job.name for job in self.plan.jobs if self.method.statistics is not None}
            averaged = averaged.difference(self.plan.by_statistics)
            jobs = (job for job in self.plan.jobs if job.merged and job.name not in averaged)
            of_jobs = map(self.of_matrices, jobs)
            return sum(heapq.nlargest(self.budget.num_threads, of_jobs))
        return sum(map(self.of_tensor, sizes[: self.budget.num_threads]))

    def of_matrices(self, job: TensorJob) -> float:
        """Return what is held of a tensor while a method of whole matrices decides about it."""
        found = matrices_in(job.tensor, job.shape)
        if found is None:
            return 0
        num_tasks = self.num_tasks - len(job.unread)
        stacked = VECTOR * (num_tasks + (found.number > 1)) * job.num_elements
        return stacked + self.method.held_of(found.rows, found.columns, num_tasks)

    def _array(self, width: int, size: int) -> int:
        """Return what an array of a number for each element takes; large ones are files that are mapped."""
        num_bytes = width * size
        return num_bytes if self.with_files or num_bytes <= IN_MEMORY_BYTES else 0

    def _thresholds(self, size: int, num_rows: int) -> float:
        """Return what it takes to find thresholds of some rows, with elements that are kept until then."""
        name, most = self.method.name, min(size, OPEN_CHUNKS * self.budget.chunk_elements)
        kept = most * (self._row_bytes + PLACE) * (name not in surveys.HELD_OF_CHUNK)
        return surveys.bytes_of_thresholds(size, num_rows, kept, is_bounded=name in surveys.BOUNDED)

    def _spreads(self, size: int) -> float:
        """Return what is held to select the elements of a tensor on which tasks differ most."""
        is_part = bool(self.values.method["density"] < 1)
        return (self._array(VECTOR, size) + self._thresholds(size, 1)) * is_part

    def _ranks(self, size: int) -> float:
        """Return what is held to rank the elements of rows, in chunks of a row at least."""
        shapes = [job.shape for job in self.plan.jobs if job.merged]
        row = max(math.prod(shape[len(shape) > 1 :]) for shape in shapes)
        usual = min(size, self.budget.chunk_elements)
        chunk = max(row, usual)
        longer = self.of_chunk(chunk) - self.of_chunk(usual)
        sums = chunk if restores_sums(self.values.method) else 0
        return longer + surveys.bytes_of_ranks(row, self.num_tasks, sums, by_torch=self.by_torch)

    def _one_pass(self, size: int) -> float:
        """Return what is held to merge a tensor while it is surveyed."""
        if self.surveys_model or self.by_torch or self.method.name in surveys.HELD_OF_CHUNK:
            return 0
        chunk = min(size, self.budget.chunk_elements)
        is_held = size <= HELD_CHUNKS * self.budget.chunk_elements
        return (self._row_bytes + PLACE) * chunk + self.plan.stored_item_bytes * size * is_held


def _ahead_bytes(plan: Plan, budget: Budget, *, is_repeated: bool) -> int:
    """Return what is held of remote sources: ahead, and of a tensor that is read more than once."""
    largest = max((job.num_bytes for job in plan.jobs if job.merged), default=0)
    repeated = plan.num_remote * largest if is_repeated else 0
    return min(budget.read_ahead_bytes, plan.bytes_in) + repeated if plan.num_remote else 0


def budget_of(plan: Plan, num_threads: int) -> Budget:
    """Return the largest budget that `output.memory` allows, by the estimate of `memory_bytes`.

    Chunks become smaller first, then threads fewer, then less is read ahead.

    Args:
        plan: Its recipe may say how much memory there is.
        num_threads: Threads that could work.

    Raises:
        RecipeError: If the least that a merge can do with is more than that.
    """
    limit = plan.recipe.output.memory
    if limit is None:
        return Budget(num_threads)
    fitting = next((one for one in _choices(num_threads) if memory_bytes(plan, one) <= limit), None)
    if fitting is None:
        raise _too_little(plan, limit)
    return fitting


def _choices(num_threads: int) -> Iterator[Budget]:
    """Yield budgets, the largest first and the least last."""
    for ahead in _halved(READ_AHEAD_BYTES, _LEAST_READ_AHEAD_BYTES):
        for threads in range(num_threads, 0, -1):
            for chunk in _halved(CHUNK_ELEMENTS, LEAST_CHUNK_ELEMENTS):
                yield Budget(threads, chunk, ahead)


def _least_bytes(plan: Plan) -> int:
    """Return the least that a merge can do with."""
    *_, least = _choices(1)
    return memory_bytes(plan, least)


def _too_little(plan: Plan, limit: int) -> RecipeError:
    """Return the error of a limit that cannot be kept, with the changes after which it could."""
    needed = _least_bytes(plan)
    least = f"{math.ceil(needed / 10**6)}MB"
    return RecipeError(
        f"this merge needs about {format_bytes(needed)} of memory in each process"
        if limit >= _FEWEST_BYTES
        else f"{limit:,} bytes are less than any program needs",
        key=("output", "memory"),
        expected=f"at least {least}; found {format_bytes(limit)}",
        hint=_forgotten_unit(limit, needed)
        or f"{', or '.join([f'Raise it to {least}', *_lighter(plan, limit)])}.",
    )


def _forgotten_unit(limit: int, needed: int) -> str:
    """Return a question whether a unit is meant that makes a limit large enough; empty where it has one."""
    if limit >= _FEWEST_BYTES or limit % 1000 == 0 or limit % 1024 == 0:
        return ""
    meant = next((unit for unit, size in (("MB", 10**6), ("GB", 10**9)) if limit * size >= needed), None)
    return f"Write the unit: did you mean {limit}{meant}?" if meant and limit < 10**6 else ""


def _lighter(plan: Plan, limit: int) -> Iterator[str]:
    """Yield single changes of the recipe after which a merge keeps the limit, by the same estimate."""
    yield from (change for change, changed in _changed(plan) if _keeps(changed, limit))
    others = [name for name in LIGHT_METHODS if name != plan.lock.method["name"] and not plan.ranks]
    if fitting := [name for name in others if _keeps(_by(plan, name=name, scaling=1.0), limit)]:
        yield f"choose a method that keeps nothing of tensors: {', '.join(fitting)}"


def _changed(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield settings that take less, in words, with the plan that they give."""
    if plan.recipe.output.device:
        output = plan.recipe.output.model_copy(update={"device": None})
        changed = replace(plan, recipe=plan.recipe.model_copy(update={"output": output}))
        yield "leave out output.device, which takes torch", changed
    if methods.surveys_model(plan.lock.method):
        yield "choose method.scope: tensor", _by(plan, **{**plan.lock.method, "scope": "tensor"})


def _keeps(plan: Plan, limit: int) -> bool:
    return _least_bytes(plan) <= limit


def _by(plan: Plan, **method: Any) -> Plan:
    return replace(plan, lock=replace(plan.lock, method=method))


def _halved(most: int, least: int) -> Iterator[int]:
    """Yield a number and its halves, down to the least."""
    while most >= least:
        yield most
        most //= 2
