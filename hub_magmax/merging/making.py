"""Files in the making: their units, each made by a thread, alone or in turn with those of other merges."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

from hub_magmax.kernels.lazy_imports import inference
from hub_magmax.merging.adapters import SolvedLayer
from hub_magmax.merging.bundles import Bundle
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.merging.output.tensor import Tally
from hub_magmax.merging.profile import Clock
from hub_magmax.planning.plan import TensorJob

#: What is made at a time: a tensor, small neighbours together, a layer of an adapter.
Unit = TensorJob | Bundle | SolvedLayer
#: Makes a unit, and pauses where the merge of another site may go on with what was read.
Steps = Generator[None, None, Tally]
_Ordered = TypeVar("_Ordered", bound=Unit)

#: A tensor is large that is more than this part of its file.
_LARGE_PART = 16


class FileInMaking:
    """One file that is being made of units.

    Attributes:
        order: The units, in the order in which they are begun.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        order: Sequence[Unit],
        steps: Callable[[Unit], Steps],
        clock: Clock,
        finish: Callable[[Iterable[Tally]], ShardRecord],
    ) -> None:
        self.order, self._units, self._steps, self._clock, self._finish = order, units, steps, clock, finish
        self._begun: dict[int, Future[Tally]] = {}

    def begin(self, unit: Unit) -> UnitInMaking:
        """Return a unit, of which no step is taken yet."""
        begun = UnitInMaking(self._steps(unit), self._clock)
        self._begun[id(unit)] = begun.tally
        return begun

    def wait(self) -> ShardRecord:
        """Return the record of the finished file, once all units were begun."""
        return self._finish(self._begun[id(unit)].result() for unit in self._units)


class UnitInMaking:
    """One unit that is being made, step by step.

    Attributes:
        tally: Its facts, or the error that ended it, in the end.
    """

    def __init__(self, steps: Steps, clock: Clock) -> None:
        self._steps, self._clock = steps, clock
        self.tally: Future[Tally] = Future()

    def go_on(self) -> bool:
        """Take the next step, and say whether another one may follow."""
        try:
            with inference(), self._clock.spend("compute"):
                try:
                    next(self._steps)
                except StopIteration as end:
                    self.tally.set_result(end.value)
        except BaseException as error:  # raised where the tally is asked for, as by any thread
            self.tally.set_exception(error)
        return not self.tally.done()


def make_in_turn(threads: Executor, units: Sequence[UnitInMaking]) -> None:
    """Have one thread make units, a step of each in turn."""

    def make() -> None:
        left = [*units]
        while left:
            left = [unit for unit in left if unit.go_on()]

    threads.submit(make)


def starting_order(jobs: Sequence[_Ordered], *, in_order: bool) -> Sequence[_Ordered]:
    """Return a file's tensors, or bundles of them, in the order in which they are begun.

    Large ones come first, so that all threads end together, the others in the order of the file, which is
    read back in that order. With `in_order`, as for checkpoints on the Hub, nothing changes place.
    """
    if in_order:
        return jobs
    large = sum(job.num_elements for job in jobs) // _LARGE_PART
    return sorted(jobs, key=lambda job: -job.num_elements if job.num_elements > large else 0)
