"""Methods that pick a task for every element without looking at the values."""

from typing import TYPE_CHECKING

from hub_magmax.methods.magmax import MAGMAX
from hub_magmax.methods.registry import merge_method, preferred
from hub_magmax.methods.rules import Rule

if TYPE_CHECKING:
    import numpy as np

    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.methods.chunks import Chunks


@merge_method("random_mix", source=MAGMAX, scaling=1.0, form="rule", uses=preferred)
def random_mix(chunks: "Chunks", *, preference: tuple[float, ...], generator: "CounterGenerator") -> Rule:
    """Take each element from a task drawn with the preference as probabilities.

    Uniform preference gives every task the same chance. A weight of zero never wins.
    """
    from hub_magmax.kernels.ops import CHOSEN
    from hub_magmax.methods import draws

    def draw(start: int, count: int) -> "tuple[np.ndarray]":
        return (draws.random_mix(start, count, preference, generator, chunks.backend),)

    return Rule(CHOSEN, per_element=draw)


def _most_preferred(preference: tuple[float, ...]) -> int:
    return max(range(len(preference)), key=lambda task: (preference[task], task))


@merge_method(
    "single_task",
    source="baseline",
    scaling=1.0,
    form="rule",
    uses=lambda weights: (_most_preferred(weights),),
)
def single_task(chunks: "Chunks", *, preference: tuple[float, ...]) -> Rule:
    """Take everything from the most preferred task; equal preferences go to the later task.

    Uniform preference therefore gives the last task.
    """
    return always(_most_preferred(preference))


@merge_method(
    "last_task", source="baseline", scaling=1.0, form="rule", uses=lambda weights: (len(weights) - 1,)
)
def last_task(chunks: "Chunks") -> Rule:
    """Take everything from the last task: sequential fine-tuning as it is. Ignores the preference."""
    return always(chunks.num_tasks - 1)


def always(task: int) -> Rule:
    """Return the rule that takes every element of one task, counted from zero."""
    import numpy as np

    from hub_magmax.kernels.ops import CHOSEN

    return Rule(CHOSEN, per_element=lambda start, count: (np.full(count, task, np.uint8),))
