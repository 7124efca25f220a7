"""Methods that keep a part of each task vector, and add or average what is left."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import (
    BAND,
    BAND_TIES,
    BAND_TIES_SUM,
    DROPPED,
    DROPPED_TIES,
    DROPPED_TIES_SUM,
    RESCALED_TIES,
    TIES,
    TIES_SUM,
    Op,
)
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule
from hub_magmax.options import AddedLater, PerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float32, Int64

    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.methods.chunks import Chunks

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
#: A share of each task's elements.
Densities = Annotated[tuple[float, ...], PerTask(Density)]
Outliers = Annotated[tuple[float, ...], PerTask(Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)])]
Scope = Literal["tensor", "model"]
#: What becomes of the tasks that agree with the elected sign: their mean, or the sum of their multiples.
NewConsensus = Literal["mean", "sum"]
Consensus = Annotated[NewConsensus, AddedLater()]
#: How a share of n elements becomes a number of elements where it is none; `down` as mergekit computes it.
NewRounding = Literal["up", "down"]
Rounding = Annotated[NewRounding, AddedLater()]
#: What kept elements are multiplied by: the share of the vector's sum of magnitudes that is left, or 1.
Rescale = Annotated[Literal["norm", "none"], AddedLater()]


_TIES = Paper(
    "2306.01708",
    "tiesmerging",
    "Yadav, Prateek",
    2023,
    "{TIES}-Merging: Resolving Interference When Merging Models",
)
_DARE = Paper(
    "2311.03099",
    "dare",
    "Yu, Le",
    2023,
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
)
_BREADCRUMBS = Paper(
    "2312.06795",
    "breadcrumbs",
    "Davari, MohammadReza",
    2023,
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
)


@merge_method("ties", source=_TIES, scaling=1.0, form="rule", held_bytes=None, uses=preferred)
def ties(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    multipliers: tuple[float, ...],
    density: Densities = (0.2,),
    consensus: Consensus = "mean",
    rounding: Rounding = "up",
    rescale: Rescale = "none",
    scope: Scope = "tensor",
) -> Rule:
    """Average, or add, per element, the tasks that agree with the sign elected by weighted mass.

    Each task vector is first trimmed to the `density` of its largest magnitudes in the tensor or, with the
    scope `model`, in all merged tensors: `ceil(density · n)` elements, or with the rounding `down` the floor
    but at least one, and everything that ties with the smallest of them. The preference weights both the
    election and the average; uniform preference and the scope `model` give TIES as published (Yadav et al.
    2023). With the consensus `sum` the task vectors are multiplied as by `task_arithmetic`, and what has the
    elected sign then is added. With the rescaling `norm`, which is mergekit's, all that a task keeps is
    multiplied by one number, so that the sum of the magnitudes stays what it was.
    """
    from hub_magmax.methods.thresholds import magnitude_thresholds

    ranks = trimmed_ranks(chunks.num_elements, density, rounding)
    op, numbers = (TIES, preference) if consensus == "mean" else (TIES_SUM, multipliers)
    weights = np.array(numbers, np.float32)
    if rescale == "norm":
        (least,) = magnitude_thresholds(chunks, ranks)
        rescaled = _restored(chunks, numbers, least, np.full_like(least, np.inf))
        if consensus == "sum":
            return Rule(TIES_SUM, per_task=(least, rescaled))
        return Rule(RESCALED_TIES, per_task=(least, weights, rescaled))

    def rule_of(thresholds: "np.ndarray") -> Rule:
        return Rule(op, per_task=(thresholds[0], weights))

    return rule_of(magnitude_thresholds(chunks, ranks, rule_of))


@merge_method("dare", source=_DARE, scaling=0.3, form="rule", uses=preferred)
def dare(
    chunks: "Chunks",
    *,
    multipliers: tuple[float, ...],
    generator: "CounterGenerator",
    density: Densities = (0.8,),
) -> Rule:
    """Drop elements of each task vector at random, rescale the rest, and add as `task_arithmetic` does.

    Each element of each task is kept with probability `density` and divided by it, or else zero; the
    probability is rounded up to a multiple of 2**-32. On average over seeds this is `task_arithmetic` with
    the same preference, which a density of 1 gives bit for bit. What is drawn for a task depends neither on
    the other tasks nor on the preference. Uniform preference multiplies every vector by one, which is DARE
    with task arithmetic as published (Yu et al. 2023); the default is the drop rate of 0.2 of their
    released code.
    """
    draw = _draw(chunks, density, generator)
    return Rule(DROPPED, draw, (np.array(_rescaled(multipliers, density), np.float32),))


@merge_method("dare_ties", source=_DARE, scaling=1.0, form="rule", uses=preferred)
def dare_ties(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    multipliers: tuple[float, ...],
    generator: "CounterGenerator",
    density: Densities = (0.8,),
    consensus: Consensus = "mean",
) -> Rule:
    """Drop elements of each task vector at random, rescale the rest, and average as `ties` without trimming.

    Elements are kept as by `dare`. The preference weights both the election of the sign and the average;
    uniform preference gives DARE with the election and the disjoint mean of TIES. A density of 1 is `ties`
    with a density of 1, bit for bit. With the consensus `sum` the task vectors are multiplied as by `dare`,
    and what has the elected sign then is added.
    """
    from hub_magmax.methods import draws

    draw, highest = _draw(chunks, density, generator), draws.probability(max(density))
    # What is elected and added is multiplied by the rescaling relative to the least one, and the rest comes
    # afterwards, so that equal opposite masses cancel where all densities are the same.
    relative = [highest / draws.probability(one) for one in density]
    op, numbers = (DROPPED_TIES, preference) if consensus == "mean" else (DROPPED_TIES_SUM, multipliers)
    weights = [number * factor for number, factor in zip(numbers, relative, strict=True)]
    rest = _rescaled(numbers, density) if consensus == "sum" else [number * highest for number in numbers]
    return Rule(op, draw, (np.array(rest, np.float32), np.array(weights, np.float32)))


def _rescaled(numbers: tuple[float, ...], density: tuple[float, ...]) -> list[float]:
    """Divide the number of each task by the probability with which its elements are kept."""
    from hub_magmax.methods import draws

    return [number / draws.probability(one) for number, one in zip(numbers, density, strict=True)]


def _draw(
    chunks: "Chunks", density: tuple[float, ...], generator: "CounterGenerator"
) -> "Callable[[int, int], tuple[np.ndarray]]":
    from hub_magmax.methods import draws

    def draw(start: int, count: int) -> "tuple[np.ndarray]":
        return (draws.draw_kept(start, count, density, generator, chunks.backend),)

    return draw


@merge_method("breadcrumbs", source=_BREADCRUMBS, scaling=0.3, form="rule", held_bytes=None, uses=preferred)
def breadcrumbs(
    chunks: "Chunks",
    *,
    multipliers: tuple[float, ...],
    density: Densities = (0.15,),
    outliers: Outliers = (0.006,),
    rounding: Rounding = "up",
    rescale: Rescale = "none",
    scope: Scope = "tensor",
) -> Rule:
    """Remove the largest and the small magnitudes of each task vector, and add as `task_arithmetic` does.

    Of the n magnitudes of a task in the tensor or, with the scope `model`, in all merged tensors, the largest
    `floor(outliers · n)` are removed, and of the rest the largest `ceil(density · n)` are kept (with the
    rounding `down` the floor), or all where there are fewer. Magnitudes that equal the largest or the
    smallest kept one are kept as well, so ties keep more. A density of 1 without outliers is
    `task_arithmetic`, bit for bit. With the rescaling `norm`, which is mergekit's, what is kept is multiplied
    as by `ties`. Uniform preference multiplies every vector by one, which is Model
    Breadcrumbs as published (Davari and Belilovsky 2023), tensor by tensor; the released code masks each
    row of a matrix by itself. The defaults are where that code begins its search.
    """
    from hub_magmax.methods.thresholds import magnitude_thresholds

    ranks = _banded_ranks(chunks.num_elements, density, outliers, rounding)
    if rescale == "norm":
        most, least = magnitude_thresholds(chunks, ranks)
        return Rule(BAND, per_task=(least, most, _restored(chunks, multipliers, least, most)))
    return _banded(chunks, BAND, multipliers, ranks)


@merge_method(
    "breadcrumbs_ties",
    source=_BREADCRUMBS,
    scaling=1.0,
    form="rule",
    held_bytes=None,
    uses=preferred,
    in_comparison=(),
)
def breadcrumbs_ties(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    multipliers: tuple[float, ...],
    density: Densities = (0.15,),
    outliers: Outliers = (0.006,),
    consensus: NewConsensus = "mean",
    rounding: NewRounding = "up",
    scope: Scope = "tensor",
) -> Rule:
    """Keep of each task vector what `breadcrumbs` keeps, and average or add as `ties` does after trimming.

    The preference weights both the election of the sign and the average, or multiplies what is added. A
    density of 1 without outliers is `ties` with a density of 1, bit for bit. The combination is mergekit's,
    which adds unless it is told to normalize.
    """
    op, numbers = (BAND_TIES, preference) if consensus == "mean" else (BAND_TIES_SUM, multipliers)
    return _banded(chunks, op, numbers, _banded_ranks(chunks.num_elements, density, outliers, rounding))


def _banded(
    chunks: "Chunks", op: "Op", numbers: tuple[float, ...], ranks: "Int64[np.ndarray, 'ranks tasks']"
) -> Rule:
    """Return the rule of an operation on the magnitudes between two ranks."""
    from hub_magmax.methods.thresholds import magnitude_thresholds

    factors = np.array(numbers, np.float32)

    def rule_of(thresholds: "np.ndarray") -> Rule:
        most, least = thresholds
        return Rule(op, per_task=(least, most, factors))

    return rule_of(magnitude_thresholds(chunks, ranks, rule_of))


def _restored(
    chunks: "Chunks",
    numbers: tuple[float, ...],
    least: "Float32[np.ndarray, ' tasks']",
    most: "Float32[np.ndarray, ' tasks']",
) -> "Float32[np.ndarray, ' tasks']":
    """Return numbers by task, times what restores the sum of magnitudes of which a band is kept."""
    from hub_magmax.methods.rescaling import norm_factors, restored

    return restored(numbers, norm_factors(chunks, least, most))


def trimmed_ranks(
    num_elements: int, density: tuple[float, ...], rounding: str = "up", **others: str
) -> "Int64[np.ndarray, 'ranks tasks']":
    """Return the rank of the smallest magnitude that is kept, for each task."""
    return np.array([[max(1, share_of(num_elements, one, rounding)) for one in density]])


def _banded_ranks(
    num_elements: int,
    density: tuple[float, ...],
    outliers: tuple[float, ...],
    rounding: str = "up",
    **others: str,
) -> "Int64[np.ndarray, 'ranks tasks']":
    """Return the ranks of the largest and of the smallest magnitude that are kept, for each task."""
    ranks = []
    for kept, removed in zip(density, outliers, strict=True):
        first = math.floor(_as_written(removed) * num_elements)
        if rounding == "down":
            first = int(removed * num_elements)
        ranks.append((first + 1, first + share_of(num_elements, kept, rounding)))
    found: Int64[np.ndarray, "ranks tasks"] = np.minimum(np.array(ranks).T, num_elements)
    return found


def share_of(num_elements: int, share: float, rounding: str) -> int:
    """Return a share of some elements as a number: of the decimal as written, or of the binary number."""
    return math.ceil(_as_written(share) * num_elements) if rounding == "up" else int(share * num_elements)


#: The ranks of the thresholds of methods that have some, by number of elements and options for each task.
RANKS: "Mapping[str, Callable[..., Int64[np.ndarray, 'ranks tasks']]]" = {
    "ties": trimmed_ranks,
    "breadcrumbs": _banded_ranks,
    "breadcrumbs_ties": _banded_ranks,
    "localize_stitch": trimmed_ranks,
}


def _as_written(share: float) -> Fraction:
    """Return the decimal: 0.07 of 100 is 7, though the nearest float to 0.07 lies above it."""
    return Fraction(repr(share))
