"""MAGMAX and its tunable form: every element comes from one task."""

from typing import TYPE_CHECKING, Literal

from hub_magmax.errors import RecipeError
from hub_magmax.methods.registry import Paper, merge_method, preferred
from hub_magmax.methods.rules import Rule, chosen_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    from hub_magmax.kernels.ops import LARGEST
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
