"""Gates of a claim about the shape of tails: thresholds, and the conditions one by one.

Source: arXiv:2606.16511, whose thresholds are the defaults here. Beyond it: the number of exceedances is what
its formula for the power asks at the shapes that were fitted; and scores that touch an end of their scale are
refused, since a generalized Pareto distribution fits them well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float64

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.generalized_pareto import fit_pareto, goodness_of_fit
from hub_magmax.evaluation.intervals import PERCENTILES
from hub_magmax.evaluation.resampling import Falling, Resamples, resampled
from hub_magmax.evaluation.tails import cvar_estimates

Values = Float64[np.ndarray, " examples"]

#: A number with the ends of its 95 % interval.
Interval = tuple[float, float, float]

#: Ends of a scale, such as (0, 1) of probabilities.
Bounds = tuple[float, float]

#: Resamples behind the interval of a difference between CVaR, and between shapes.
_NUM_TAIL_RESAMPLES, _NUM_SHAPE_RESAMPLES = 1000, 499

#: Samples that are drawn for one test of the fit.
_NUM_FITS = 199

#: Exceedances that a fit needs at least.
MIN_EXCEEDANCES = 10

#: Below this shape a tail ends so abruptly that the likelihood is irregular.
_LEAST_SHAPE = -0.5

#: An end of the scale is touched by more than this share of the scores as near as this part of the scale.
_TOUCHING_SHARE, _TOUCHING_PART = 0.01, 0.001


@dataclass(frozen=True)
class ShapeProtocol:
    """Thresholds of the gates.

    Attributes:
        mean_margin: Means are equivalent if the interval of their difference lies within this.
        tail_margin: Likewise for CVaR at `tail_level`. Both are in the unit of the scores; the paper's are
            of scores on a logit scale.
        tail_level: Of the CVaR that is compared.
        quantile: Scores above this quantile are the tail.
        shape_margin: The smallest difference of shapes that is claimed.
        power: The probability with which this difference is found.
        least_fit: P-value that the test of the fit has to exceed.
        step, num_steps: The quantile is raised so often by this; each is compared with the next but one.
        shape_change: By this at most the shape changes over two steps.
    """

    mean_margin: float = 0.10
    tail_margin: float = 0.20
    tail_level: float = 0.90
    quantile: float = 0.95
    shape_margin: float = 0.10
    power: float = 0.80
    least_fit: float = 0.05
    step: float = 0.01
    num_steps: int = 4
    shape_change: float = 0.05

    def __post_init__(self) -> None:
        for name in ("mean_margin", "tail_margin", "shape_margin"):
            if not 0 < getattr(self, name) < math.inf:
                raise EvaluationError(
                    f"{name} is {getattr(self, name)}", where="tails", expected="a number above 0"
                )
        if not 0.5 <= self.quantile <= 0.95:
            raise EvaluationError(
                f"the quantile is {self.quantile}",
                where="tails",
                expected="from 0.5 to 0.95, since it is raised by 0.04 to see whether the shape stays",
            )

    def num_needed(self, *shapes: float) -> int:
        """Return how many exceedances of each sample show a difference of shapes, two-sided at 5 %.

        The variance of a fitted shape is (1 + shape)^2 / n, from -0.5 on. For equal shapes this is the
        paper's formula, which gives 1,570 at shapes of 0.
        """
        normal = NormalDist()
        factor = (normal.inv_cdf(0.975) + normal.inv_cdf(self.power)) / self.shape_margin
        return math.ceil(sum((1 + max(shape, _LEAST_SHAPE)) ** 2 for shape in shapes) * factor**2)


@dataclass(frozen=True)
class Gate:
    """One condition of a claim.

    Attributes:
        name: Of the condition.
        is_passed: None where an earlier one failed, so that nobody looked.
        found: What was measured, and what was asked for.
        advice: What it would take, where it failed.
    """

    name: str
    is_passed: bool | None = None
    found: str = ""
    advice: str = ""


class Gates:
    """The gates of two samples.

    Args:
        scores: Both samples, as they are given.
        bounds: Ends of the scale, for which the gates look at logits.
        paired: Resamples draw the same examples of both.
        protocol: Thresholds.
        seed: Of resamples and draws.

    Attributes:
        difference: Of the shapes, with its 95 % interval, once it was looked at.
    """

    def __init__(
        self,
        scores: tuple[Values, Values],
        bounds: Bounds | None,
        paired: bool,
        protocol: ShapeProtocol,
        seed: int,
    ) -> None:
        self._scores, self._bounds, self._protocol = scores, bounds, protocol
        self._logits = (
            scores
            if bounds is None
            else (on_logit_scale(scores[0], bounds), on_logit_scale(scores[1], bounds))
        )
        self._told: dict[bool, dict[str, Interval]] = {}
        # The same seed draws the same examples of samples of one size.
        self._seeds = (seed, seed if paired else seed + 1)
        self.difference: tuple[float, float, float] | None = None

    def look(self) -> Iterator[Gate]:
        """Yield each gate in order; after the first that failed, the rest without having looked."""
        gates: dict[str, Callable[[], dict[str, Any]]] = {
            "ends of the scale": self._ends,
            "equivalent means": self._means,
            "equivalent CVaR": self._cvars,
            "number of exceedances": self._number,
            "goodness of fit": self._fit,
            "stability over thresholds": self._stability,
            "difference of shapes": self._shapes,
        }
        goes_on = True
        for name, look in gates.items():
            gate = Gate(name, **look()) if goes_on else Gate(name)
            goes_on = goes_on and bool(gate.is_passed)
            yield gate

    def differences(self) -> dict[str, Interval]:
        """Return by how much mean and CVaR of the first are above the second's, in the unit of the scores."""
        return self._differences(self._scores)

    def _differences(self, samples: tuple[Values, Values]) -> dict[str, Interval]:
        """Return the differences of mean and CVaR, with their intervals; resamples are drawn once for all."""
        is_given = samples is self._scores  # so are the logits of scores without bounds
        if is_given not in self._told:
            level = self._protocol.tail_level

            def look(drawn: Resamples) -> np.ndarray:
                cvars, _ = cvar_estimates(drawn.largest, level, drawn.size)
                return np.stack([drawn.means, cvars], axis=1)

            first, second = (look(Falling(own).itself)[0] for own in samples)
            ends = self._interval(samples, look, _NUM_TAIL_RESAMPLES, 1 - level)
            rows = zip((first - second).tolist(), *ends.tolist(), strict=True)
            names = "mean", f"CVaR {self._protocol.tail_level:g}"
            self._told[is_given] = dict(zip(names, rows, strict=True))
        return self._told[is_given]

    def _interval(
        self,
        samples: tuple[Values, Values],
        look: Callable[[Resamples], np.ndarray],
        num_resamples: int,
        share: float,
    ) -> np.ndarray:
        """Return both ends of the 95 % bootstrap intervals of differences of statistics.

        Statistics are of the means, and of a share of the values, the largest.
        """
        one, other = self._seeds
        groups = [(one, samples)] if one == other else [(one, samples[:1]), (other, samples[1:])]
        found: list[np.ndarray] = []
        for seed, group in groups:
            blocks = resampled(group, seed, num_resamples, share)
            looked = zip(*([look(drawn) for drawn in block] for block in blocks), strict=True)
            found += [np.concatenate(parts) for parts in looked]
        ends: np.ndarray = np.percentile(found[0] - found[1], PERCENTILES, axis=0)
        return ends

    def _ends(self) -> dict[str, Any]:
        """Neither sample heaps up at an end of its scale, named or not."""
        for own in self._scores:
            low, high = self._bounds or (float(own.min()), float(own.max()))
            near = _TOUCHING_PART * (high - low)
            largest_itself = self._bounds is None  # which every sample has
            share = float(((own >= high - near).sum() - largest_itself) / len(own))
            if self._bounds is not None:
                share = max(share, float((own <= low + near).mean()))
                if on_end := int(((own == low) | (own == high)).sum()):
                    found = f"{on_end} scores are {low:g} or {high:g}, whose logits are infinite"
                    return _failed(found, "Use scores before they are rounded or saturate, such as logits.")
            if high > low and share > _TOUCHING_SHARE:
                found = f"{share:.1%} of the scores of a sample lie at an end of the scale; 1 % may"
                return _failed(found, "Use scores that do not saturate, such as logits.")
        return {"is_passed": True, "found": "neither sample heaps up there"}

    def _means(self) -> dict[str, Any]:
        mean, _ = self._differences(self._logits).values()
        return self._equivalent(mean, self._protocol.mean_margin, "means")

    def _cvars(self) -> dict[str, Any]:
        _, cvar = self._differences(self._logits).values()
        return self._equivalent(cvar, self._protocol.tail_margin, "CVaR")

    def _equivalent(self, difference: Interval, margin: float, what: str) -> dict[str, Any]:
        """Say whether the interval of a difference lies within a margin."""
        seen, low, high = difference
        unit = "" if self._bounds is None else " of logits"
        found = f"the difference{unit} is {seen:+.3f} [{low:.3f}, {high:.3f}]; within ±{margin:g} is needed"
        if -margin <= low and high <= margin:
            return {"is_passed": True, "found": found}
        if abs(seen) > margin:
            return _failed(found, f"The {what} themselves differ: say that, and nothing of the shape.")
        return _failed(found, f"Score more examples, until the interval of the {what} is narrower.")

    def _number(self) -> dict[str, Any]:
        numbers = [len(excesses_of(own, self._protocol.quantile)) for own in self._logits]
        if min(numbers) < MIN_EXCEEDANCES:
            needed = self._protocol.num_needed(0, 0)
        else:
            needed = self._protocol.num_needed(
                *(shape_of(own, self._protocol.quantile) for own in self._logits)
            )
        found = f"{numbers[0]:,} and {numbers[1]:,}; {needed:,} are needed"
        examples = math.ceil(needed / (1 - self._protocol.quantile))
        if min(numbers) >= needed:
            return {"is_passed": True, "found": found}
        margin = self._protocol.shape_margin
        advice = f"Score about {examples:,} examples of each, to tell shapes {margin:g} apart."
        return _failed(found, advice)

    def _fit(self) -> dict[str, Any]:
        lines = []
        for own in self._logits:
            excesses = excesses_of(own, self._protocol.quantile)
            shape = shape_of(own, self._protocol.quantile)
            if shape < _LEAST_SHAPE:
                found = f"a shape is {shape:.2f}, and below {_LEAST_SHAPE} a tail ends like a bounded score's"
                return _failed(found, "Use scores that do not saturate; name their scale as bounds.")
            p_value = goodness_of_fit(excesses, _NUM_FITS, self._seeds[0])
            lines.append(f"{p_value:.3f}")
            if p_value <= self._protocol.least_fit:
                found = f"p = {', '.join(lines)}; more than {self._protocol.least_fit:g} is needed"
                advice = "More examples do not mend it: the tail is of another family, or begins higher."
                return _failed(found, advice)
        return {"is_passed": True, "found": f"p = {', '.join(lines)}"}

    def _stability(self) -> dict[str, Any]:
        protocol, changes = self._protocol, []
        quantiles = [protocol.quantile + protocol.step * n for n in range(protocol.num_steps + 1)]
        for own in self._logits:
            shapes = [shape_of(own, quantile) for quantile in quantiles]
            changes += [abs(after - before) for before, after in zip(shapes, shapes[2:], strict=False)]
        most = max(changes)
        found = f"a shape changes by {most:.3f} at most; {protocol.shape_change:g} is allowed"
        if most < protocol.shape_change:
            return {"is_passed": True, "found": found}
        return _failed(found, "Score more examples, or begin the tail higher: its shape is not reached yet.")

    def _shapes(self) -> dict[str, Any]:
        quantile, margin = self._protocol.quantile, self._protocol.shape_margin
        first, second = (shape_of(own, quantile) for own in self._logits)

        def look(drawn: Resamples) -> np.ndarray:
            """Return the shape of the tail of each resample, its threshold drawn anew."""
            number = drawn.size - math.ceil(round(drawn.size * quantile, 9))
            return fit_pareto(drawn.largest[:, :number] - drawn.largest[:, number : number + 1]).shape

        low, high = self._interval(self._logits, look, _NUM_SHAPE_RESAMPLES, 1 - quantile).tolist()
        self.difference = (first - second, low, high)
        found = (
            f"{first - second:+.3f} [{low:.3f}, {high:.3f}]; {margin:g} and an interval without 0 are needed"
        )
        if abs(first - second) >= margin and not low <= 0 <= high:
            return {"is_passed": True, "found": found}
        return _failed(found, "The shapes are too alike for a claim.")


def _failed(found: str, advice: str) -> dict[str, Any]:
    return {"is_passed": False, "found": found, "advice": advice}


def on_logit_scale(scores: Values, bounds: Bounds) -> Values:
    """Return the logits of the places between two bounds; infinite on them."""
    part = (scores - bounds[0]) / (bounds[1] - bounds[0])
    with np.errstate(divide="ignore"):
        logits: Values = np.log(part) - np.log1p(-part)
    return logits


def excesses_of(scores: Values, quantile: float) -> Values:
    """Return by how much scores exceed a quantile, of those that do."""
    threshold = np.quantile(scores, quantile, method="inverted_cdf")
    found: Values = scores[scores > threshold] - threshold
    return found


def shape_of(scores: Values, quantile: float) -> float:
    """Return the shape of the generalized Pareto distribution that fits what exceeds a quantile."""
    return float(fit_pareto(excesses_of(scores, quantile)[None]).shape[0])
