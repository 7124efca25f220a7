"""Memory that it takes to solve for the factors of a layer of a merged adapter, or for a correction."""

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


def correction_bytes(plan: Plan) -> int:
    """Return what the output's head takes while it is corrected, with the matrix that corrects it; else 0."""
    jobs = (job for job in plan.jobs if plan.lock.correction and job.name == plan.lock.correction["tensor"])
    for job in jobs:
        size = job.shape[-1]
        # All products, the sums, and a decomposition.
        return job.num_bytes + 8 * size * size * (2 * len(plan.lock.tasks) + 10)
    return 0
