"""Report on a router: curves on held-out examples, the threshold, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.evaluation.intervals import Difference
from hub_magmax.evaluation.tables import Cell, Measured, Table, Tabular
from hub_magmax.files import read_result
from hub_magmax.text import number_of

#: Picture of a router, beside the model that it belongs to.
ROUTER_PICTURE_NAME = "router.png"


@dataclass(frozen=True)
class Signal:
    """One way to tell where the merged model errs, on held-out examples.

    Attributes:
        name: `confidence`, `agreement` or `verifier`.
        aurc: Area under the risk–coverage curve; lower is better.
        brier: Mean squared error of its probability that the merged model is right, calibrated.
        risks: Share of errors among the most trusted examples, by coverage.
    """

    name: str
    aurc: Measured
    brier: float
    risks: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class CostPoint:
    """Accuracy where a share of the held-out examples is escalated.

    Attributes:
        share: Of the examples.
        router: Chosen by the verifier's gain.
        confidence: Chosen by the merged model's lack of confidence, and sent where the verifier says.
        random: Chosen at random, and sent where the verifier says: the expectation.
        oracle: Chosen by who is right.
    """

    share: float
    router: Measured
    confidence: float
    random: float
    oracle: float


@dataclass(frozen=True)
class Operation:
    """The router at its threshold, on held-out examples.

    Attributes:
        threshold: Examples are escalated whose gain is above it.
        chosen_by: `budget` or `risk`.
        escalated: Share of the examples.
        accuracy: Of the router's answers.
        over_never: Compared with the merged model alone, example by example.
        over_random: Accuracy beyond that of escalating as many at random.
        budget: Share that was to be escalated, of the examples that chose the threshold; None where a risk
            chose it, and in reports of earlier versions.
    """

    threshold: float
    chosen_by: str
    escalated: Measured
    accuracy: Measured
    over_never: Difference
    over_random: Measured
    budget: float | None = None

    @property
    def target(self) -> str:
        """What became of the budget on examples that did not choose the threshold; empty without one."""
        if self.budget is None:
            return ""
        found = self.escalated.value
        how = "more than that" if found > self.budget else "within it"
        return (
            f"The budget of {self.budget:g} is a target and no limit: the threshold keeps to it on the "
            f"examples that chose it; of the held-out ones {found:.3f} are escalated, {how}."
        )

    @property
    def is_useful(self) -> bool:
        """Whether both comparisons are above zero by their 95 % intervals."""
        return self.over_never.low > 0 and self.over_random.low > 0


@dataclass(frozen=True)
class StatedRisk:
    """Threshold for a stated share of wrong answers of the router.

    Attributes:
        risk, confidence: As asked.
        threshold: None where the held-out examples support none.
        bound: Upper confidence bound of the share of wrong answers at the threshold, else at the first that
            was tested.
        escalated, errors, num_examples: On the held-out examples, at the same one.
    """

    risk: float
    confidence: float
    threshold: float | None
    bound: float
    escalated: int
    errors: int
    num_examples: int

    @property
    def text(self) -> str:
        """The statement, or why there is none."""
        seen = (
            f"{number_of(self.errors, 'error')} on {number_of(self.num_examples, 'held-out example')}, "
            f"{self.escalated:,} of them escalated: at most {self.bound:.4f}"
        )
        if self.threshold is None:
            return (
                f"No threshold is stated: that at most {self.risk:g} of the answers are wrong is not "
                f"supported with confidence {self.confidence:g} ({seen})."
            )
        return (
            f"At most {self.risk:g} of the answers are wrong, with confidence {self.confidence:g} ({seen})."
        )


@dataclass(frozen=True, repr=False)
class RouterReport(Tabular):
    """What a router is worth, measured on examples that it was neither fitted nor calibrated on.

    Attributes:
        models: The merged one, then the tasks' own checkpoints.
        parts: How many examples it was fitted on (`fit`), calibrated and measured on (`held_out`).
        never, always: Accuracy of the merged model alone, and of escalating every example.
        by_task: Accuracy of each example's own task's checkpoint, which needs to know the task.
        oracle: Accuracy where any model's right answer counts.
        signals: Ways to tell where the merged model errs.
        best_aurc: Area of a signal that knows the errors.
        costs: The cost–quality curve.
        operation: At the threshold.
        stated: Threshold for a stated risk, where one was asked for.
    """

    models: tuple[str, ...]
    parts: Mapping[str, int] = field(hash=False)
    never: Measured
    always: Measured
    by_task: Measured
    oracle: Measured
    signals: tuple[Signal, ...]
    best_aurc: float
    costs: tuple[CostPoint, ...]
    operation: Operation
    stated: StatedRisk | None = None

    @property
    def kept(self) -> float | None:
        """Share of the distance from the merged model to the tasks' own checkpoints that it covers."""
        distance = self.by_task.value - self.never.value
        return (self.operation.accuracy.value - self.never.value) / distance if distance > 0 else None

    @property
    def is_useful(self) -> bool:
        """Whether it is shown to beat the merged model alone, and escalating at random at the same cost."""
        return self.operation.is_useful

    @property
    def verdict(self) -> str:
        """What the router is worth, in a sentence or two."""
        if self.never.value == 1:
            return "There is nothing to gain: the merged model is right on all held-out examples."
        where = f"escalating {self.operation.escalated.value:.3f} of the examples"
        never, random = _signed(self.operation.over_never), _signed(self.operation.over_random)
        if not self.is_useful:
            seen = number_of(self.parts["held_out"], "held-out example")
            return (
                f"Worthless, as far as {seen} tell: {where}, the router is not shown to beat both the merged "
                f"model alone ({never}) and escalating as many at random ({random})."
            )
        kept = f", {self.kept:.2f} of the distance to the tasks' own checkpoints" if self.kept else ""
        return (
            f"The router gains {never} over the merged model alone{kept}, and {random} over escalating "
            f"as many at random, {where}."
        )

    def as_table(self) -> Table:
        """Return a row for each share of escalated examples."""
        rows = tuple((p.share, p.router, p.confidence, p.random, p.oracle) for p in self.costs)
        sizes = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in self.parts.items())
        areas = ", ".join(f"{signal.name} {signal.aurc}" for signal in self.signals)
        at = self.operation
        notes = (
            f"accuracy on held-out examples (95 % interval); examples: {sizes}",
            f"merged model alone {self.never}, all escalated {self.always}",
            f"own task's checkpoint {self.by_task}, any model right {self.oracle}",
            f"area under the risk-coverage curve: {areas}; at best {self.best_aurc:.3f}",
            f"threshold {at.threshold:.4g} ({at.chosen_by}): {at.escalated} escalated, right {at.accuracy}",
            *([at.target] if at.target else []),
            self.verdict,
            *([self.stated.text] if self.stated else []),
        )
        return Table(("escalated", "router", "by confidence", "at random", "oracle"), rows, notes)

    def references(self) -> Table:
        """Return a row for each way to answer: the share of escalated examples, and the accuracy."""
        at = self.operation
        rows: tuple[tuple[Cell, ...], ...] = (
            ("merged model alone", 0.0, self.never),
            ("router", at.escalated, at.accuracy),
            ("checkpoint that the verifier chooses", 1.0, self.always),
            ("own task's checkpoint, the task being known", 1.0, self.by_task),
            ("any model's right answer", None, self.oracle),
        )
        return Table(("answered by", "escalated", "accuracy"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all values, and what they amount to."""
        return {**asdict(self), "kept": self.kept, "is_useful": self.is_useful, "verdict": self.verdict}


def _signed(found: Difference | Measured) -> str:
    mean = found.mean if isinstance(found, Difference) else found.value
    return f"{mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


@dataclass(frozen=True)
class _Stored:
    """Part of `router.json` that is shown; the rest is checked when the router is loaded."""

    report: RouterReport


def read_router_report(path: Path) -> RouterReport:
    """Return the report in `router.json`.

    Raises:
        OutputError: If it cannot be read.
    """
    return read_result(path, _Stored, "the record of a router", "Run `hub-magmax route RECIPE` again.").report
