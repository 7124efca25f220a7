"""Guards: data sets on which the merged model must not fall behind the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hub_magmax.errors import RegressedError
from hub_magmax.evaluation.intervals import Difference, paired_difference
from hub_magmax.evaluation.scores import MERGED, Score, Scores
from hub_magmax.files import from_here
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.schema import Recipe

Verdict = Literal["held", "not shown", "regressed"]


@dataclass(frozen=True)
class Guard:
    """One data set that must not regress, and its scores.

    Attributes:
        name: What the recipe calls it.
        base, merged: Scores of the two models.
        difference: Merged minus base, example by example.
        margin: How far the merged model may fall behind, in units of the score.
    """

    name: str
    base: Score
    merged: Score
    difference: Difference
    margin: float

    @property
    def verdict(self) -> Verdict:
        """Say whether it regressed.

        `regressed` if the difference is beyond the margin, `held` if its whole 95 % interval is within,
        and else `not shown`: more examples would be needed to tell.
        """
        if self.difference.mean < -self.margin:
            return "regressed"
        return "held" if self.difference.low >= -self.margin else "not shown"


def check_guards(evaluation: Evaluation | None, scores: Scores | None) -> tuple[Guard, ...]:
    """Return the result of each guard that was scored, in the recipe's order."""
    found = []
    for name in evaluation.guard if evaluation and scores else ():
        assert evaluation is not None and scores is not None
        base, merged = scores.get("base_model", name), scores.get(MERGED, name)
        if base and merged:
            difference = paired_difference(merged.outcomes, base.outcomes)
            found.append(Guard(name, base, merged, difference, evaluation.margin))
    return tuple(found)


def regressed(guards: tuple[Guard, ...]) -> tuple[Guard, ...]:
    """Return the guards that fell behind by more than their margin."""
    return tuple(guard for guard in guards if guard.verdict == "regressed")


def refuse_regression(guards: tuple[Guard, ...], recipe: Recipe) -> None:
    """Raise RegressedError if a guard fell behind by more than its margin."""
    fallen = [f"{guard.name} by {-guard.difference.mean:.4g}" for guard in regressed(guards)]
    if fallen and recipe.evaluation:
        raise RegressedError(
            f"the merged model falls behind the base model on {', '.join(fallen)}, so it was not pushed",
            where=from_here(recipe.output_path),
            expected=f"at most {recipe.evaluation.margin:g}, as evaluation.margin says",
            hint="The model and its card are written. Change the method or the preference, or push all the "
            "same: hub-magmax run RECIPE --push-anyway",
        )
