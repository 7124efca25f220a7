"""Methods that weigh the tasks of an element, or of a tensor, by what they changed (SCE, PCB-Merging)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import BALANCED, SELECTED_TIES
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule
from hub_magmax.methods.sparse import Densities, Density, NewRounding, Scope, share_of, trimmed_ranks
from hub_magmax.options import AddedLater

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float32

    from hub_magmax.kernels.backend import Backend
    from hub_magmax.kernels.chunk import RawChunk
    from hub_magmax.methods.chunks import Chunks

T = TypeVar("T")

_PCB = Paper(
    "2410.02396", "pcbmerging", "Du, Guodong", 2024, "Parameter Competition Balancing for Model Merging"
)
_SCE = Paper("2408.07990", "fusechat", "Wan, Fanqi", 2024, "{FuseChat}: Knowledge Fusion of Chat Models")


@merge_method("sce", source=_SCE, scaling=1.0, form="rule", held_bytes=4, uses=preferred, in_comparison=())
def sce(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    density: Density = 1.0,
    rounding: NewRounding = "up",
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False), AddedLater()] = 0.0,
) -> Rule:
    """Select the elements on which the tasks differ most, and average by energy the tasks that agree in sign.

    Of the elements on which the tasks differ at all, the `density` with the largest variances between tasks
    is selected. A sign is elected for each, and the tasks that have it are averaged, weighted by the sum of
    the squares of all their selected elements of the tensor. The preference multiplies the votes and these
    sums; uniform preference gives SCE as released (Wan et al. 2024). A preference for one task alone returns
    its vector: it differs from no other. Where the sums of the tasks, divided by the number of elements, add
    up to less than `floor`, the preference alone weighs the average; mergekit's floor is 1e-6.
    """
    active = np.flatnonzero(preference)
    spread, least = _selection(chunks, active, density if len(active) > 1 else 1.0, rounding)
    energies = square_sums(chunks, spread, least)
    is_low = energies[active].sum() < floor * chunks.num_elements
    energies = np.array(preference) if is_low else energies * preference
    weights = energies / (energies.sum() or 1.0)
    everything = np.uint8(255)

    def selected(start: int, count: int) -> "tuple[np.ndarray]":
        is_selected = np.ones(count, bool) if spread is None else spread[start : start + count] >= least
        bits = np.where(is_selected, everything, np.uint8(0))
        return (np.tile(bits, (-(-chunks.num_tasks // 8), 1)).T,)

    numbers = weights.astype(np.float32), np.array(preference, np.float32)
    return Rule(SELECTED_TIES, per_element=selected, per_task=numbers)


@merge_method("pcb", source=_PCB, scaling=1.0, form="rule", held_bytes=None, uses=preferred, in_comparison=())
def pcb(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    density: Densities = (0.1,),
    scope: Scope = "tensor",
) -> Rule:
    """Average by scores: how large an element is within its task, and how much it agrees with other tasks.

    The score of a task is exp(N z²) · tanh(τ_t Σ τ_s), where z is the magnitude on the way from the smallest
    to the largest of its task, from 0 to 1, and N the number of tasks; a task that opposes the sum of all has
    none. Of the scores of a task the `density` of the largest count, by how far they are above the smallest
    of these, and weigh the average. The preference multiplies the scores, and the task vectors in the sum;
    uniform preference and the scope `model` give PCB-Merging as published (Du et al. 2024).
    """
    from hub_magmax.methods.thresholds import magnitude_thresholds

    size, active = chunks.num_elements, np.count_nonzero(preference)
    outside = size // _OUTSIDE
    most, least = magnitude_thresholds(
        chunks, np.full((chunks.num_tasks, 2), (outside + 1, size - outside)).T
    )
    multipliers = np.array([active * weight for weight in preference], np.float32)
    numbers = np.stack([least, most, multipliers])
    kept = trimmed_ranks(size, density)
    top, threshold = magnitude_thresholds(
        _Scored(chunks, numbers), np.concatenate([np.ones_like(kept), kept])
    )
    weights = np.array(preference, np.float32)
    return Rule(BALANCED, per_task=(least, most, threshold, top, multipliers, weights))


#: Of so many magnitudes of a task the largest one is lowered to the next, and the smallest one raised.
_OUTSIDE = 10_000


@dataclass(frozen=True)
class _Scored:
    """The scores of a tensor's elements, as rules read task vectors."""

    chunks: "Chunks"
    numbers: "Float32[np.ndarray, '3 tasks']"

    @property
    def num_tasks(self) -> int:
        return self.chunks.num_tasks

    @property
    def num_elements(self) -> int:
        return self.chunks.num_elements

    @property
    def backend(self) -> "Backend":
        return self.chunks.backend

    def runs(self, length: int, every: int) -> "Float32[np.ndarray, 'tasks in_runs']":
        from hub_magmax.kernels.chunk import RawChunk

        return self.backend.scores(RawChunk.of_vectors(self.chunks.runs(length, every)), self.numbers)

    def map(
        self, work: "Callable[[Iterator[tuple[int, RawChunk]]], T]", *, is_early: bool = False
    ) -> "Iterator[T]":
        from hub_magmax.kernels.chunk import RawChunk

        def scored(part: "Iterator[tuple[int, RawChunk]]") -> "Iterator[tuple[int, RawChunk]]":
            for start, chunk in part:
                yield start, RawChunk.of_vectors(self.backend.scores(chunk, self.numbers))

        return self.chunks.map(lambda part: work(scored(part)))


def _selection(
    chunks: "Chunks", active: "np.ndarray", density: float, rounding: str
) -> "tuple[Float32[np.ndarray, ' elements'] | None, np.float32]":
    """Return how far the tasks differ on each element, and from where on it is selected; None for all."""
    from hub_magmax.methods.chunks import ArrayChunks
    from hub_magmax.methods.thresholds import magnitude_thresholds

    if density == 1:
        return None, np.float32(0)
    spread = chunks.scratch.zeros(chunks.num_elements, np.float32)

    def write(part: "Iterator[tuple[int, RawChunk]]") -> int:
        differing = 0
        for start, chunk in part:
            own = spread[start : start + chunk.num_elements]
            chunks.backend.spreads(chunk, active, own)
            differing += int(np.count_nonzero(own))
        return differing

    wanted = share_of(sum(chunks.map(write)), density, rounding)
    held = ArrayChunks(spread[None], backend=chunks.backend)
    return spread, magnitude_thresholds(held, np.array([[wanted]]))[0, 0]


def square_sums(
    chunks: "Chunks",
    spread: "Float32[np.ndarray, ' elements'] | None" = None,
    least: "np.float32 | float" = 0.0,
) -> "np.ndarray":
    """Return by task the sum of the squares of the elements of a tensor whose spread is at least `least`.

    Added in float64 in a fixed order, and rounded once. Values that are not finite give sums that are not.
    Without spreads every element counts.
    """
    from hub_magmax.kernels.spreads import BLOCK

    def sums(part: "Iterator[tuple[int, RawChunk]]") -> "list[np.ndarray]":
        found = []
        for start, chunk in part:
            size = chunk.num_elements
            own = np.zeros(size, np.float32) if spread is None else spread[start : start + size]
            found.append(np.empty((chunks.num_tasks, -(-size // BLOCK))))
            chunks.backend.square_sums(chunk, own, np.float32(least), found[-1])
        return found

    shares = chunks.map(sums, multiple_of=BLOCK)
    blocks = np.concatenate([one for share in shares for one in share], axis=1)
    return np.array([math.fsum(row) for row in blocks.tolist()])
