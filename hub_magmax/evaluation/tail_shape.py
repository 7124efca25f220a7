"""Comparison of the tails of two samples: mean and CVaR always, the shape where every gate is passed.

That one tail is *heavier* than another, as the shape of a generalized Pareto distribution has it, is a claim
of its own beside mean and CVaR, and mostly noise, saturation or a threshold that was chosen. It is made only
where means and CVaR are equivalent, so that they do not explain it, and refused with the first gate that
fails otherwise.

Source: arXiv:2606.16511.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hub_magmax.errors import ArgumentError, EvaluationError
from hub_magmax.evaluation.generalized_pareto import fit_pareto
from hub_magmax.evaluation.intervals import mean_interval
from hub_magmax.evaluation.tables import Measured, Table, Tabular
from hub_magmax.evaluation.tail_gates import (
    MIN_EXCEEDANCES,
    Bounds,
    Gate,
    Gates,
    Interval,
    ShapeProtocol,
    Values,
    excesses_of,
    on_logit_scale,
)
from hub_magmax.evaluation.tails import LEVELS, Tail, tails, tails_of_each
from hub_magmax.recipe.arguments import checked

#: Scores that a comparison needs at least, of each sample.
MIN_SCORES = 20

#: Sums of squares of larger scores may overflow.
_LARGEST = 1e100


@dataclass(frozen=True)
class Sample:
    """What is told of one sample in any case.

    Attributes:
        name: Of the sample.
        num_examples: How many scores.
        mean, low, high: With its 95 % interval (Student's t).
        tails: CVaR at .9, .95 and .99 with 95 % intervals, where at least five examples lie in the tail.
        num_exceedances: Scores above the quantile of the protocol.
        shape: Fitted to these, None where they are too few. No claim without the gates.
    """

    name: str
    num_examples: int
    mean: float
    low: float
    high: float
    tails: tuple[Tail, ...]
    num_exceedances: int
    shape: float | None


@dataclass(frozen=True)
class TailComparison(Tabular):
    """Two samples, and whether a difference of their tails' shapes is claimed.

    Attributes:
        samples: Both.
        differences: Of mean and of CVaR at .9, the first minus the second with a 95 % interval, in the unit
            of the scores; of the same examples where they are paired.
        gates: In order.
        difference: Shape of the first minus that of the second with its 95 % interval, if every gate before
            it was passed.
    """

    samples: tuple[Sample, Sample]
    differences: Mapping[str, Interval]
    gates: tuple[Gate, ...]
    difference: tuple[float, float, float] | None = None

    @property
    def failed(self) -> Gate | None:
        """The first gate that failed; None where the claim is made."""
        return next((gate for gate in self.gates if gate.is_passed is False), None)

    @property
    def verdict(self) -> str:
        """The claim or its refusal, in a sentence or two."""
        if self.failed is not None:
            return (
                f"REFUSED, by the gate of {self.failed.name}: no claim about the shape of the tails. "
                f"{self.failed.found[:1].upper()}{self.failed.found[1:]}. {self.failed.advice}"
            )
        assert self.difference is not None
        first, second = (sample.name for sample in self.samples)
        value, low, high = self.difference
        heavier, other = (first, second) if value > 0 else (second, first)
        return (
            f"PASSED: the tail of {heavier} is heavier than that of {other}, beyond mean and CVaR; "
            f"the shapes differ by {value:+.3f} [{low:.3f}, {high:.3f}]."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "claimed": self.failed is None,
            "refused_by": None if self.failed is None else self.failed.name,
            "verdict": self.verdict,
            **asdict(self),
        }

    def as_table(self) -> Table:
        """Return a row for each sample, with the gates and the verdict below."""
        tails = tuple(f"CVaR {level:g}" for level in LEVELS)
        head = ("sample", "examples", "mean", *tails, "above")
        rows = tuple(
            (
                own.name,
                own.num_examples,
                Measured(own.mean, own.low, own.high),
                *(
                    next((Measured(t.value, t.low, t.high) for t in own.tails if t.level == level), None)
                    for level in LEVELS
                ),
                own.num_exceedances,
            )
            for own in self.samples
        )
        marks = {True: "passed", False: "FAILED", None: "not looked at"}
        gates = (
            f"{gate.name}: {marks[gate.is_passed]}{gate.found and ', '}{gate.found}" for gate in self.gates
        )
        told = (
            f"difference of {name}: {value:+.4g} [{low:.4g}, {high:.4g}]"
            for name, (value, low, high) in self.differences.items()
        )
        return Table(head, rows, (*told, *gates, self.verdict), measured=tails)


@checked
def compare_tails(
    first: Sequence[float],
    second: Sequence[float],
    *,
    names: Sequence[str] = ("first", "second"),
    bounds: Sequence[float] | None = None,
    paired: bool = False,
    protocol: ShapeProtocol | None = None,
    seed: int = 0,
) -> TailComparison:
    """Compare the upper tails of two samples: mean and CVaR always, the shape if every gate is passed.

    Args:
        first, second: Scores of which more is worse, such as losses; finite, at least 20 of each.
        names: Of the samples, in what is told.
        bounds: Ends of the scale of scores that have them, such as (0, 1) of probabilities. Gates then look
            at the logit of the place between them; mean and CVaR are of the scores as they are.
        paired: Scores of one place are of one example: intervals of differences then draw examples. Without
            it they draw from each sample alone.
        protocol: Thresholds of the gates; the paper's by default.
        seed: Of resamples and draws.

    Raises:
        EvaluationError: If scores are not finite, too few, beyond the bounds, or paired and not as many.
    """
    protocol = protocol or ShapeProtocol()
    for what, given in (("names", names), ("bounds", bounds)):
        if given is not None and len(given) != 2:
            raise ArgumentError(f"there are {len(given)} {what}", where="compare_tails", expected="two")
    ends = None if bounds is None else _checked_bounds(bounds)
    one, other = (_checked(own, name, ends) for own, name in zip((first, second), names, strict=True))
    if paired and len(one) != len(other):
        raise EvaluationError(
            f"there are {len(one):,} and {len(other):,} scores, and no pairs of them",
            where=" and ".join(names),
            expected="a score of each for the same examples, in the same order",
        )
    gates = Gates((one, other), ends, paired, protocol, seed)
    found = tuple(gates.look())
    samples = tuple(
        _sample(own, name, ends, protocol, told)
        for own, name, told in zip((one, other), names, _tails(one, other, ends, seed), strict=True)
    )
    return TailComparison((samples[0], samples[1]), gates.differences(), found, gates.difference)


def _checked(scores: Sequence[float] | Values, name: str, bounds: Bounds | None) -> Values:
    """Return the scores of a sample as an array."""
    try:
        found = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError("these are no numbers", where=name, expected="one number an example") from error
    if found.ndim != 1 or len(found) < MIN_SCORES:
        told = f"there are {len(found):,} scores" if found.ndim == 1 else "these are no numbers in a row"
        raise EvaluationError(told, where=name, expected=f"at least {MIN_SCORES}")
    if not np.isfinite(found).all():
        number = int(np.flatnonzero(~np.isfinite(found))[0])
        raise EvaluationError(
            f"score {number} is {found[number]}", where=name, expected="finite numbers", hint="Leave it out."
        )
    if np.abs(found).max() > _LARGEST:
        raise EvaluationError(
            f"a score is {found[np.abs(found).argmax()]:g}, whose square is no number",
            where=name,
            expected=f"at most {_LARGEST:g}",
            hint="Divide the scores.",
        )
    if bounds is not None and (found.min() < bounds[0] or found.max() > bounds[1]):
        raise EvaluationError(
            f"scores reach from {found.min():g} to {found.max():g}",
            where=name,
            expected=f"between the bounds {bounds[0]:g} and {bounds[1]:g}",
        )
    return found


def _checked_bounds(bounds: Sequence[float]) -> Bounds:
    """Return the ends of a scale."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError) as error:
        raise ArgumentError("bounds are no numbers", where="compare_tails", expected="two numbers") from error
    if not -_LARGEST < low < high < _LARGEST:
        told = f"the bounds are {low:g} and {high:g}"
        raise ArgumentError(told, where="compare_tails", expected="the lower one first, both finite")
    return low, high


def _tails(one: Values, other: Values, bounds: Bounds | None, seed: int) -> list[tuple[Tail, ...]]:
    """Return the tails of both samples; resamples of one size are drawn once."""
    if len(one) == len(other):
        return tails_of_each([one, other], bounds=bounds, seed=seed)
    return [tails(own, bounds=bounds, seed=seed) for own in (one, other)]


def _sample(
    scores: Values, name: str, bounds: Bounds | None, protocol: ShapeProtocol, told: tuple[Tail, ...]
) -> Sample:
    excesses = excesses_of(scores if bounds is None else on_logit_scale(scores, bounds), protocol.quantile)
    is_fitted = len(excesses) >= MIN_EXCEEDANCES and np.isfinite(excesses).all()
    return Sample(
        name,
        len(scores),
        float(scores.mean()),
        *mean_interval(scores.tolist(), is_share=False),
        told,
        len(excesses),
        float(fit_pareto(excesses[None]).shape[0]) if is_fitted else None,
    )
