"""Safeguards of an estimated preference: least sample, bootstrap interval, prior, held-out check.

An estimate is a matrix with one row of weights per draw. The first row comes from the target sample as
it is, the others from bootstrap resamples of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.intervals import PERCENTILES, paired_difference
from hub_magmax.preference.explicit import normalise
from hub_magmax.recipe.lockfile import ResolvedPreference
from hub_magmax.recipe.preferences import Estimate
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import number_of

#: Fewer target examples say nothing: with n examples, a task that none of them belongs to still makes
#: up at most 1 − 0.05^(1/n) of the target at 95 % confidence, and below 5 that is more than half.
MIN_TARGET_EXAMPLES = 5

NUM_RESAMPLES = 200

#: Models that a held-out check merges and scores: with the estimate, and with the prior.
NUM_CHECKED = 2

#: Returns one outcome per example for the model merged with these weights by task.
ScoreOf = Callable[[Mapping[str, float]], Sequence[Outcome]]

Draws = Float64[np.ndarray, "draws tasks"]


def check_sample_size(num_examples: int, where: str) -> None:
    """Refuse a sample that is too small to say anything.

    Raises:
        EvaluationError: If it has fewer than `MIN_TARGET_EXAMPLES`.
    """
    if num_examples < MIN_TARGET_EXAMPLES:
        raise EvaluationError(
            f"{number_of(num_examples, 'example')} cannot say how much each task matters",
            where=where,
            expected=f"at least {MIN_TARGET_EXAMPLES}",
            hint="Give more examples, or write the weights by hand.",
        )


def draw(num_examples: int, num_drawn: int, seed: int, purpose: str) -> list[int]:
    """Return the ascending indices of a random subset: all of them where there are no more.

    The subset depends on the seed and the purpose alone, and a smaller one is part of a larger one.
    """
    from hub_magmax.kernels.randomness import CounterGenerator

    keys = CounterGenerator(seed, f"preference/{purpose}").bits(0, num_examples, 0)
    return sorted(keys.argsort()[:num_drawn].tolist())


def bootstrap_shares(
    num_examples: int, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Float64[np.ndarray, "draws examples"]:
    """Return how much each example counts: uniformly in the first row, then in each resample."""
    from hub_magmax.kernels.randomness import CounterGenerator

    uniform = CounterGenerator(seed, "preference/bootstrap").uniform(0, num_resamples * num_examples, 0)
    drawn: Int64[np.ndarray, " picks"] = (uniform * num_examples).long().numpy()
    rows = np.repeat(np.arange(num_resamples), num_examples)
    counts = np.bincount(rows * num_examples + drawn, minlength=num_resamples * num_examples)
    resamples = counts.reshape(num_resamples, num_examples) / num_examples
    return np.vstack([np.full((1, num_examples), 1.0 / num_examples), resamples])


def intervals(draws: Draws) -> list[tuple[float, float]]:
    """Return each task's 95 % bootstrap interval, by percentiles of the rows after the first.

    Where resampling is biased, percentiles can miss the estimate itself; the interval is then widened
    until it holds the first row.
    """
    low, high = np.percentile(draws[1:], PERCENTILES, axis=0)
    low, high = np.minimum(low, draws[0]), np.maximum(high, draws[0])
    return list(zip(low.tolist(), high.tolist(), strict=True))


def shrink(draws: Draws, prior: Float64[np.ndarray, " tasks"], strength: float) -> Draws:
    """Return (1 − strength) · draws + strength · prior."""
    return (1 - strength) * draws + strength * prior


@dataclass(frozen=True)
class HoldoutCheck:
    """How the estimate did against the prior on held-out examples.

    Attributes:
        estimate, prior: Mean outcomes of the models merged with each.
        difference: Estimate minus prior, with its 95 % bootstrap interval over examples `low` to `high`.
        examples: How many examples were held out.
    """

    estimate: float
    prior: float
    difference: float
    low: float
    high: float
    examples: int

    @property
    def estimate_loses(self) -> bool:
        """Whether the prior scored higher. An equal score keeps the estimate."""
        return self.difference < 0


def check_holdout(
    estimate: Mapping[str, float], prior: Mapping[str, float], score: ScoreOf, *, seed: int = 0
) -> HoldoutCheck:
    """Merge with both preferences, by way of `score`, and compare them example by example.

    Args:
        estimate: Weights by task.
        prior: Weights by task.
        score: Returns one outcome per held-out example, always in the same order.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If the two runs give different numbers of outcomes, or too few.
    """
    ours, theirs = ([outcome.score for outcome in score(weights)] for weights in (estimate, prior))
    if len(ours) != len(theirs):
        raise EvaluationError(
            f"{len(ours)} and {len(theirs)} outcomes cannot be compared", where="preference.holdout"
        )
    check_sample_size(len(ours), "preference.holdout")
    found = paired_difference(ours, theirs, seed=seed)
    estimated, before = math.fsum(ours) / len(ours), math.fsum(theirs) / len(theirs)
    return HoldoutCheck(estimated, before, found.mean, found.low, found.high, found.num_examples)


def conclude(
    recipe: Recipe, draws: Draws, *, fingerprint: str, seen: Mapping[str, Any], score: ScoreOf | None
) -> ResolvedPreference:
    """Return the preference that an estimate becomes after the prior and the held-out check.

    Args:
        recipe: Its preference is an Estimate.
        draws: The estimate, and one more row per resample; one column per task.
        fingerprint: Of the data.
        seen: The start of the explanation.
        score: Merges and scores on the held-out examples; needed where the recipe asks for a hold-out.

    Raises:
        EvaluationError: If a hold-out is asked for and there is no `score`.
    """
    assert recipe.preference is not None
    spec: Estimate = recipe.preference.spec
    tasks = recipe.task_names
    prior = _prior(spec, tasks)
    mixed = shrink(draws, np.array(list(prior.values())), spec.strength)
    weights = dict(zip(tasks, normalise(mixed[0].tolist()), strict=True))
    explanation: dict[str, Any] = {
        **seen,
        "intervals": {
            task: [round(low, 4), round(high, 4)]
            for task, (low, high) in zip(tasks, intervals(mixed), strict=True)
        },
    }
    if spec.strength > 0:
        explanation |= {
            "estimate": rounded(dict(zip(tasks, draws[0].tolist(), strict=True))),
            "prior": rounded(prior),
            "strength": spec.strength,
        }
    if spec.holdout is not None:
        check = check_holdout(weights, prior, _needed(score), seed=recipe.seed)
        gives_way = check.estimate_loses and spec.holdout.if_worse == "prior"
        explanation["holdout"] = rounded(asdict(check)) | {"used": "prior" if gives_way else "estimate"}
        if gives_way:
            explanation |= {"estimate": rounded(weights), "prior": rounded(prior)}
            weights = dict(zip(tasks, normalise(list(prior.values())), strict=True))
    return ResolvedPreference(weights, recipe.preference.kind, fingerprint, explanation)


def _prior(spec: Estimate, tasks: Sequence[str]) -> dict[str, float]:
    """Return the weights that an estimate is mixed with: uniform where the recipe names none."""
    if spec.towards is None:
        return dict.fromkeys(tasks, 1.0 / len(tasks))
    return {task: spec.towards.get(task, 0.0) for task in tasks}


def _needed(score: ScoreOf | None) -> ScoreOf:
    if score is None:
        raise EvaluationError(
            "a hold-out needs models that are merged and scored, which this command does not do",
            where="preference.holdout",
            hint="Use hub_magmax.lock or the command line, or leave `holdout` out of the recipe.",
        )
    return score


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with their numbers cut to six significant digits, enough for people."""
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()
    }
