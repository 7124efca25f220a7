"""Memory of a merge: bytes per element by holder, and sizes of chunks, threads and read-ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hub_magmax import methods
from hub_magmax.errors import RecipeError
from hub_magmax.kernels.arrays import IN_MEMORY_BYTES
from hub_magmax.planning.plan import Plan
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

#: The process with torch imported and no tensors, measured.
RUNTIME_BYTES = 350_000_000

#: A merge that must not take much works on pieces no smaller than these.
LEAST_CHUNK_ELEMENTS, _LEAST_READ_AHEAD_BYTES = 2**14, 2**25


#: Bytes an element that `merging` allocates, by what holds them; tests/test_planning_budget.py measures them.
#: A chunk is held as stored, once for the base model and once for each task, as task vectors in float32, and
#: merged, with temporaries. Undecided elements of a single pass are held as stored and with their places, and
#: merged values until their tensor is written.
STORED, VECTOR, MERGED, PLACE, HELD = 4, 4, 24, 8, 4

#: Histograms of magnitudes: bytes an element of a tensor and task, and the most for one task.
COUNTED, MOST_COUNTED = 2, 2**25

#: Draws: bytes an element of a chunk, and those of the random keys, which are made piece by piece.
DRAWN, KEYS = 12, 2**21

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


def memory_bytes(plan: Plan, budget: Budget) -> int:
    """Return about how much memory one process needs that works with this much at a time."""
    sizes = sorted((job.num_elements for job in plan.jobs if job.merged), reverse=True)
    at_once = sizes[: budget.num_threads]
    if plan.ranks:
        return RUNTIME_BYTES + FACTOR * sum(at_once) + _ahead_bytes(plan, budget, is_repeated=False)
    method, num_tasks = methods.get_method(plan.lock.method["name"]), len(plan.lock.tasks)
    surveys_model = methods.surveys_model(plan.lock.method)
    scope = [sum(sizes)] if surveys_model else at_once
    held = sum(_held_bytes(method, num_tasks, size) for size in scope)
    chunks = _chunk_bytes(at_once, num_tasks, budget) + _drawn_bytes(method, at_once, budget)
    if method.held_bytes is None:
        held += budget.num_threads * _histogram_bytes(scope, num_tasks)
    if not surveys_model:
        held += _undecided_bytes(method, at_once, num_tasks, budget)
    is_repeated = method.form not in ("elementwise", "linear")
    return RUNTIME_BYTES + chunks + held + _ahead_bytes(plan, budget, is_repeated=is_repeated)


def peak_memory_bytes(plan: Plan) -> int:
    """Return about how much memory one process needs that works with one thread."""
    return memory_bytes(plan, budget_of(plan, 1))


def _chunk_bytes(sizes: Sequence[int], num_tasks: int, budget: Budget) -> int:
    """Return what each thread holds of its chunk."""
    each = STORED * (num_tasks + 1) + VECTOR * num_tasks + MERGED
    return each * sum(min(size, budget.chunk_elements) for size in sizes)


def _drawn_bytes(method: methods.MergeMethod, sizes: Sequence[int], budget: Budget) -> int:
    """Return what each thread holds of the draws for its chunk."""
    if method.held_bytes != 0 or "generator" not in method.supplied:
        return 0
    return sum(DRAWN * min(size, budget.chunk_elements) + KEYS for size in sizes)


def _histogram_bytes(sizes: Sequence[int], num_tasks: int) -> int:
    """Return what a thread holds of histograms of each tensor's magnitudes."""
    return num_tasks * max((min(COUNTED * size, MOST_COUNTED) for size in sizes), default=0)


def _undecided_bytes(
    method: methods.MergeMethod, sizes: Sequence[int], num_tasks: int, budget: Budget
) -> int:
    """Return what a pass holds of undecided elements, and of tensors that are not written yet."""
    if method.form != "rule" or method.held_bytes == 0:
        return 0
    if method.held_bytes is not None:  # it has all but those of the chunk that is being merged
        return (STORED * (num_tasks + 1) + PLACE) * sum(min(size, budget.chunk_elements) for size in sizes)
    most_open, most_held = OPEN_CHUNKS * budget.chunk_elements, HELD_CHUNKS * budget.chunk_elements
    undecided = (STORED * (num_tasks + 1) + PLACE) * sum(min(size, most_open) for size in sizes)
    return undecided + HELD * sum(size for size in sizes if size <= most_held)


def _held_bytes(method: methods.MergeMethod, num_tasks: int, size: int) -> int:
    """Return the bytes in memory that a method holds of one tensor of `size` elements."""
    held_bytes = method.held_bytes or 0
    if method.form == "tensor":
        return (VECTOR * num_tasks + 8 + held_bytes) * size
    within = min(size, IN_MEMORY_BYTES)
    # Measured with `top-n`: what is not decided at once, of a tensor of a billion elements.
    return held_bytes * within + (size - within) * 3 // 4 * bool(held_bytes)


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
    choices = [
        Budget(threads, chunk, ahead)
        for ahead in _halved(READ_AHEAD_BYTES, _LEAST_READ_AHEAD_BYTES)
        for threads in range(num_threads, 0, -1)
        for chunk in _halved(CHUNK_ELEMENTS, LEAST_CHUNK_ELEMENTS)
    ]
    fitting = next((choice for choice in choices if memory_bytes(plan, choice) <= limit), None)
    if fitting is None:
        needed = format_bytes(memory_bytes(plan, choices[-1]))
        raise RecipeError(
            f"this merge needs about {needed} of memory in each process",
            key=("output", "memory"),
            expected=f"at least that; found {format_bytes(limit)}",
            hint="Raise it, or choose a method that keeps nothing of tensors: average, magmax.",
        )
    return fitting


def _halved(most: int, least: int) -> Iterator[int]:
    """Yield a number and its halves, down to the least."""
    while most >= least:
        yield most
        most //= 2
