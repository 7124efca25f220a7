"""Work of a known size, for the terminal: how much is done, how fast it goes, and the time left."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from hub_magmax.text import format_bytes, format_seconds, unit_of_bytes

#: The rate is that of the last seconds. The time left is told from that share of the work on, seen done here.
#: Steps may be long, so that the rate is of a few at least.
_RATE_SECONDS, _RATE_STEPS, _LEAST_SHARE = 15.0, 4, 0.02

#: Unit of work that is told as sizes.
BYTES = "bytes"


class Work:
    """Work of a known number of bytes, examples or models: how many are done, and how fast it goes."""

    def __init__(self, doing: str, total: int, unit: str = BYTES) -> None:
        self.doing, self.total, self.unit, self.done = doing, total, unit, 0
        self.told, self.told_at = "", 0  # the last line, and how much was done by then
        self._samples: deque[tuple[float, int]] = deque()
        self._begun: tuple[float, int] | None = None
        self._now, self.moved_at = 0.0, float("-inf")
        self._rate_unit = ""
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Count what was done since."""
        with self._lock:
            self.done += count

    def sample(self, now: float) -> None:
        """Note how far it is; what was done before the first step, or was there already, is no speed."""
        if self.done == 0:
            return
        if self._begun is None:
            self._begun = now, self.done
        self._now = now
        if not self._samples or self._samples[-1][1] != self.done:
            self.moved_at = now
            self._samples.append((now, self.done))
        while len(self._samples) > _RATE_STEPS and now - self._samples[1][0] > _RATE_SECONDS:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Done per second, None while that is unknown; of all steps, the mean.

        It falls when a step takes longer than before.
        """
        if len(self._samples) < 2 or self._begun is None:
            return None
        if self.done >= self.total:
            (since, before), (last, done) = self._begun, self._samples[-1]
            return (done - before) / (last - since) if last > since else None
        (since, before), (last, done) = self._samples[0], self._samples[-1]
        step = (last - since) / (len(self._samples) - 1)
        seconds = max(last - since, self._now - since - step)
        return (done - before) / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate, None while that is unknown."""
        seen = self.done - (self._begun[1] if self._begun else 0)
        is_known = self.rate and seen >= _LEAST_SHARE * self.total
        return (self.total - self.done) / self.rate if self.rate and is_known else None

    def facts(self) -> dict[str, Any]:
        """Return the values of a JSON line."""
        rate, left = self.rate, self.seconds_left
        return {
            self.unit: self.done,
            "total": self.total,
            "rate": None if rate is None else round(rate) if self.unit == BYTES else float(f"{rate:.3g}"),
            "seconds_left": None if left is None else round(left, 1),
        }

    def __str__(self) -> str:
        share = self.done / self.total if self.total else 1.0
        text = f"{self.doing}: {share:.0%}, {self._told_share()}"
        if self.rate is not None:
            text += f", {self._told_rate(self.rate)}"
        if self.done < self.total and self.seconds_left is not None:
            text += f", {format_seconds(self.seconds_left)} left"
        return text

    def _told_share(self) -> str:
        if self.unit == BYTES:
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def _told_rate(self, rate: float) -> str:
        """Return the rate in the unit in which it was told first."""
        if self.unit == BYTES:
            self._rate_unit = self._rate_unit or unit_of_bytes(round(rate))
            return f"{format_bytes(round(rate), self._rate_unit)}/s"
        self._rate_unit = self._rate_unit or ("s" if rate >= 1 else "min")
        return f"{rate if self._rate_unit == 's' else 60 * rate:,.3g} {self.unit}/{self._rate_unit}"
