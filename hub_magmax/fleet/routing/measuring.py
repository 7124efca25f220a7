"""Measures of a router on examples that it was neither fitted nor calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from hub_magmax.evaluation.intervals import PERCENTILES, mean_interval, paired_difference, resampled_ranks
from hub_magmax.evaluation.tables import Measured
from hub_magmax.fleet.routing.bounds import at_thresholds, supported
from hub_magmax.fleet.routing.curves import area_under_risk_coverage, at_share, cost_quality, risk_coverage
from hub_magmax.fleet.routing.observing import Observed
from hub_magmax.fleet.routing.splitting import Parts
from hub_magmax.fleet.routing.verifier import Verifier, platt, sigmoid
from hub_magmax.reporting.router_report import CostPoint, Operation, RouterReport, Signal, StatedRisk

Values = Float64[np.ndarray, " examples"]

#: Shares of the examples at which curves are reported.
SHARES = tuple(step / 20 for step in range(21))

#: A gain that no example reaches: nothing is escalated.
NEVER = 1.0


@dataclass(frozen=True)
class Aim:
    """How the threshold is chosen.

    Attributes:
        budget: Share of the calibrating examples that may be escalated.
        risk: Share of the router's answers that may be wrong; None states nothing.
        confidence: Of the statement.
    """

    budget: float = 0.3
    risk: float | None = None
    confidence: float = 0.95


@dataclass(frozen=True)
class Choice:
    """A verifier's choices on some examples.

    Attributes:
        trust: Probability that the merged model is right.
        gain: By which the most promising checkpoint of a task is likelier to be right.
        expert: Number of that checkpoint, from 0.
    """

    trust: Values
    gain: Values
    expert: np.ndarray


def choose(probabilities: Float64[np.ndarray, "examples models"]) -> Choice:
    """Return a verifier's choices; of equally promising checkpoints the first."""
    trust, experts = probabilities[:, 0], probabilities[:, 1:]
    return Choice(trust, experts.max(axis=1) - trust, experts.argmax(axis=1))


def threshold_for(gain: Values, budget: float) -> float:
    """Return the lowest threshold from 0 above which at most a share of these gains is.

    Below 0 the merged model is likelier to be right.
    """
    most = int(budget * len(gain) + 1e-9)
    return max(0.0, float(np.sort(gain)[::-1][most])) if most < len(gain) else 0.0


def candidates(gain: Values) -> list[float]:
    """Return thresholds in the order in which they are tested: from escalating most to escalating nothing."""
    return [*sorted({threshold_for(gain, share) for share in SHARES}), NEVER]


def measure(
    observed: Observed, parts: Parts, verifier: Verifier, models: tuple[str, ...], aim: Aim
) -> RouterReport:
    """Return the report on a calibrated verifier.

    Args:
        observed: All examples.
        parts: Of them.
        verifier: Fitted and calibrated on the first two parts.
        models: Names of the merged model and the tasks' own checkpoints, in the order of `observed.right`.
        aim: How the threshold is chosen.
    """
    calibrating, seen = observed.at(parts.calibrate), observed.at(parts.held_out)
    before, now = (choose(verifier.probabilities(own.features, own.answers)) for own in (calibrating, seen))
    rows = np.arange(len(seen.right))
    kept, escalated = seen.right[:, 0], seen.right[rows, 1 + now.expert]
    stated = _stated(candidates(before.gain), now.gain, kept, escalated, aim)
    by_risk = stated is not None and stated.threshold is not None
    threshold = stated.threshold if by_risk and stated else None
    if threshold is None:
        threshold = threshold_for(before.gain, aim.budget)
    signals = _signals(calibrating, seen, now.trust)
    errors = (~kept).astype(np.float64)
    return RouterReport(
        models,
        {"fit": len(parts.fit), "calibrate": len(parts.calibrate), "held_out": len(parts.held_out)},
        _share(kept),
        _share(escalated),
        _share(seen.right[rows, 1 + seen.tasks]),
        _share(np.asarray(seen.right.any(axis=1))),
        tuple(_signal(name, trust, errors) for name, trust in signals.items()),
        area_under_risk_coverage(-errors, errors),
        _costs(now.gain, -signals["confidence"], kept, escalated, np.asarray(seen.right[:, 1:].any(axis=1))),
        _operation(threshold, None if by_risk else aim.budget, now.gain, kept, escalated),
        stated,
    )


def _share(right: Bool[np.ndarray, " examples"]) -> Measured:
    return Measured(float(right.mean()), *mean_interval(right.astype(float).tolist(), is_share=True))


def _stated(
    thresholds: list[float], gain: Values, kept: np.ndarray, escalated: np.ndarray, aim: Aim
) -> StatedRisk | None:
    if aim.risk is None:
        return None
    tested = at_thresholds(thresholds, gain, kept, escalated, aim.confidence)
    found = supported(tested, aim.risk)
    at = found or tested[0]
    threshold = None if found is None else found.threshold
    return StatedRisk(aim.risk, aim.confidence, threshold, at.bound, at.escalated, at.errors, len(gain))


def _signals(calibrating: Observed, seen: Observed, verified: Values) -> dict[str, Values]:
    """Return the probability that the merged model is right, by each signal, calibrated alike."""

    def calibrated(before: Values, now: Values) -> Values:
        slope, intercept = platt(before[:, None], calibrating.right[:, 0])
        return sigmoid(slope * now + intercept)

    return {
        "confidence": calibrated(calibrating.features[:, -1], seen.features[:, -1]),
        "agreement": calibrated(calibrating.agrees.astype(np.float64), seen.agrees.astype(np.float64)),
        "verifier": verified,
    }


def _signal(name: str, trust: Values, errors: Values) -> Signal:
    risks = risk_coverage(trust, errors)
    shown = {f"{share:g}": float(risks[max(1, round(share * len(risks))) - 1]) for share in SHARES[1:]}
    area = _bootstrap(lambda drawn: area_under_risk_coverage(trust[drawn], errors[drawn]), len(errors))
    return Signal(name, area, float(np.mean((trust - (1 - errors)) ** 2)), shown)


def _costs(
    gain: Values, doubt: Values, kept: np.ndarray, escalated: np.ndarray, any_right: np.ndarray
) -> tuple[CostPoint, ...]:
    before, after, best = (right.astype(np.float64) for right in (kept, escalated, kept | any_right))
    router, by_doubt = (cost_quality(order, before, after) for order in (gain, doubt))
    oracle = cost_quality(best - before, before, best)
    found = []
    for share in SHARES:
        value = at_share(router, share)
        interval = mean_interval(
            [1.0] * round(value * len(gain)) + [0.0] * (len(gain) - round(value * len(gain))), is_share=True
        )
        random = (1 - share) * before.mean() + share * after.mean()
        found.append(
            CostPoint(
                share,
                Measured(value, *interval),
                at_share(by_doubt, share),
                float(random),
                at_share(oracle, share),
            )
        )
    return tuple(found)


def _operation(
    threshold: float, budget: float | None, gain: Values, kept: np.ndarray, escalated: np.ndarray
) -> Operation:
    goes = gain > threshold
    right = np.where(goes, escalated, kept)
    values = [array.astype(np.float64) for array in (right, kept, escalated, goes)]

    def over_random(drawn: np.ndarray) -> float:
        routed, before, after, share = (array[drawn].mean() for array in values)
        return float(routed - (1 - share) * before - share * after)

    return Operation(
        threshold,
        "risk" if budget is None else "budget",
        _share(goes),
        _share(right),
        paired_difference(right.tolist(), kept.tolist()),
        _bootstrap(over_random, len(gain)),
        budget,
    )


def _bootstrap(statistic: Callable[[np.ndarray], float], size: int) -> Measured:
    """Return a statistic of the examples, with the 95 % interval of its percentiles over resamples."""
    value = statistic(np.arange(size))
    drawn = [statistic(row) for block in resampled_ranks(size, 0) for row in block]
    low, high = np.percentile(drawn, PERCENTILES)
    return Measured(value, min(float(low), value), max(float(high), value))
