"""Plans of merges that may be finished: values are looked at before a merge, and not again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.merging.execution import is_finished
from hub_magmax.planning.findings.look import with_findings
from hub_magmax.planning.headers import plan_from_headers
from hub_magmax.planning.plan import Plan
from hub_magmax.processes import Processes
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe


def plan_unfinished(
    recipe: Recipe, locked: Lock, cache: SourceCache, processes: Processes, in_spite_of: Iterable[str] = ()
) -> tuple[Plan, bool]:
    """Return everything that merging will do, and whether the recipe's folder holds it, complete.

    What is finished has passed its faults, and gets no findings.

    Args:
        recipe, locked: What to merge.
        cache: Checkpoints that are open already.
        processes: Of which the first decides.
        in_spite_of: Names of faults that are accepted.
    """
    made = plan_from_headers(recipe, locked, cache=cache)
    if processes.first_decides(lambda: is_finished(made)):
        return replace(made, in_spite_of=tuple(in_spite_of)), True
    return with_findings(made, cache, in_spite_of), False
