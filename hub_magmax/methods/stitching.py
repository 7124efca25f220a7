"""Methods that take an element from the tasks that changed it, and average only where several did."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hub_magmax.kernels.lazy_imports import np
from hub_magmax.kernels.ops import CLIPPED, STITCHED
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule
from hub_magmax.methods.sparse import Densities, NewRounding, Scope, trimmed_ranks
from hub_magmax.options import PerTask

if TYPE_CHECKING:
    from jaxtyping import Float32

    from hub_magmax.methods.chunks import Chunks

_LOCALIZE_STITCH = Paper(
    "2408.13656",
    "localizestitch",
    "He, Yifei",
    2024,
    "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
)
_RAM = Paper(
    "2601.13572",
    "reinforcedagentmerging",
    "Yuan, Xiangchi",
    2026,
    "Behavior Knowledge Merge in Reinforced Agentic Models",
)

#: A magnitude up to which an element counts as unchanged, for each task.
Epsilons = Annotated[tuple[float, ...], PerTask(Annotated[float, Field(ge=0, allow_inf_nan=False)])]
#: A magnitude, for each task.
Limits = Annotated[tuple[float, ...], PerTask(Annotated[float, Field(gt=0, allow_inf_nan=False)])]
Boost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@merge_method(
    "localize_stitch",
    source=_LOCALIZE_STITCH,
    scaling=1.0,
    form="rule",
    held_bytes=None,
    uses=preferred,
)
def localize_stitch(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    density: Densities = (0.4,),
    rounding: NewRounding = "up",
    scope: Scope = "tensor",
) -> Rule:
    """Keep the largest magnitudes of each task vector, and average where several tasks keep an element.

    Each task vector is trimmed as by `ties`. What one task alone keeps is taken from it as it is; what
    several keep is their mean, weighted by the preference; the rest is zero, and so are zeros that would be
    kept. Uniform preference and the scope `model` give Localize-and-Stitch without data as published (He et
    al. 2024). A preference for one task alone returns its vector, trimmed.
    """
    from hub_magmax.methods.thresholds import magnitude_thresholds

    ranks = trimmed_ranks(chunks.num_elements, density, rounding)
    numbers = np.ones(chunks.num_tasks, np.float32), np.array(preference, np.float32)

    def rule_of(thresholds: "np.ndarray") -> Rule:
        return Rule(STITCHED, per_task=(thresholds[0], *numbers))

    return rule_of(magnitude_thresholds(chunks, ranks, rule_of))


@merge_method("ram", source=_RAM, scaling=1.0, form="rule", uses=preferred, in_comparison=())
def ram(chunks: "Chunks", *, preference: tuple[float, ...], epsilon: Epsilons = (1e-5,)) -> Rule:
    """Take what one task alone changed from it, and average what several changed.

    A task has changed an element whose magnitude is above `epsilon`. The preference weights the average;
    uniform preference gives RAM as published. A preference for one task alone returns its vector, without the
    magnitudes up to `epsilon`.
    """
    return _changed_rule(epsilon, np.ones(chunks.num_tasks), preference)


@merge_method("ram_plus", source=_RAM, scaling=1.0, form="rule", uses=preferred, in_comparison=())
def ram_plus(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    epsilon: Epsilons = (1e-5,),
    boost: Boost = 0.1,
    boost_limit: Boost = 0.2,
    scope: Scope = "tensor",
) -> Rule:
    """Merge as `ram` does, and enlarge what a task alone changed, the more of its changes others share.

    Of the elements that a task changed, some are its own and some shared with other tasks that have a
    preference. Its own ones are multiplied by 1 + `boost` · min(shared / own, `boost_limit`), counted in the
    tensor or, with the scope `model`, in all merged tensors. The preference weights the average of shared
    ones; uniform preference gives RAM+ by tensor, as mergekit has it.
    """
    from hub_magmax.methods.chunks import blocks

    counts = np.zeros((2, chunks.num_tasks), np.int64)
    least, is_wanted = _above(epsilon)[:, None], np.array(preference)[:, None] > 0
    for _, vectors in blocks(chunks):
        is_changed = (np.abs(vectors) >= least) & is_wanted
        is_alone = is_changed.sum(axis=0, dtype=np.uint8) == 1
        alone = (is_changed & is_alone).sum(axis=1)
        counts += alone, is_changed.sum(axis=1) - alone
    own, shared = counts
    factors = 1 + boost * np.minimum(shared / np.maximum(own, 1), boost_limit)
    return _changed_rule(epsilon, factors, preference)


@merge_method(
    "nearswap",
    source="alchemonaut/QuartetAnemoi-70B-t0.0001",
    scaling=1.0,
    form="rule",
    uses=preferred,
    in_comparison=(),
)
def nearswap(chunks: "Chunks", *, preference: tuple[float, ...], limit: Limits = (1e-4,)) -> Rule:
    """Lower every magnitude above `limit` to it, and average.

    So an element that a task changed by less is taken as it is, and one that it changed by more moves by
    `limit`. The preference weights the average. With one task, or a preference for it alone, it is NearSwap
    as its author published it, whose t is `limit`, .0001 by default.
    """
    return Rule(CLIPPED, per_task=(np.array(limit, np.float32), np.array(preference, np.float32)))


def _changed_rule(epsilon: tuple[float, ...], factors: "np.ndarray", preference: tuple[float, ...]) -> Rule:
    """Return the rule by which magnitudes above `epsilon` are kept."""
    numbers = _above(epsilon), factors.astype(np.float32), np.array(preference, np.float32)
    return Rule(STITCHED, per_task=numbers)


def _above(epsilon: tuple[float, ...]) -> "Float32[np.ndarray, ' tasks']":
    """Return the least float32 numbers above some numbers."""
    nearest = np.array(epsilon, np.float32)
    return np.where(nearest.astype(np.float64) > epsilon, nearest, np.nextafter(nearest, np.float32(np.inf)))
