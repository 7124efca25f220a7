"""Memory that surveys of single methods take; measured, but for arrays of which one element is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hub_magmax.methods.matrices import decomposition_bytes
from hub_magmax.methods.rescaling import restores_sums
from hub_magmax.methods.thresholds import HELD_NUMBERS, MOST_RUNS, SAMPLE_RUN, SAMPLE_STRIDE
from hub_magmax.planning.plan import Plan, SolvedJob

#: Bytes of an element of a task vector.
VECTOR = 4

#: Bytes that a survey by compiled loops holds of each element of a chunk, for each task: vectors, scores,
#: or what elements are multiplied by. Surveys of other methods read files a few elements at a time.
HELD_OF_CHUNK = {"ram_plus": VECTOR, "pcb": VECTOR, "della": VECTOR, "della_linear": VECTOR, "sce": 0}

#: As many times that where torch computes, with its temporaries.
_BY_TORCH = 4

#: Methods with a threshold near the largest magnitudes of each task.
BOUNDED = ("breadcrumbs", "breadcrumbs_ties", "pcb")

#: Methods that rank the elements of rows.
RANKED = ("della", "della_linear")

#: Bytes for each element of a row and task: a table by twice the rank.
_TABLE = 16

#: Bytes of sorting for each element of rows, and the fewest elements: by compiled loops, and by torch for
#: each task.
_COMPILED, _TORCH = (22, 2**17), (100, 2**16)

#: The same of sums of magnitudes in float64, which compiled loops hold nothing for.
_SUMS = (56, 2**16)


def held_of_chunk(method: Mapping[str, Any], num_tasks: int, *, by_torch: bool) -> int:
    """Return the bytes that a survey holds of each element of a chunk, beside what is stored.

    Args:
        method: As a lock describes it. Where it restores sums of magnitudes, vectors are held for that.
        num_tasks: Whose vectors are held.
        by_torch: Torch computes, in place of compiled loops.
    """
    of_norm = VECTOR * restores_sums(method)
    return HELD_OF_CHUNK.get(method["name"], of_norm) * num_tasks * (_BY_TORCH if by_torch else 1)


#: Bytes of a histogram's bin, bins for each element that a sample leaves open, and the most bins.
_BIN_BYTES, _BINS_PER_ELEMENT, _MOST_BINS = 16, 4, 2**20


def bytes_of_thresholds(size: int, num_rows: int, kept: float, *, is_bounded: bool) -> float:
    """Return what histograms and the sample take by which thresholds are found.

    Args:
        size: Elements of each row.
        num_rows: With thresholds of their own.
        kept: What it would take to keep every element of a row until its threshold is known.
        is_bounded: There is another threshold for each, near the largest magnitudes, where few are.
    """
    if num_rows * size <= HELD_NUMBERS:
        return 3 * VECTOR * num_rows * size
    sample = SAMPLE_RUN * size / max(SAMPLE_STRIDE, size / MOST_RUNS)
    is_open, ranks = 3.2 / math.sqrt(sample), 1.2 if is_bounded else 1
    bins = _BIN_BYTES * min(_MOST_BINS, _BINS_PER_ELEMENT * is_open * size) * num_rows * ranks
    return bins + 2 * VECTOR * num_rows * sample + num_rows * ranks * is_open * kept


def bytes_of_ranks(row: int, num_tasks: int, summed: int, *, by_torch: bool) -> float:
    """Return what is held to rank the elements of rows, beside chunks.

    Args:
        row: Elements of the longest row.
        num_tasks: Tasks that are ranked.
        summed: Elements of a chunk whose magnitudes are added up; 0 for none.
        by_torch: Torch ranks, in place of compiled loops.
    """
    sorting = _sized(_TORCH, row) * num_tasks if by_torch else _sized(_COMPILED, row)
    sums = (VECTOR * summed + _sized(_SUMS, row)) * num_tasks if summed and by_torch else 0
    return _TABLE * row * num_tasks + sorting + sums


def _sized(of: tuple[int, int], row: int) -> int:
    each, fewest = of
    return each * max(row, fewest)


def solving_bytes(plan: Plan, job: SolvedJob) -> float:
    """Return what both factors of a layer take that are made of the adapters' factors."""
    num_tasks = len(plan.lock.tasks)
    total = job.total_rank * (num_tasks if plan.lock.adapters == "sequence" else 1)
    rows, columns = (min(side, job.total_rank) for side in job.sides)
    # Stacked factors in float32, twice in float64, and what LAPACK copies; then both of the result.
    factors = sum(job.sides) * (28 * total + 20 * job.rank)
    solved = 0.0 if job.is_sum else plan.values_of(job.name).how.held_of(rows, columns, num_tasks)
    return factors + 24 * (num_tasks + 1) * rows * columns + solved + decomposition_bytes(rows, columns)


def correction_bytes(plan: Plan) -> int:
    """Return what the output's head takes while it is corrected, with the matrix that corrects it; else 0."""
    jobs = (job for job in plan.jobs if plan.lock.correction and job.name == plan.lock.correction["tensor"])
    for job in jobs:
        size = job.shape[-1]
        # All products, the sums, and a decomposition.
        return job.num_bytes + 8 * size * size * (2 * len(plan.lock.tasks) + 10)
    return 0
