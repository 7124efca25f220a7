"""Methods that take every element from one task: MAGMAX, its tunable form, and choices without a look."""

from typing import TYPE_CHECKING, Literal

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.ops import CHOSEN, LARGEST
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule, chosen_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.methods.chunks import Chunks


MAGMAX = Paper(
    "2407.06322",
    "magmax",
    "Marczak, Daniel",
    2024,
    "{MagMax}: Leveraging Model Merging for Seamless Continual Learning",
)
_TUNABLE_MAGMAX = Paper(
    "2605.20803",
    "tunablemagmax",
    "Hiroshima, Kei",
    2026,
    "Tunable {MAGMAX}: Preference-Aware Model Merging for Continual Learning",
)


@merge_method("magmax", source=MAGMAX, scaling=0.5, form="rule")
def magmax(chunks: "Chunks") -> Rule:
    """Take each element from the task where it moved most. Ignores the preference.

    Equal magnitudes go to the later task.
    """
    from hub_magmax.methods.chunks import check_task_count

    check_task_count(chunks.num_tasks, limit=255)
    return Rule(LARGEST)


def _told_apart(preference: tuple[float, ...]) -> "Sequence[int]":
    """Return the tasks with a weight, and refuse more than owners of elements tell apart."""
    from hub_magmax.methods.selection.owners import MAX_TASKS

    found = preferred(preference)
    if len(found) > MAX_TASKS:
        raise RecipeError(
            f"tunable_magmax tells at most {MAX_TASKS} tasks apart, and {len(found)} have a share",
            key=("tasks",),
            hint=f"Give weights to the {MAX_TASKS} that matter most, or choose a method that averages.",
        )
    return found


# Measured at 1B parameters and five tasks: 2.4 bytes with `algorithm-1`, 3.3 with `top-n`, and .8 for what it
# leaves open, 4 elements in 100; the codes of more tasks are longer.
@merge_method(
    "tunable_magmax",
    source=_TUNABLE_MAGMAX,
    scaling=0.5,
    form="rule",
    held_bytes=6,
    uses=_told_apart,
    in_comparison=({}, {"selection": "top-n"}),
)
def tunable_magmax(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    generator: "CounterGenerator",
    selection: Literal["algorithm-1", "top-n"] = "algorithm-1",
    scope: Literal["tensor", "model"] = "tensor",
) -> Rule:
    """Give each task as many elements as the preference says, the largest first.

    The preference becomes quotas, exact to the element, for each tensor or, with the scope `model`, for all
    merged tensors together: then a task gets more of the tensors in which it moved most. Uniform
    preference gives every task the same number of elements, which is not MAGMAX: that has no quotas.
    """
    from hub_magmax.methods import selection as rules

    quotas = rules.quotas(preference, chunks.num_elements)
    if selection == "algorithm-1":
        found = rules.algorithm_1(chunks, quotas, generator)
    else:
        found = rules.top_n(chunks, quotas, generator, rule_of=chosen_rule)
    return chosen_rule(found.owner, found.num_unaligned, found.duality_gap)


@merge_method("random_mix", source=MAGMAX, scaling=1.0, form="rule", uses=preferred)
def random_mix(chunks: "Chunks", *, preference: tuple[float, ...], generator: "CounterGenerator") -> Rule:
    """Take each element from a task drawn with the preference as probabilities.

    Uniform preference gives every task the same chance. A weight of zero never wins.
    """
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

    return Rule(CHOSEN, per_element=lambda start, count: (np.full(count, task, np.uint8),))
