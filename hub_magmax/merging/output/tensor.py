"""One tensor of an unfinished file: its place, and its facts for the report."""

from __future__ import annotations

from collections.abc import Sequence

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.stored import Stored
from hub_magmax.merging.output.report import LostPart, ShardRecord
from hub_magmax.merging.output.shard import ShardFile
from hub_magmax.merging.profile import Clock, Progress
from hub_magmax.methods import Rule


class TensorWriter:
    """Writes one tensor of a file in the making, in chunks of any order.

    Args:
        position: Byte of the file at which the tensor begins.
        item_bytes: Of an element.
    """

    def __init__(
        self, file: ShardFile, position: int, item_bytes: int, clock: Clock, progress: Progress
    ) -> None:
        self._file, self._position, self._item_bytes = file, position, item_bytes
        self._clock, self._progress = clock, progress
        self._written: set[int] = set()

    def write(self, start: int, values: Stored) -> None:
        """Write values from an element on, perhaps once more."""
        with self._clock.spend("write"):
            self._file.write(values.content, self._place(start))
        if start not in self._written:
            self._written.add(start)
            self._progress(len(values.content))

    def read_again(self, start: int) -> bytearray:
        """Return the values written from an element on."""
        with self._clock.spend("write"):
            return self._file.read_again(self._place(start))

    def _place(self, start: int) -> int:
        return self._position + start * self._item_bytes


class Tally:
    """Facts about one tensor for the report: selections in it, or its name where a copy is not finite."""

    def __init__(self, num_tasks: int) -> None:
        self.counts = [0] * num_tasks
        self.unaligned = [0] * num_tasks
        self.unchanged = 0
        self.gap: float | None = None
        self.not_finite: list[str] = []
        self.lost: list[LostPart] = []

    def add(self, rule: Rule) -> None:
        for task, count in enumerate(rule.num_unaligned):
            self.unaligned[task] += count
        self.gap = rule.duality_gap

    def include(self, other: Tally) -> None:
        """Add the facts about another tensor."""
        self.counts = [*map(sum, zip(self.counts, other.counts, strict=True))]
        self.unaligned = [*map(sum, zip(self.unaligned, other.unaligned, strict=True))]
        self.unchanged += other.unchanged
        self.gap = max((gap for gap in (self.gap, other.gap) if gap is not None), default=None)
        self.not_finite += other.not_finite

    def count(self, counts: np.ndarray) -> None:
        for task, count in enumerate(counts.tolist()):
            self.counts[task] += count

    def set_apart(self) -> None:
        """Count the elements so far as those of no task: no task changes them."""
        self.unchanged += sum(self.counts)
        self.counts, self.unaligned = [0] * len(self.counts), [0] * len(self.unaligned)


# Complex, and flat: a sum for each field.
def record_of(name: str, file: ShardFile, tallies: Sequence[Tally]) -> ShardRecord:
    """Finish a file whose tensors are all written, and return its record."""
    counts = tuple(map(sum, zip(*(tally.counts for tally in tallies), strict=True)))
    unaligned = tuple(map(sum, zip(*(tally.unaligned for tally in tallies), strict=True)))
    gap = max((tally.gap for tally in tallies if tally.gap is not None), default=None)
    odd = tuple(name for tally in tallies for name in tally.not_finite)
    unchanged = sum(tally.unchanged for tally in tallies)
    lost = tuple(part for tally in tallies for part in tally.lost)
    sha256 = file.finish()
    counted = counts if any(counts) or unchanged else ()
    return ShardRecord(name, file.size_bytes, sha256, counted, unaligned, gap, odd, unchanged, lost)
