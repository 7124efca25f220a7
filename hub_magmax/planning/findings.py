"""Odd things about checkpoints: notes, and faults, which no merge passes unless they are accepted by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from hub_magmax.errors import MismatchError


@dataclass(frozen=True)
class Finding:
    """One odd thing.

    Attributes:
        rule: Its kind, in words.
        task: The source that it is about, or the first of several.
        text: Says it in a sentence.
        is_fault: Whether a merge is refused until it is accepted.
    """

    rule: str
    task: str
    text: str
    is_fault: bool

    @property
    def name(self) -> str:
        """What it is accepted by."""
        return f"{self.rule.replace(' ', '-')}:{self.task}"


def refuse_faults(findings: Iterable[Finding], accepted: Collection[str]) -> None:
    """Raise MismatchError where there are faults that nobody accepted by name."""
    faults = [finding for finding in findings if finding.is_fault and finding.name not in accepted]
    if faults:
        options = " ".join(f"--in-spite-of {finding.name}" for finding in faults)
        raise MismatchError(
            "; ".join(finding.text for finding in faults),
            expected="checkpoints of one base model, each trained further on its own",
            hint=f"`hub-magmax diagnose` shows more. If it is meant, merge all the same: {options}",
        )
