"""Verdicts on the lines of an imported file: what each becomes, and how near that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hub_magmax.errors import KeyPath
from hub_magmax.recipe.importing.marked import Marked

#: `exact`: the same bits, or no effect on the weights. `rounding`: the same formula. `in expectation`: other
#: random draws of the same distribution, or the same formula, whose steps the other tool rounds to 16 bits.
#: `not representable`: no recipe says it. `refused`: no merge of this kind. `warning`: the other tool reads
#: over it, or does what the writer can hardly want.
Verdict = Literal["exact", "rounding", "in expectation", "warning", "not representable", "refused"]

#: From the best to the worst; warnings do not count.
_ORDER: tuple[Verdict, ...] = ("exact", "rounding", "in expectation", "not representable", "refused")


@dataclass(frozen=True)
class Finding:
    """One line of the imported file, and what becomes of it.

    Attributes:
        line, column: From 1.
        key: Path of keys.
        text: The line.
        verdict: How near the recipe comes.
        why: The reason, or what it becomes.
    """

    line: int
    column: int
    key: KeyPath
    text: str
    verdict: Verdict
    why: str

    @property
    def is_lost(self) -> bool:
        return self.verdict in ("not representable", "refused")

    @property
    def key_text(self) -> str:
        """The path as `--without` takes it."""
        return ".".join(map(str, self.key))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        return asdict(self) | {"key": list(self.key)}


@dataclass
class Notes:
    """Findings as they are made, in any order.

    Attributes:
        lines: Of the file.
    """

    lines: list[str]
    _found: dict[tuple[int, KeyPath, Verdict, str], Finding] = field(default_factory=dict)

    def add(self, at: Marked, verdict: Verdict, why: str) -> None:
        """Note a verdict on a value; the same one twice is one."""
        text = self.lines[at.line - 1].strip() if 0 < at.line <= len(self.lines) else ""
        finding = Finding(at.line, at.column, at.path, text, verdict, why)
        self._found.setdefault((at.line, at.path, verdict, why), finding)

    def lose(self, at: Marked, why: str) -> None:
        """Note that something has no counterpart."""
        self.add(at, "not representable", why)

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was noted has no counterpart."""
        return not any(finding.is_lost for finding in self._found.values())

    def sorted(self) -> tuple[Finding, ...]:
        """Return the findings by line; of a value that has no counterpart nothing else is said."""
        lost = {(f.line, f.key) for f in self._found.values() if f.is_lost}
        kept = (f for f in self._found.values() if f.is_lost or (f.line, f.key) not in lost)
        return tuple(sorted(kept, key=lambda f: (f.line, f.column)))


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the verdict on a whole file: that of its worst line."""
    places = [_ORDER.index(f.verdict) for f in findings if f.verdict in _ORDER]
    return _ORDER[max(places, default=0)]
