"""Memory that it takes to solve for the factors of a layer of a merged adapter."""

from hub_magmax.methods.matrices import decomposition_bytes
from hub_magmax.planning.plan import Plan, SolvedJob


def solving_bytes(plan: Plan, job: SolvedJob) -> float:
    """Return what both factors of a layer take that are made of the adapters' factors."""
    num_tasks = len(plan.lock.tasks)
    total = job.total_rank * (num_tasks if plan.lock.adapters == "sequence" else 1)
    rows, columns = (min(side, job.total_rank) for side in job.sides)
    # Stacked factors in float32, twice in float64, and what LAPACK copies; then both of the result.
    factors = sum(job.sides) * (28 * total + 20 * job.rank)
    solved = 0.0 if job.is_sum else plan.values_of(job.name).how.held_of(rows, columns, num_tasks)
    return factors + 24 * (num_tasks + 1) * rows * columns + solved + decomposition_bytes(rows, columns)
