"""Memory in the summary of a plan: of the merge, of the merge in `run`, and of what is compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hub_magmax.evaluation.needs import LOADED_BYTES, LOADED_FILES, Needs
from hub_magmax.kernels.dispatch import compiles_first, is_fused
from hub_magmax.planning.budget import budget_of, peak_memory_bytes, threads_of
from hub_magmax.planning.plan import Plan
from hub_magmax.planning.process_memory import COMPILING_BYTES, COMPILING_FILES
from hub_magmax.text import format_bytes

#: Bytes of a site's plan, open files and records, measured with 20 tensors.
PER_SITE_BYTES = 500_000

#: Bytes of a process's own, and with files that it maps.
Memory = tuple[int, int]


def merge_memory(plan: Plan) -> Memory:
    """Return about what a merge takes whose loops were compiled earlier."""
    compiles = compiles_first(plan.merged_elements, plan.recipe.output.device)
    own, resident = peak_memory_bytes(plan), peak_memory_bytes(plan, with_files=True)
    return own - compiles * COMPILING_BYTES, resident - compiles * (COMPILING_BYTES + COMPILING_FILES)


def sites_memory_bytes(plans: Sequence[Plan]) -> int:
    """Return about what merges for several sites take side by side, whose loops were compiled earlier.

    Each thread works for one site at a time, so what a method holds is that of one merge. A chunk of files on
    this machine is in memory, as stored, for all sites.
    """
    most = max((merge_memory(plan)[0] for plan in plans), default=0)
    return most + PER_SITE_BYTES * len(plans) + max(map(_shared_bytes, plans), default=0) * (len(plans) > 1)


def _shared_bytes(plan: Plan) -> int:
    """Return what the chunks of all threads take as stored."""
    if plan.num_remote or plan.recipe.output.memory is not None:
        return 0
    budget = budget_of(plan, threads_of(plan))
    row_bytes = plan.stored_item_bytes * (len(plan.lock.tasks) + 1)
    return budget.num_threads * budget.chunk_elements * row_bytes


def run_memory(plan: Plan) -> Memory:
    """Return about what the merge takes in `run`, which loads the evaluation's data first."""
    own, resident = merge_memory(plan)
    return own + LOADED_BYTES, resident + LOADED_BYTES + LOADED_FILES


def compiling_bytes(plan: Plan) -> int:
    """Return what a merge takes besides, at most, where loops are yet to be compiled; 0 if none can be."""
    return COMPILING_BYTES * is_fused(plan.merged_elements, plan.recipe.output.device)


def memory_rows(plan: Plan, needs: Needs | None) -> Iterator[tuple[str, str]]:
    """Yield lines of a plan about memory, each a label and a text."""
    threads = threads_of(plan)
    in_threads = f" in {threads} threads" if threads > 1 else ""
    yield "memory", f"about {_told(merge_memory(plan))}{in_threads}"
    if needs is not None:
        yield "", f"in `run`, which loads the evaluation's data first, about {_told(run_memory(plan))}"
    if more := compiling_bytes(plan):
        yield "", f"up to {format_bytes(more)} more where loops are yet to be compiled, once on this machine"


def _told(memory: Memory) -> str:
    own, resident = map(format_bytes, memory)
    return f"{own} per process, {resident} with files that the system maps"
