"""Memory in the summary of a plan: of the merge, of the merge in `run`, and of what is compiled once."""

from __future__ import annotations

from collections.abc import Iterator

from hub_magmax.evaluation.needs import LOADED_BYTES, LOADED_FILES, Needs
from hub_magmax.kernels.dispatch import compiles_first, is_fused
from hub_magmax.planning.budget import peak_memory_bytes, threads_of
from hub_magmax.planning.plan import Plan
from hub_magmax.planning.process_memory import COMPILING_BYTES, COMPILING_FILES
from hub_magmax.text import format_bytes

#: Bytes of a process's own, and with files that it maps.
Memory = tuple[int, int]


def merge_memory(plan: Plan) -> Memory:
    """Return about what a merge takes whose loops were compiled earlier."""
    compiles = compiles_first(_num_elements(plan), plan.recipe.output.device)
    own, resident = peak_memory_bytes(plan), peak_memory_bytes(plan, with_files=True)
    return own - compiles * COMPILING_BYTES, resident - compiles * (COMPILING_BYTES + COMPILING_FILES)


def run_memory(plan: Plan) -> Memory:
    """Return about what the merge takes in `run`, which loads the evaluation's data first."""
    own, resident = merge_memory(plan)
    return own + LOADED_BYTES, resident + LOADED_BYTES + LOADED_FILES


def compiling_bytes(plan: Plan) -> int:
    """Return what a merge takes besides, at most, where loops are yet to be compiled; 0 if none can be."""
    return COMPILING_BYTES * is_fused(_num_elements(plan), plan.recipe.output.device)


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


def _num_elements(plan: Plan) -> int:
    return sum(job.num_elements for job in plan.jobs if job.merged)
