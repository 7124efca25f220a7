"""Choice of the method of a recipe that says `auto`, by what its comparison tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.analysis.candidates import candidates
from hub_magmax.analysis.study_cost import announced
from hub_magmax.analysis.tuning import CandidateScorer, Trial, best, best_by_group, examples_of
from hub_magmax.evaluation.journal import Journal
from hub_magmax.evaluation.scoring import counted
from hub_magmax.preference.safeguards import rounded
from hub_magmax.recipe.arguments import opened
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.matching import comparison_digest
from hub_magmax.recipe.schema import Compare, Recipe
from hub_magmax.text import ProgressBar, Report, unseen


@dataclass(frozen=True)
class Choice:
    """Method that a comparison chose for a recipe that says `auto`.

    Attributes:
        method: `name`, `scaling` and every option.
        seen: The candidates compared, as plain values.
    """

    method: Mapping[str, Any]
    seen: Mapping[str, Any]


def choose(
    recipe: Recipe,
    lock: Lock,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
    journal: Journal | None = None,
) -> Choice:
    """Return the best of what the recipe's comparison tries, under the lock's preference."""
    data = recipe.tuning_data
    assert data is not None, "checked with the recipe"
    spec = recipe.compare or Compare()
    tried = candidates(spec, recipe.method, {"recipe": lock.weights})
    with CandidateScorer(recipe, lock, journal, progress, report, spec.bits) as scorer:
        batches = scorer.load(data, "compare.tune")
        what, fewer = (
            f"{announced(tried)}, each on {examples_of(batches)}",
            "compare.methods and compare.scaling",
        )
        scorer.cost.announce(*scorer.num_models(tried, "tune"), what, fewer)
        with opened(progress, len(tried), "choosing the method", "ways") as advance:
            trials = list(counted(scorer.run(tried, batches, "tune"), len(tried), 1, advance))
    winner = best(trials)
    report(_told(winner, trials, scorer.evaluator.metric))
    seen = {
        "examples": len(winner.outcomes),
        "tried": len(trials),
        "best": {
            label: rounded(
                {"scaling": trial.candidate.method["scaling"], scorer.evaluator.metric: trial.value}
            )
            for label, trial in best_by_group(trials).items()
        },
        **({"quantized": spec.quantized} if spec.quantized else {}),
        "spec_digest": comparison_digest(recipe),
    }
    return Choice(winner.candidate.method, seen)


def _told(winner: Trial, trials: Sequence[Trial], metric: str) -> str:
    """Say in words what was chosen, and why."""
    top = max(trials, key=lambda trial: trial.margin)
    chosen = f"{winner.candidate.label}, scaling {winner.candidate.method['scaling']:g}"
    text = f"auto chose {chosen}, {metric} {winner.value:.4g} on {len(winner.outcomes)} examples: "
    if winner is top:
        return f"{text}the best of {len(trials)} ways"
    other = f"{top.candidate.label}, scaling {top.candidate.method['scaling']:g} ({top.value:.4g})"
    return f"{text}the best of {len(trials)} ways, {other}, is not better by more than its error"
