"""Published merges made again from their configurations, and compared tensor by tensor.

What others published was computed by other software, so equal bits are the exception: the comparison says for
every tensor whether it is the same, the same up to roundings, or another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hub_magmax.checkpoints.index import TensorInfo
from hub_magmax.checkpoints.opening import open_inputs
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.merging.execution import make_shards, prepare
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import ShardRecord
from hub_magmax.merging.profile import Progress
from hub_magmax.planning.plan import Plan
from hub_magmax.processes import Processes

#: `same statistics` is said of merges that draw at random: as many elements moved, and as far.
Sameness = Literal["same bits", "last bit", "same statistics", "differs"]

_WORST: tuple[Sameness, ...] = ("same bits", "last bit", "same statistics", "differs")

#: Elements of a tensor that are compared at a time.
_BLOCK_ELEMENTS = 2**22

#: Distance between 1 and the next number.
_STEPS: Mapping[str, float] = {"F64": 2**-52, "F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}

#: Roundings in the precision of the other software that an element may be away, relative to the root mean
#: square of its tensor: models, task vectors and sums are rounded.
_ROUNDINGS = 4

#: Part by which the way from the base model, or a statistic of draws, may differ beside standard errors.
_MOST_APART = 0.02


@dataclass(frozen=True)
class TensorComparison:
    """A published tensor beside the one that was made again.

    Attributes:
        name: Of the tensor.
        verdict: How they compare.
        num_elements: In it.
        num_different: Elements that are not equal.
        largest: The largest difference.
        problem: Why they cannot be compared element by element.
    """

    name: str
    verdict: Sameness
    num_elements: int = 0
    num_different: int = 0
    largest: float = 0.0
    problem: str = ""


@dataclass
class Movement:
    """Sums over the ways that both models went from the base model.

    Attributes:
        along, ours, theirs: Products of both ways, and squares of each.
        apart: Squares of their difference.
        lengths: Sums of magnitudes, ours and theirs.
        moved: Elements that are not the base model's, ours and theirs.
        count: Elements.
    """

    along: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    apart: float = 0.0
    lengths: list[float] = field(default_factory=lambda: [0.0, 0.0])
    moved: list[int] = field(default_factory=lambda: [0, 0])
    count: int = 0

    def add(self, ours: Tensor, theirs: Tensor, base: Tensor) -> None:
        """Add elements, in float64."""
        own, other = ours - base, theirs - base
        self.along += float(own @ other)
        self.ours += float(own @ own)
        self.theirs += float(other @ other)
        self.apart += float((own - other) @ (own - other))
        for place, way in enumerate((own, other)):
            self.lengths[place] += float(way.abs().sum())
            self.moved[place] += int(torch.count_nonzero(way))
        self.count += len(own)

    @property
    def share(self) -> float | None:
        """How far the published model went on the way of the one made again; None where that did not move."""
        return self.along / self.ours if self.ours else None

    @property
    def is_as_far(self) -> bool:
        """Whether both went as far, within what roundings leave uncertain."""
        if not self.ours:
            return True
        error = math.sqrt(self.apart / self.ours / max(self.count, 1))
        return abs(self.along / self.ours - 1) <= _MOST_APART + 5 * error

    @property
    def is_alike(self) -> bool:
        """Whether both moved as many elements, as far, and with as much power."""
        room = _MOST_APART + 4 / math.sqrt(max(self.count, 1))
        pairs = (self.lengths, self.moved, [self.ours, self.theirs])
        return all(abs(one - other) <= room * max(one, other) for one, other in pairs)


@dataclass(frozen=True)
class Reproduction:
    """A published merge beside the one made again from its configuration.

    Attributes:
        tensors: In the order of the files that were made.
        verdict: The worst one.
        share: How far the published model went on the way of the one made again; 1 is as far.
        remarks: What a verdict on the whole rests on.
    """

    tensors: tuple[TensorComparison, ...]
    verdict: Sameness
    share: float | None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        return asdict(self)


def reproduce(
    plan: Plan,
    published: TensorSource,
    folder: Path,
    *,
    precision: str = "F32",
    draws: bool = False,
    progress: Progress | None = None,
    cache: SourceCache | None = None,
) -> Reproduction:
    """Merge again, and compare with what was published.

    Each file of the merge is removed once it was compared, so that one of them is on the disk at a time.

    Args:
        plan: Of the configuration's recipe; faults of its checkpoints are no matter here.
        published: The published model.
        folder: Where files are made.
        precision: dtype in which the other software computed, as safetensors writes it.
        draws: Whether elements are drawn at random, so that only statistics can be the same.
        progress: As for `merging.merge`.
        cache: Checkpoints that are open already.

    Raises:
        HubMagmaxError: If the merge cannot be carried out.
    """
    cache = cache or SourceCache()
    place = PartialFolder(folder / "merged", plan.digest)
    if (refusal := prepare(place, plan, cache)) is not None:
        raise refusal
    with ExitStack() as stack:
        stack.callback(place.remove)
        sources = stack.enter_context(open_inputs(plan.recipe, plan.lock, cache))
        shards = _ComparedShards(place, published, sources["base_model"], _STEPS[precision], draws=draws)
        make_shards(plan, sources, place, shards, progress, None, Processes())
    return shards.result()


class _ComparedShards:
    """Compares finished files with the published tensors, and removes them."""

    num_open = 1

    def __init__(
        self,
        place: PartialFolder,
        published: TensorSource,
        base: TensorSource,
        working: float,
        *,
        draws: bool,
    ) -> None:
        self._place, self._published, self._base = place, published, base
        self._working, self._draws = working, draws
        self._movement = Movement()
        self._found: list[TensorComparison] = []

    def intact(self, file: str) -> ShardRecord | None:
        return None

    def record(self, record: ShardRecord) -> None:
        path = self._place.folder / record.file
        with closing(LocalSource(self._place.folder, "merged again", record.file)) as made:
            for name, info in made.index.tensors.items():
                self._found.append(self._compared(made, name, info))
        path.unlink()

    def _compared(self, made: TensorSource, name: str, info: TensorInfo) -> TensorComparison:
        problem = _problem(info, self._published.index.tensors.get(name))
        if problem:
            return TensorComparison(name, "differs", info.num_elements, problem=problem)
        step = _STEPS.get(info.dtype, 0.0)
        sums = _Sums(step, self._working * _root_mean_square(made, info) if step else 0.0)
        own = self._base.index.tensors.get(name)
        has_base = step and own is not None and own.shape == info.shape
        for start, stop in _blocks(info):
            ours, theirs = made.read(name, start, stop), self._published.read(name, start, stop)
            sums.add(ours, theirs)
            if has_base:
                base = self._base.read(name, start, stop)
                self._movement.add(ours.double(), theirs.double(), base.double())
        # Of elements that are drawn only the whole is judged, at the end.
        verdict = "same statistics" if sums.verdict == "differs" and self._draws else sums.verdict
        return TensorComparison(name, verdict, info.num_elements, sums.num_different, sums.largest)

    def result(self) -> Reproduction:
        """Return the comparison of everything."""
        made = {one.name for one in self._found}
        more = [
            TensorComparison(name, "differs", info.num_elements, problem="published, and not made again")
            for name, info in self._published.index.tensors.items()
            if name not in made
        ]
        tensors = (*self._found, *more)
        verdict: Sameness = max((one.verdict for one in tensors), key=_WORST.index, default="differs")
        remarks = tuple(self._remarks(verdict))
        return Reproduction(tensors, "differs" if remarks else verdict, self._movement.share, remarks)

    def _remarks(self, verdict: Sameness) -> Iterator[str]:
        """Yield what sums over all tensors show, where single elements are within roundings or are drawn."""
        found = self._movement
        if verdict == "last bit" and not found.is_as_far:
            yield f"it went {found.share:.3g} times as far from the base model as the configuration says"
        if verdict == "same statistics" and not found.is_alike:
            lengths, moved = found.lengths, found.moved
            yield (
                f"{moved[1] / found.count:.3g} of the elements moved, by {lengths[1]:.4g} in all; the "
                f"configuration gives {moved[0] / found.count:.3g}, by {lengths[0]:.4g}"
            )


def _problem(info: TensorInfo, other: TensorInfo | None) -> str:
    """Return why a tensor and the published one cannot be compared; empty where they can be."""
    if other is None:
        return "not published"
    if info.shape != other.shape:
        return f"shape {[*other.shape]} was published, and the merge gives {[*info.shape]}"
    if info.dtype != other.dtype:
        return f"dtype {other.dtype} was published, and the merge gives {info.dtype}"
    return ""


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield the bounds of parts of a tensor."""
    for start in range(0, info.num_elements, _BLOCK_ELEMENTS):
        yield start, min(start + _BLOCK_ELEMENTS, info.num_elements)


def _root_mean_square(source: TensorSource, info: TensorInfo) -> float:
    squares = 0.0
    for start, stop in _blocks(info):
        values = source.read(info.name, start, stop).double()
        squares += float(values @ values)
    return math.sqrt(squares / max(info.num_elements, 1))


@dataclass
class _Sums:
    """Differences of one tensor.

    Attributes:
        step: Between numbers of its dtype near 1; 0 for integers.
        rounding: The same in the precision of the other software, at the root mean square of the tensor.
    """

    step: float
    rounding: float
    num_different: int = 0
    num_beyond: int = 0
    largest: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Add elements."""
        bits = [values.view(torch.uint8).view(len(values), -1) for values in (ours, theirs)]
        self.num_different += int((bits[0] != bits[1]).any(dim=1).sum())
        if not self.step:
            self.num_beyond = self.num_different
            return
        one, other = ours.double(), theirs.double()
        apart = (one - other).abs()
        # The step at a number is that at 1 times its power of two, and frexp counts from one half.
        power = torch.frexp(torch.maximum(one.abs(), other.abs())).exponent - 1
        room = torch.ldexp(torch.full_like(one, self.step), power) + _ROUNDINGS * self.rounding
        self.num_beyond += int((~(apart <= room)).sum())
        self.largest = max([self.largest, *apart.max(dim=0, keepdim=True).values.tolist()])

    @property
    def verdict(self) -> Sameness:
        if not self.num_different:
            return "same bits"
        return "differs" if self.num_beyond else "last bit"
