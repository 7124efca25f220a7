"""Memory that surveys of single methods take; measured, but for arrays of which one element is known."""

from __future__ import annotations

#: Bytes of an element of a task vector.
VECTOR = 4

#: Bytes that a survey by compiled loops holds of each element of a chunk, for each task: vectors, scores,
#: or what elements are multiplied by. Surveys of other methods read files a few elements at a time.
HELD_OF_CHUNK = {"ram_plus": VECTOR, "pcb": VECTOR, "della": VECTOR, "della_linear": VECTOR, "sce": 0}

#: As many times that where torch computes, with its temporaries.
BY_TORCH = 4

#: Methods with a threshold near the largest magnitudes of each task.
BOUNDED = ("breadcrumbs", "breadcrumbs_ties", "pcb")

#: Methods that rank the elements of rows.
RANKED = ("della", "della_linear")

#: Bytes for each element of a row and task: a table by twice the rank.
_TABLE = 16

#: Bytes of sorting for each element of rows, and the fewest elements: by compiled loops, and by torch for
#: each task.
_COMPILED, _TORCH = (20, 2**17), (100, 2**16)

#: The same of sums of magnitudes in float64, for each task.
_SUMS = (56, 2**15)


def bytes_of_ranks(row: int, num_tasks: int, summed: int, *, by_torch: bool) -> float:
    """Return what is held to rank the elements of rows, beside chunks.

    Args:
        row: Elements of the longest row.
        num_tasks: Tasks that are ranked.
        summed: Elements of a chunk whose magnitudes are added up; 0 for none.
        by_torch: Torch ranks, in place of compiled loops.
    """
    sorting = _sized(_TORCH, row) * num_tasks if by_torch else _sized(_COMPILED, row)
    sums = (VECTOR * summed + _sized(_SUMS, row)) * num_tasks if summed else 0
    return _TABLE * row * num_tasks + sorting + sums


def _sized(of: tuple[int, int], row: int) -> int:
    each, fewest = of
    return each * max(row, fewest)
