"""Diagnosis of checkpoints: numbers per layer and pair of tasks, and findings in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hub_magmax.errors import OutputError
from hub_magmax.files import read_json
from hub_magmax.planning.findings.faults import (
    THRESHOLDS,
    Evidence,
    Geometry,
    Matrix,
    Swap,
    faults,
    limit_of,
    ratio,
)
from hub_magmax.planning.findings.finding import Finding

#: Files that a diagnosis writes, beside the merged model where there is one.
DIAGNOSIS_NAME, HEAT_MAP_NAME = "diagnosis.json", "diagnosis.png"


@dataclass(frozen=True)
class Group:
    """Sums over the elements of one or more tensors that were looked at.

    Attributes:
        name: A layer, or what the tensors have in common.
        num_elements, num_looked_at: Of the tensors.
        products: Inner products of the base model (first) and the task vectors.
        agreeing, shared: By pair of tasks, elements that both changed in the same direction, and at all.
        changed: By task, elements that differ from the base model's.
        wins: By task, elements on which its change is the largest; the later of equal ones.
        lacking: By task, elements by which its wins fall short of its quota of those that changed.
    """

    name: str
    num_elements: int
    num_looked_at: int
    products: Matrix
    agreeing: Matrix
    shared: Matrix
    changed: tuple[float, ...]
    wins: tuple[float, ...]
    lacking: tuple[float, ...]

    @cached_property
    def geometry(self) -> Geometry:
        """Inner products as numbers."""
        return Geometry(self.num_looked_at, np.array(self.products))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Norms of the task vectors, as looked at."""
        return self.geometry.lengths

    @cached_property
    def cosines(self) -> np.ndarray:
        """Between every two task vectors; 0 where one of them is zero."""
        return self.geometry.cosines

    @cached_property
    def sign_agreement(self) -> np.ndarray:
        """Share of the elements that both tasks changed which they changed in the same direction."""
        return ratio(np.array(self.agreeing), np.array(self.shared))

    @cached_property
    def win_shares(self) -> np.ndarray:
        """Share of the changed elements that each task wins under MAGMAX."""
        wins = np.array(self.wins)
        return ratio(wins, np.full(len(wins), wins.sum()))

    @cached_property
    def length_ratios(self) -> np.ndarray:
        """Ratio of two task vectors' lengths: row over column; 0 where the column's is zero."""
        lengths = self.lengths
        return ratio(np.tile(lengths[:, None], len(lengths)), np.tile(lengths, (len(lengths), 1)))

    @cached_property
    def lacking_shares(self) -> np.ndarray:
        """Share of its quota that each task lacks among the elements it wins."""
        lacking = np.array(self.lacking)
        return ratio(lacking, np.array(self.wins) + lacking)

    def numbers(self) -> dict[str, Any]:
        """Return lengths, shares and cosines, by task and by pair of tasks, as plain values."""
        keys = ("cosines", "sign_agreement", "length_ratios", "win_shares", "lacking_shares")
        return {key: getattr(self, key).round(6).tolist() for key in keys}


def total(name: str, groups: Sequence[Group]) -> Group:
    """Return the sums over several groups, at least one."""

    def summed(attribute: str) -> np.ndarray:
        return np.asarray(sum(np.array(getattr(group, attribute), dtype=np.float64) for group in groups))

    return make_group(
        name,
        sum(group.num_elements for group in groups),
        sum(group.num_looked_at for group in groups),
        *(summed(key) for key in ("products", "agreeing", "shared", "changed", "wins", "lacking")),
    )


def make_group(name: str, num_elements: int, num_looked_at: int, *sums: np.ndarray) -> Group:
    """Return a group from arrays, in the order of its fields."""
    plain: list[Any] = [
        tuple(map(tuple, part.tolist())) if part.ndim == 2 else tuple(part.tolist()) for part in sums
    ]
    return Group(name, num_elements, num_looked_at, *plain)


@dataclass(frozen=True)
class Overlap:
    """Overlap of the strongest directions of the tasks' changes to one matrix.

    Attributes:
        shares: By pair of tasks, the mean squared cosine of the angles between their directions.
        chance: The same of unrelated directions.
    """

    matrix: str
    shares: Matrix
    chance: float


@dataclass(frozen=True)
class Diagnosis:
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
    """

    tasks: tuple[str, ...]
    layers: tuple[Group, ...]
    matrices: Group | None
    unchanged: tuple[int, ...]
    num_tensors: int
    overlaps: tuple[Overlap, ...]
    swaps: tuple[Swap, ...]
    seconds: float

    @cached_property
    def whole(self) -> Group:
        return total("all tensors", self.layers)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """Findings beyond the stated thresholds; faults first."""
        return (*faults(self.evidence), *_opposed(self), *_shares(self))

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
        return tuple(changed / self.whole.num_looked_at for changed in self.whole.changed)

    def table(self) -> str:
        """Return numbers by task and by pair, findings and verdict as text."""
        width = max(4, *(len(task) for task in self.tasks))
        lines = [f"{'task':<{width}}  length  changed    wins  lacking", *self._task_lines(width)]
        lines += ["", "pair: cosine, agreement in sign, ratio of lengths", *self._pair_lines()]
        for overlap in self.overlaps:
            shares = np.array(overlap.shares)[np.triu_indices(len(self.tasks), 1)]
            if len(shares):
                lines.append(
                    f"directions in {overlap.matrix}: shared {shares.mean():.3f} on average, up to "
                    f"{shares.max():.3f}; by chance {overlap.chance:.3f}"
                )
        for finding in self.findings:
            limit, meaning = THRESHOLDS.get(finding.rule, (None, ""))
            stated = f" [{finding.rule}: {meaning}, {limit:g}]" if limit is not None else ""
            lines.append(f"{'FAULT' if finding.is_fault else 'note'}: {finding.text}{stated}")
        looked = f"{self.whole.num_looked_at:,} of {self.whole.num_elements:,} elements"
        return "\n".join([*lines, f"{self.verdict} ({looked}, {self.seconds:.1f} s)"])

    def _task_lines(self, width: int) -> Iterator[str]:
        for number, task in enumerate(self.tasks):
            yield (
                f"{task:<{width}}  {self.relative_lengths[number]:6.3g}  {self.changed_shares[number]:7.3f}  "
                f"{self.whole.win_shares[number]:6.3f}  {self.whole.lacking_shares[number]:7.3f}"
            )

    def _pair_lines(self) -> Iterator[str]:
        for one, task in enumerate(self.tasks):
            for other in range(one + 1, len(self.tasks)):
                yield (
                    f"{task} and {self.tasks[other]}: {self.whole.cosines[one, other]:.3f}, "
                    f"{self.whole.sign_agreement[one, other]:.3f}, {self.whole.length_ratios[one, other]:.3g}"
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
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


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
    refused = OutputError(
        "not a diagnosis of this version", where=str(path), hint="Run `hub-magmax diagnose` again."
    )
    try:
        return read_json(path.read_bytes(), Diagnosis, refused, ("findings", "numbers"))[0]
    except OSError as error:
        raise refused from error


def _opposed(found: Diagnosis) -> Iterator[Finding]:
    for one, task in enumerate(found.tasks):
        for other in range(one):
            cosine, earlier = found.whole.cosines[one, other], found.tasks[other]
            if cosine < limit_of("opposed"):
                text = f"{task} and {earlier} pull in opposite directions: a cosine of {cosine:.3f}"
                yield Finding("opposed", task, text, False)


def _shares(found: Diagnosis) -> Iterator[Finding]:
    for number, task in enumerate(found.tasks):
        share, lacking = found.whole.win_shares[number], found.whole.lacking_shares[number]
        if len(found.tasks) > 1 and share > limit_of("dominant"):
            text = (
                f"{task} has the largest change in {100 * share:.1f} % of the elements: MAGMAX is almost it"
            )
            yield Finding("dominant", task, text, False)
        if lacking > limit_of("short"):
            text = (
                f"{task} lacks {100 * lacking:.1f} % of its quota among what it wins: "
                "the rest comes from where other tasks change more"
            )
            yield Finding("short", task, text, False)
