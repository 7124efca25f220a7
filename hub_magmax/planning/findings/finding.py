"""Odd things about checkpoints: notes, and faults, which no merge passes unless they are accepted by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from shlex import quote

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

    @property
    def option(self) -> str:
        """Option of the command line that accepts it."""
        return f"--in-spite-of {quote(self.name)}"


def unchanged(task: str, what: str = "is the base model, unchanged", *, is_fault: bool = True) -> Finding:
    """Return that a task is the base model, and what that does to a merge."""
    text = f"{task} {what}: its task vector is zero, and its share of the merge stays the base model's"
    return Finding("unchanged", task, text, is_fault)


def faults_left(findings: Iterable[Finding], accepted: Collection[str]) -> list[Finding]:
    """Return the faults that nobody accepted by name."""
    return [finding for finding in findings if finding.is_fault and finding.name not in accepted]


def refuse_faults(findings: Iterable[Finding], accepted: Collection[str]) -> None:
    """Raise MismatchError where there are faults that nobody accepted by name."""
    if faults := faults_left(findings, accepted):
        options = " ".join(finding.option for finding in faults)
        raise MismatchError(
            "; ".join(finding.text for finding in faults),
            expected="checkpoints of one base model, each trained further on its own",
            hint=f"`hub-magmax diagnose` shows more. If it is meant, add {options} to merge all the same.",
        )
