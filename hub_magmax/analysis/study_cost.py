"""Cost of a study: the models that it merges and scores, told before the first; time, after the second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from hub_magmax.analysis.candidates import Candidate
from hub_magmax.planning.plan import Plan
from hub_magmax.text import Report, format_bytes, format_seconds, number_of

#: Studies that take less are not worth a line about their time.
_TOLD_SECONDS = 10


class StudyCost:
    """Tells what a study takes: before its first model how many there are, after the second the time.

    The first one loads the data and compiles loops, so it says little of the others.

    Args:
        plan: Says what a merge reads.
        report: Called with each line.
    """

    def __init__(self, plan: Plan, report: Report) -> None:
        self._plan, self._report = plan, report
        self._num_left = self._num_timed = 0

    def announce(self, num_models: int, num_known: int | None, what: str, fewer: str = "") -> None:
        """Say what is ahead, in one line.

        Args:
            num_models: At most.
            num_known: Those of them that the journal has; None where that is not known yet.
            what: The models in words, with what each is scored on.
            fewer: Keys of the recipe by which fewer are tried, if there are any.
        """
        self._num_left, self._num_timed = num_models - (num_known or 0), 0
        known = "" if num_known is None else f", {num_known:,} measured before"
        ahead = told_reads(self._plan, self._num_left) if self._num_left else ""
        parts = (what, ahead, f"fewer by {fewer}" if fewer else "")
        self._report(f"{number_of(num_models, 'model')} to try{known}: {'; '.join(filter(None, parts))}")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Tell the time for all that follow once the second model was merged and scored in this block."""
        begun, self._num_timed = monotonic(), self._num_timed + 1
        yield
        seconds, num_left = monotonic() - begun, self._num_left - 2
        if self._num_timed == 2 and num_left * seconds >= _TOLD_SECONDS:
            whole = format_seconds(num_left * seconds)
            self._report(f"the second model took {seconds:.1f} s: about {whole} for the {num_left:,} left")


def told_reads(plan: Plan, num_models: int) -> str:
    """Return in words what so many merges read of the checkpoints; what is on the Hub is fetched once."""
    size = format_bytes(plan.bytes_in)
    if plan.num_remote:
        return f"{size} are read for each, of which those on the Hub are fetched once"
    return f"{size} are read for each, {format_bytes(num_models * plan.bytes_in)} in all"


def ways(count: int, *, has_recipe: bool) -> str:
    """Return in words what a comparison tries."""
    return f"{number_of(count, 'way')} to merge{', the recipe as it stands among them' if has_recipe else ''}"


def announced(tried: Sequence[Candidate]) -> str:
    """Return in words what a comparison tries."""
    seeds = max(len(one.seeds) for one in tried)
    drawn = f", those that draw with {seeds} seeds" if seeds > 1 else ""
    return ways(len(tried), has_recipe=any(one.is_recipe for one in tried)) + drawn


def finals(tried: Sequence[Candidate]) -> str:
    """Return in words what a comparison scores on the examples that choose nothing."""
    methods = number_of(len({one.group for one in tried if one.is_listed}), "method")
    own = ", the recipe" if any(one.is_recipe for one in tried) else ""
    return f"the best of each of {methods}{own} and the base model"
