"""Axes of scores: their ends, and titles that say unit and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hub_magmax.evaluation.scores import Score, Scores
from hub_magmax.reporting.figures.style import SMALL_POINTS, inches
from hub_magmax.reporting.score_formats import Unit
from hub_magmax.text import cut_name


@dataclass(frozen=True)
class Scale:
    """How scores of one metric are shown.

    Attributes:
        metric: What they are.
        is_share: Shown in per cent.
        unit: Of those that are no shares.
        higher_is_better: Their direction.
    """

    metric: str
    is_share: bool
    unit: str = ""
    higher_is_better: bool = True

    @classmethod
    def of(cls, scores: Scores) -> Scale:
        """Return the scale of what was measured."""
        return cls(scores.metric, scores.is_share, scores.unit, scores.higher_is_better)

    @property
    def format(self) -> Unit:
        """Numbers as text."""
        return Unit(self.is_share)

    def shown(self, value: float) -> float:
        """Return a score as the axis has it."""
        return self.format.factor * value

    def title(self, width: float) -> str:
        """Return metric, unit and direction, at most `width` inches wide."""
        unit = " (%)" if self.is_share else f" ({self.unit})" if self.unit else ""
        rest = f"{unit}, {'higher' if self.higher_is_better else 'lower'} is better"
        return cut_name(self.metric, lambda text: inches(text + rest, SMALL_POINTS) <= width) + rest

    def limits(self, scores: Sequence[Score]) -> tuple[float, float]:
        """Return a range that holds every interval, with room for the marks.

        Of shares it ends at multiples of 10 per cent.
        """
        if self.is_share:
            lows = [100 * score.low for score in scores] or [0.0]
            highs = [100 * score.high for score in scores] or [100.0]
            return max(10 * (min(lows) // 10), 0.0) - 1.5, min(10 * (max(highs) // 10 + 1), 100.0) + 1.5
        low = min((score.low for score in scores), default=0.0)
        high = max((score.high for score in scores), default=1.0)
        margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        return low - margin, high + margin
