"""Diagnosis of checkpoints: numbers per layer and pair of tasks, and findings in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from hub_magmax.evaluation.tables import Cell, Format, Table, Tabular
from hub_magmax.files import json_text, read_result
from hub_magmax.planning.findings.faults import (
    THRESHOLDS,
    Evidence,
    Swap,
    faults,
    limit_of,
)
from hub_magmax.planning.findings.finding import Finding
from hub_magmax.reporting.diagnosis_groups import Group, Overlap, total
from hub_magmax.reporting.pair_metrics import PairMetrics
from hub_magmax.text import number_of

#: Files that a diagnosis writes, beside the merged model where there is one.
DIAGNOSIS_NAME, HEAT_MAP_NAME = "diagnosis.json", "diagnosis.png"

#: Methods that give tasks the elements on which they change most; of these, those with quotas.
_BY_SIZE, _BY_QUOTA = ("magmax", "tunable_magmax"), ("tunable_magmax",)

#: Pairs of tasks that are all listed, those at either end of more, and notes of one kind.
_MOST_PAIRS, _ENDS, _MOST_NOTES = 15, 5, 5


@dataclass(frozen=True, repr=False)
class Diagnosis(Tabular):
    """All that was found.

    Attributes:
        tasks: In order.
        layers: In the order of the files.
        matrices: Everything with two dimensions or more together; None if there is nothing.
        unchanged: By task, how many tensors are the base model's, value for value.
        num_tensors: That are merged.
        overlaps: Of the largest matrices.
        swaps: Tensors in the place of another.
        seconds: That the pass took.
        method: That is going to merge them.
        norms: As the recipe has it, which scales task vectors to a common length.
        metrics: Of pairs of tasks, where they were asked for.
    """

    tasks: tuple[str, ...]
    layers: tuple[Group, ...]
    matrices: Group | None
    unchanged: tuple[int, ...]
    num_tensors: int
    overlaps: tuple[Overlap, ...]
    swaps: tuple[Swap, ...]
    seconds: float
    method: str = "tunable_magmax"
    norms: str | None = None
    metrics: PairMetrics | None = None

    @cached_property
    def whole(self) -> Group:
        return total("all tensors", self.layers)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """Findings beyond the stated thresholds; faults first, and notes where they bear on the method."""
        dominant = _dominant(self) if self.method in _BY_SIZE else ()
        short = _short(self) if self.has_quotas else ()
        return (*faults(self.evidence), *_uneven(self), *_opposed(self), *dominant, *short)

    @property
    def has_quotas(self) -> bool:
        """Whether the method gives each task as many elements as the preference says."""
        return self.method in _BY_QUOTA

    @property
    def evidence(self) -> Evidence:
        """What the rules for faults judge by."""
        return Evidence(
            self.tasks,
            self.whole.geometry,
            (self.matrices or self.whole).geometry,
            tuple(count == self.num_tensors for count in self.unchanged),
            self.swaps,
        )

    @property
    def relative_lengths(self) -> tuple[float, ...]:
        """By task, how long the task vector is compared with the base model."""
        base = np.sqrt(self.whole.products[0][0])
        return tuple(float(length / base) if base else 0.0 for length in self.whole.lengths)

    @property
    def changed_shares(self) -> tuple[float, ...]:
        """By task, the share of elements that differ from the base model's."""
        return tuple(changed / self.whole.num_elements for changed in self.whole.changed)

    def table(self, form: Format = "text") -> str:
        """Return verdict, findings, and numbers by task and by pair.

        Markdown and LaTeX have a second table with a row for each pair, and one of metrics; CSV has a row for
        each task, and no sentences.
        """
        if form == "text":
            return self._text()
        if form == "csv" or len(self.tasks) < 2:
            return (self._wide() if form == "csv" else self.as_table()).write(form)
        tables = [self.as_table(), self.pairs()]
        if self.metrics:
            tables.append(self.metrics.as_table(self.tasks))
        return "\n\n".join(table.write(form) for table in tables)

    def _text(self) -> str:
        looked = f"{self.whole.num_looked_at:,} of {self.whole.num_elements:,} elements"
        lines = [f"{self.verdict} ({looked}, {self.seconds:.1f} s)"]
        for finding in self.findings:
            limit, meaning = THRESHOLDS.get(finding.rule, (None, ""))
            stated = f" [{finding.rule}: {meaning}, {limit:g}]" if limit is not None else ""
            lines.append(f"{'FAULT' if finding.is_fault else 'note'}: {finding.text}{stated}")
        width = max(4, *(len(task) for task in self.tasks))
        quota = "  lacking" if self.has_quotas else ""
        lines += ["", f"{'task':<{width}}  length  changed    wins{quota}", *self._task_lines(width)]
        if len(self.tasks) > 1:
            lines += ["", "pair: cosine, agreement in sign, ratio of lengths", *self._pair_lines()]
        for overlap in self.overlaps:
            shares = np.array(overlap.shares)[np.triu_indices(len(self.tasks), 1)]
            if len(shares):
                lines.append(
                    f"directions in {overlap.matrix}: shared {shares.mean():.3f} on average, up to "
                    f"{shares.max():.3f}; by chance {overlap.chance:.3f}"
                )
        if self.metrics:
            lines += ["", self.metrics.as_table(self.tasks).write()]
        return "\n".join(lines)

    def as_table(self) -> Table:
        """Return a row for each task: its length, the shares that changed and that win, and what lacks."""
        columns = [self.tasks, self.relative_lengths, self.changed_shares, self.whole.win_shares.tolist()]
        names = ["task", "length", "changed", "wins"]
        if self.has_quotas:
            columns.append(self.whole.lacking_shares.tolist())
            names.append("lacking")
        rows: tuple[tuple[Cell, ...], ...] = tuple(zip(*columns, strict=True))
        findings = tuple(f"{'FAULT' if found.is_fault else 'note'}: {found.text}" for found in self.findings)
        return Table(tuple(names), rows, lead=(self.verdict, *findings))

    def pairs(self) -> Table:
        """Return a row for each pair of tasks."""
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (self.tasks[one], self.tasks[other], *(numbers[one][other] for numbers in self._by_pair))
            for one, other in combinations(range(len(self.tasks)), 2)
        )
        return Table(("task", "other task", "cosine", "agreement in sign", "ratio of lengths"), rows)

    @property
    def _by_pair(self) -> tuple[list[list[float]], ...]:
        """Cosines, agreement in sign and ratios of lengths, row over column."""
        whole = self.whole
        return tuple(found.tolist() for found in (whole.cosines, whole.sign_agreement, whole.length_ratios))

    def _wide(self) -> Table:
        """Return a row for each task, with its numbers beside every task in columns."""
        table, kinds = self.as_table(), ("cosine with", "agreement with", "length over")
        names = [f"{kind} {task}" for kind in kinds for task in self.tasks]
        rows = tuple(
            (*row, *(value for numbers in self._by_pair for value in numbers[task]))
            for task, row in enumerate(table.rows)
        )
        return Table((*table.head, *names), rows)

    def _task_lines(self, width: int) -> Iterator[str]:
        whole = self.whole
        for number, task in enumerate(self.tasks):
            quota = f"  {whole.lacking_shares[number]:7.3f}" if self.has_quotas else ""
            yield (
                f"{task:<{width}}  {self.relative_lengths[number]:6.3g}  {self.changed_shares[number]:7.3f}  "
                f"{whole.win_shares[number]:6.3f}{quota}"
            )

    def _pair_lines(self) -> Iterator[str]:
        """Yield a line per pair of few tasks; of many the pairs with the lowest and the highest cosines."""
        pairs = list(combinations(range(len(self.tasks)), 2))
        if len(pairs) <= _MOST_PAIRS:
            yield from map(self._pair_line, pairs)
            return
        pairs.sort(key=lambda pair: self.whole.cosines[pair])
        between = pairs[_ENDS:-_ENDS]
        yield from map(self._pair_line, pairs[:_ENDS])
        values = np.array([self.whole.cosines[pair] for pair in between])
        yield (
            f"… {len(between)} pairs between these: cosines from {values[0]:.3f} to {values[-1]:.3f}, "
            f"{round(values.mean(), 3) + 0.0:.3f} on average; the files that are written have all of them"
        )
        yield from map(self._pair_line, pairs[-_ENDS:])

    def _pair_line(self, pair: tuple[int, int]) -> str:
        whole = self.whole
        return (
            f"{self.tasks[pair[0]]} and {self.tasks[pair[1]]}: {whole.cosines[pair]:.3f}, "
            f"{whole.sign_agreement[pair]:.3f}, {whole.length_ratios[pair]:.3g}"
        )

    @property
    def suspects(self) -> tuple[str, ...]:
        """The tasks that have faults."""
        return tuple(dict.fromkeys(finding.task for finding in self.findings if finding.is_fault))

    @property
    def verdict(self) -> str:
        """Say in a sentence whether to merge."""
        return verdict(self.suspects, notes=bool(self.findings))

    def to_json(self) -> str:
        derived = {
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": {group.name: group.numbers() for group in (self.whole, *self.layers)},
        }
        values = asdict(self) | derived
        return json_text(values)


def verdict(suspects: Sequence[str], *, notes: bool) -> str:
    """Say in a sentence whether to merge checkpoints of which some are suspect."""
    if suspects:
        return f"Do not merge before looking at {', '.join(suspects)}."
    return "Can be merged; mind the notes." if notes else "Nothing speaks against merging."


def read_diagnosis(path: Path) -> Diagnosis:
    """Return the diagnosis stored in `path`.

    Raises:
        OutputError: If it holds something else.
    """
    again = "Run `hub-magmax diagnose` again."
    return read_result(path, Diagnosis, "a diagnosis", again, ("findings", "numbers"))


def _uneven(found: Diagnosis) -> Iterator[Finding]:
    """Yield a note where the longest task vector is much longer than the shortest that is not zero."""
    lengths = {task: length for task, length in zip(found.tasks, found.whole.lengths, strict=True) if length}
    by_length = sorted(lengths, key=lambda task: lengths[task])
    times = lengths[by_length[-1]] / lengths[by_length[0]] if by_length else 1.0
    if times > limit_of("uneven") and found.norms is None:
        text = (
            f"the task vector of {by_length[-1]} is {times:.3g} times as long as that of {by_length[0]}, and "
            "counts the more at the same weight; norms: equal in the recipe scales both to one length"
        )
        yield Finding("uneven", by_length[-1], text, False)


def _opposed(found: Diagnosis) -> Iterator[Finding]:
    cosines, limit = found.whole.cosines, limit_of("opposed")
    pairs = [pair for pair in combinations(range(len(found.tasks)), 2) if cosines[pair] < limit]
    pairs.sort(key=lambda pair: cosines[pair])
    for earlier, later in pairs[:_MOST_NOTES]:
        text = (
            f"{found.tasks[later]} and {found.tasks[earlier]} pull in opposite directions: "
            f"a cosine of {cosines[earlier, later]:.3f}"
        )
        yield Finding("opposed", found.tasks[later], text, False)
    if left := pairs[_MOST_NOTES:]:
        text = f"{number_of(len(left), 'more pair')} of tasks with opposite directions, less so"
        yield Finding("opposed", found.tasks[left[0][1]], text, False)


def _dominant(found: Diagnosis) -> Iterator[Finding]:
    for task, share in zip(found.tasks, found.whole.win_shares, strict=True):
        if len(found.tasks) > 1 and share > limit_of("dominant"):
            text = (
                f"{task} has the largest change in {100 * share:.1f} % of the elements: MAGMAX is almost it"
            )
            yield Finding("dominant", task, text, False)


def _short(found: Diagnosis) -> Iterator[Finding]:
    shares = found.whole.lacking_shares
    tasks = [number for number in range(len(found.tasks)) if shares[number] > limit_of("short")]
    tasks.sort(key=lambda number: -shares[number])
    for number in tasks[:_MOST_NOTES]:
        text = (
            f"{found.tasks[number]} lacks {100 * shares[number]:.1f} % of its quota among what it wins: "
            "the rest comes from where other tasks change more"
        )
        yield Finding("short", found.tasks[number], text, False)
    if left := tasks[_MOST_NOTES:]:
        text = (
            f"{number_of(len(left), 'more task')} short of the quota, by up to {100 * shares[left[0]]:.1f} %"
        )
        yield Finding("short", found.tasks[left[0]], text, False)
