"""Models that comparison and sweep of a recipe would try, for its plan: from recipe and lock alone."""

from __future__ import annotations

from dataclasses import dataclass

from hub_magmax.analysis import comparing, sweeping
from hub_magmax.analysis.study_cost import told_reads
from hub_magmax.errors import HubMagmaxError
from hub_magmax.planning.plan import Plan
from hub_magmax.text import number_of


@dataclass(frozen=True)
class PlannedStudy:
    """How many models a study merges and scores at most, and which they are in words."""

    models: int
    what: str


def planned_studies(plan: Plan) -> dict[str, PlannedStudy]:
    """Return the studies that the recipe has a key for, by key; without those that would be refused."""
    recipe, found = plan.recipe, {}
    for key, study in {"compare": comparing, "sweep": sweeping}.items():
        if getattr(recipe, key) is None:
            continue
        try:
            found[key] = PlannedStudy(*study.planned_models(recipe, plan.lock))
        except HubMagmaxError:
            continue
    return found


def study_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return lines of a plan about its studies, each a label and a text."""
    return [
        (key, f"{number_of(found.models, 'model')} to try: {found.what}; {told_reads(plan, found.models)}")
        for key, found in planned_studies(plan).items()
    ]
