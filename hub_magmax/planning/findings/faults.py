"""Rules that tell faulty checkpoints by inner products of the base model and the task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hub_magmax.planning.findings.finding import Finding, unchanged

#: Limits of the rules, each with its meaning in words, which a diagnosis states.
THRESHOLDS: Mapping[str, tuple[float, str]] = {
    "other base": (0.5, "matrices have a cosine below this with the base model's"),
    "swapped": (
        0.9,
        "a tensor correlates above this with another tensor of the base model, and not with its own",
    ),
    "scaled": (
        2.0,
        "weights are longer than the base model's by more than this factor, or shorter",
    ),
    "long": (10.0, "a task vector is longer than the middle one by more than this factor"),
    "uneven": (2.0, "the longest task vector is longer than the shortest by more than this factor"),
    "near-identical": (0.999, "two task vectors have a cosine above this"),
    "opposed": (-0.1, "two task vectors have a cosine below this"),
    "dominant": (0.9, "a task wins more than this share of the elements under MAGMAX"),
    "short": (0.25, "a task lacks more than this share of its quota among the elements it wins"),
}

#: Elements by which directions are judged at least: those of two unrelated vectors this long have a cosine of
#: a tenth by chance.
_FEWEST_ELEMENTS = 100

#: Part by which the lengths of the task vectors of one checkpoint, saved twice, differ at most.
_SAME_LENGTH = 0.01

#: Length of zeros beside the base model's, from sums that are rounded.
_ZERO = 1e-3

#: Rows of numbers.
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Swap:
    """A tensor of a checkpoint that looks like another tensor of the base model."""

    task: str
    tensor: str
    looks_like: str


@dataclass(frozen=True)
class Geometry:
    """Inner products of the base model and the task vectors over some elements.

    Attributes:
        num_looked_at: How many elements.
        products: The base model first.
    """

    num_looked_at: int
    products: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Norms of the task vectors."""
        return np.asarray(np.sqrt(np.diag(self.products)[1:]))

    @property
    def cosines(self) -> np.ndarray:
        """Between every two task vectors; 0 where one of them is zero."""
        return ratio(self.products[1:, 1:], np.outer(self.lengths, self.lengths))

    @property
    def to_base(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosine of each checkpoint with the base model, and how many times as long it is."""
        base = self.products[0, 0]
        along = base + self.products[0, 1:]
        lengths = np.sqrt(np.maximum(base + 2 * self.products[0, 1:] + self.lengths**2, 0))
        return ratio(along, lengths * np.sqrt(base)), ratio(lengths, np.full(len(along), np.sqrt(base)))


@dataclass(frozen=True)
class Evidence:
    """What the rules judge by.

    Attributes:
        tasks: In order.
        whole: Over everything that was looked at.
        matrices: Over what has two dimensions or more; everything if nothing has.
        unchanged: By task, whether every tensor is the base model's.
        swaps: Tensors in the place of another.
    """

    tasks: tuple[str, ...]
    whole: Geometry
    matrices: Geometry
    unchanged: tuple[bool, ...]
    swaps: tuple[Swap, ...] = ()


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return quotients, 0 where the divisor is not positive."""
    return np.asarray(np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0))


def limit_of(rule: str) -> float:
    """Return the limit of a rule."""
    return THRESHOLDS[rule][0]


def faults(seen: Evidence) -> Iterator[Finding]:
    """Yield what should not be merged: of each task the first that applies, then tasks that are the same."""
    found = [
        fault for number, task in enumerate(seen.tasks) for fault in islice(_apply(seen, number, task), 1)
    ]
    yield from found
    if seen.whole.num_looked_at < _FEWEST_ELEMENTS:
        return
    if seen.whole.products[0, 0] == 0:
        yield Finding("zeros", "base_model", "the base model holds nothing but zeros", True)
    suspects = {fault.task for fault in found}
    yield from _copies(seen, suspects)


def _copies(seen: Evidence, suspects: Set[str]) -> Iterator[Finding]:
    """Yield tasks that are like an earlier one: of many copies, each once."""
    for later in range(len(seen.tasks)):
        found: list[Finding] = []
        for earlier in range(later):
            # Task vectors of a wrong base model are alike because that is wrong.
            if not {seen.tasks[earlier], seen.tasks[later]} <= suspects:
                found += _alike(seen, earlier, later)
        yield from sorted(found, key=lambda finding: not finding.is_fault)[:1]


def _alike(seen: Evidence, one: int, other: int) -> Iterator[Finding]:
    """Yield that two tasks are the same, or that one is the other further on the same way."""
    earlier, later = seen.tasks[one], seen.tasks[other]
    cosine, lengths = seen.whole.cosines[one, other], seen.whole.lengths
    if cosine > limit_of("near-identical"):
        times = lengths[other] / lengths[one]
        is_same = abs(times - 1) < _SAME_LENGTH
        text = f"{later} is almost {earlier}: their task vectors have a cosine of {cosine:.5f}"
        yield Finding(
            "near-identical", later, text if is_same else f"{text}, its is {times:.3g} times as long", is_same
        )


# Complex, and flat: one branch for each rule.
def _apply(seen: Evidence, number: int, task: str) -> Iterator[Finding]:
    """Yield what speaks against one task, the plainest first."""
    if seen.unchanged[number]:
        yield unchanged(task)
    if any(swap.task == task for swap in seen.swaps):
        yield _swap_finding(seen, task)
    cosine, times = (float(found[number]) for found in seen.matrices.to_base)
    if seen.matrices.num_looked_at >= _FEWEST_ELEMENTS and seen.matrices.products[0, 0] > 0:
        if times < _ZERO:
            yield Finding("zeros", task, f"{task} holds nothing but zeros", True)
        if not 1 / limit_of("scaled") <= times <= limit_of("scaled"):
            text = f"{task} has weights {times:.3g} times as long as the base model's: scaled?"
            yield Finding("scaled", task, text, True)
        if cosine < limit_of("other base"):
            text = (
                f"{task} has a cosine of {cosine:.3f} with the base model: "
                "it looks like it was fine-tuned from another one"
            )
            yield Finding("other base", task, text, True)
    middle, length = float(np.median(seen.whole.lengths)), float(seen.whole.lengths[number])
    if len(seen.tasks) > 2 and middle > 0 and length > limit_of("long") * middle:
        text = (
            f"the task vector of {task} is {length / middle:.3g} times as long as the middle one: "
            "scaled, or trained much longer?"
        )
        yield Finding("long", task, text, True)


def _swap_finding(seen: Evidence, task: str) -> Finding:
    swaps = [swap for swap in seen.swaps if swap.task == task]
    named = "; ".join(
        f"{swap.tensor} holds what is {swap.looks_like} in the base model" for swap in swaps[:4]
    )
    more = f"; and {len(swaps) - 4} more" if len(swaps) > 4 else ""
    return Finding("swapped", task, f"{task} has tensors in the wrong place: {named}{more}", True)
