"""Statistics of tasks' data against the tensors that are merged by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hub_magmax.checkpoints.data_statistics import AGAIN, DataStatistics
from hub_magmax.errors import MismatchError, Problem
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.planning.plan import Plan, TensorJob, TiedJob

#: What to do about a correction that the output has no head for.
_NO_HEAD = (
    "Leave correction out of the recipe, or the rule of tensors that leaves the head out; statistics of "
    "another base model have to be made again."
)

#: Problems that a message tells one by one.
_MOST_TOLD = 3


def merged_by_statistics(plan: Plan, statistics: DataStatistics) -> tuple[str, ...]:
    """Return the names of the merged tensors that all tasks that count have statistics of.

    A tensor that no task changes, as far as headers tell, is merged without: its merge is the base model's.

    Args:
        plan: Of the merge.
        statistics: Of the tasks.

    Raises:
        MismatchError: If statistics have another shape than their tensor, only some tasks have them, or no
            tensor has any.
    """
    changed = _changed(plan)
    described = [job for job in changed if _described(job, statistics)]
    if problems := [problem for job in described for problem in _problems(job, statistics)]:
        raise _error(statistics, problems)
    if not described and any(_counting(job, statistics) for job in changed):
        first = next(iter(statistics.sources))
        raise _error(statistics, [(first, "no task has any of a merged tensor")])
    return tuple(job.name for job in described)


def _changed(plan: Plan) -> list[TensorJob]:
    return [job for job in plan.merged if job.name not in plan.unchanged]


def check_correction(plan: Plan, statistics: DataStatistics) -> None:
    """Raise MismatchError unless the output has a head of its own that a correction can be folded into."""
    name = plan.lock.correction["tensor"]
    if why := _no_head(plan, name):
        first = next(iter(statistics.sources))
        raise _error(statistics, [(first, f"they are about {name!r}, which {why}")], _NO_HEAD)
    (shape,) = {job.shape for job in plan.jobs if job.name == name}
    sizes = {task: statistics.dimensions(task) for task in statistics.sources}
    wrong = [
        (task, f"those of {task} have {size} dimensions, and {name!r} is {[*shape]}")
        for task, size in sizes.items()
        if shape[1:] != (size,)
    ]
    if wrong:
        raise _error(statistics, wrong)


def _no_head(plan: Plan, name: str) -> str:
    """Say why a tensor of the output is no head of its own; nothing where it is one."""
    ties = {job.name: job.of for job in plan.jobs if isinstance(job, TiedJob)}
    ties |= {of: other for other, of in ties.items()}
    if name in ties:
        return f"is one parameter with {ties[name]!r}"
    has = any(job.name == name for job in plan.jobs)
    return "" if has else "the merged model does not have"


def _described(job: TensorJob, statistics: DataStatistics) -> list[str]:
    """Return the tasks that count and have statistics of a tensor that the method takes them of."""
    counting = _counting(job, statistics) if _wanted_shape(job, statistics) is not None else []
    return [task for task in counting if job.tensor in statistics.sources[task].index.tensors]


def _counting(job: TensorJob, statistics: DataStatistics) -> list[str]:
    return [task for task in statistics.sources if task not in job.unread]


def _problems(job: TensorJob, statistics: DataStatistics) -> Iterator[tuple[str, str]]:
    """Yield tasks and what is wrong with their statistics of a tensor, of which one has some."""
    known, wanted = _described(job, statistics), _wanted_shape(job, statistics)
    for task in _counting(job, statistics):
        if task not in known:
            yield task, f"{task} has none of {job.tensor!r}, and {known[0]} has"
        elif (shape := statistics.sources[task].index.tensors[job.tensor].shape) != wanted:
            yield task, f"those of {task} about {job.tensor!r} are {[*shape]}, expected {[*(wanted or ())]}"


def _wanted_shape(job: TensorJob, statistics: DataStatistics) -> tuple[int, ...] | None:
    """Return the shape of a tensor's statistics, None where the method takes none of it."""
    if statistics.kind == "fisher":
        return job.shape
    found = matrices_in(job.tensor, job.shape)
    if found is None or found.number > 1:
        return None
    rows = any(own is not None and own.is_transposed for own in statistics.of(job.tensor))
    return (found.rows if rows else found.columns,) * 2


def _error(
    statistics: DataStatistics, problems: Sequence[tuple[str, str]], hint: str = AGAIN
) -> MismatchError:
    """Return the error of statistics that do not fit, with the file of the first task that is named."""
    told = [text for _, text in problems]
    more = f"; and {len(told) - _MOST_TOLD:,} more" if len(told) > _MOST_TOLD else ""
    label = statistics.sources[problems[0][0]].label
    return MismatchError(
        f"the {statistics.kind} statistics do not fit: {'; '.join(told[:_MOST_TOLD])}{more}",
        where=label,
        expected="statistics of every task, made of checkpoints of this base model",
        hint=hint,
        problems=tuple(Problem("MismatchError", text, file=label, hint=hint) for text in told),
    )
