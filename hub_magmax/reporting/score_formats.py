"""Formats of scores for people: shares in per cent, other scores as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hub_magmax.evaluation.scores import Scores

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Unit:
    """Format of the scores of one evaluation.

    Attributes:
        is_share: They lie between 0 and 1 and are shown in per cent; otherwise with four digits.
        name: Of the unit of other scores, such as "nats per token"; empty where the metric says it.
    """

    is_share: bool = True
    name: str = ""

    @property
    def factor(self) -> int:
        """Factor of a shown score."""
        return 100 if self.is_share else 1

    @property
    def sign(self) -> str:
        """Unit after a score in a sentence."""
        return " %" if self.is_share else ""

    @property
    def difference_name(self) -> str:
        """Unit after a difference in a sentence."""
        return " points" if self.is_share else ""

    @property
    def words(self) -> str:
        """Say after "values are accuracy" how they are shown; every evaluator's scores point up."""
        unit = "per cent" if self.is_share else self.name
        return (f" in {unit}" if unit else "") + " (higher is better)"

    def value(self, score: float) -> str:
        """Return a score without its unit."""
        return self._written(score, "")

    def change(self, difference: float) -> str:
        """Return a difference of two scores with its sign."""
        return self._written(difference, "+")

    def _written(self, number: float, sign: str) -> str:
        # Adding a positive zero takes the sign off a negative one.
        shown = f"{round(100 * number, 1) + 0.0:{sign}.1f}" if self.is_share else f"{number + 0.0:{sign}.4g}"
        return shown.replace("-", _MINUS)


def unit_of(scores: Scores | None) -> Unit:
    """Return the format of scores."""
    return Unit(scores.is_share, scores.unit) if scores else Unit()
