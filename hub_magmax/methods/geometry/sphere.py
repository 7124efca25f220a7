"""Methods that interpolate or average directions, and take the mean of the lengths.

A tensor is a vector, of a whole model or of a task vector, and its direction is a point on a sphere.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hub_magmax.errors import RecipeError
from hub_magmax.kernels.lazy_imports import np
from hub_magmax.methods.geometry import Each, Of, Zeros
from hub_magmax.methods.registry import merge_method, preferred
from hub_magmax.methods.rules import Rule, weighted_rule
from hub_magmax.options import AddedLater

if TYPE_CHECKING:
    from hub_magmax.methods.chunks import Chunks
    from hub_magmax.methods.geometry.gram import Vectors

#: A vector that is shorter than this share of the longest one has no direction.
_SHORT = 2.0**-64
#: Directions whose mean is shorter than this cancel, and two whose angle has a smaller sine lie on one line.
_CANCELS = 1e-8

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _two_at_most(name: str) -> Callable[[tuple[float, ...]], Sequence[int]]:
    """Return a function that names the tasks with a weight, and refuses more than two."""

    def used(preference: tuple[float, ...]) -> Sequence[int]:
        found = preferred(preference)
        if len(found) > 2:
            raise RecipeError(
                f"{name} goes from one model to another, and {len(found)} tasks have a weight",
                key=("tasks",),
                expected="at most 2 with a weight",
                hint="Give 2 tasks a weight; multislerp, karcher, model_stock and average take more.",
            )
        return found

    return used


_used_by_slerp, _used_by_nuslerp = _two_at_most("slerp"), _two_at_most("nuslerp")


@merge_method(
    "slerp",
    source="Shoemake 1985, doi:10.1145/325334.325242",
    form="rule",
    uses=_used_by_slerp,
    in_comparison=(),
)
def slerp(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    shape: tuple[int, ...],
    t: Share = 1.0,
    linear_above: Share = 0.9995,
) -> Rule:
    """Go from one model to another along the arc between them, tensor by tensor.

    With one task: from the base model (`t` 0) to the task (`t` 1, the default). With two: from the first to
    the second, as far as the preference for the second says, so that uniform preference is half way and all
    preference for one task returns that task; a `t` below 1 then goes along the arc from the base model to
    that. The vectors are those of whole models: (sin((1 − t)φ) a + sin(tφ) b) / sin φ with the angle φ
    between a and b. Where the cosine, without its sign, is above `linear_above`, or a vector is zero, it is
    (1 − t) a + t b. The default is mergekit's and lies at 1.8°, nearer than most fine-tunes are to their base
    model; 1 leaves the straight line to vectors that are parallel or opposite.
    """
    from hub_magmax.methods.geometry.gram import Gram, rule_of, vectors_of

    active = _used_by_slerp(preference)
    if len(active) == 1 and t == 1:
        return _alone(active[0], chunks.num_tasks)
    gram = Gram(chunks, shape)
    base, *tasks = vectors_of(gram, "models")
    merged = tasks[active[0]]
    if len(active) == 2:
        second = preference[active[1]] / (preference[active[0]] + preference[active[1]])
        merged = _arc(merged, tasks[active[1]], second, linear_above)
    return rule_of(gram, _arc(base, merged, t, linear_above), "models")


@merge_method("nuslerp", source="Goddard, mergekit", form="rule", uses=_used_by_nuslerp, in_comparison=())
def nuslerp(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    shape: tuple[int, ...],
    of: Of = "task_vectors",
    each: Each = "tensor",
    zeros: Annotated[Zeros, AddedLater()] = "line",
) -> Rule:
    """Go from one task to another along the arc between their task vectors, or between their models.

    As far as the preference for the second one says: uniform preference is half way, and all preference for
    one task returns its vector. `of: models` interpolates whole models, as mergekit does without a base
    model. `each` says what has an angle of its own: the tensor, a row (one index of the first axis) or a
    column. The formula is that of `slerp`, with the straight line only where the sine of the angle is below
    1e-8 or a vector is zero. `zeros: right_angle` takes 90° between a vector and one of zeros, as mergekit
    does: of a tensor that one of two tasks did not change, sin(45°) of the other one's vector is left.
    """
    from hub_magmax.methods.geometry.gram import Gram, rule_of, vectors_of

    active = _used_by_nuslerp(preference)
    if len(active) == 1:
        return _alone(active[0], chunks.num_tasks)
    gram = Gram(chunks, shape, each)
    _, *tasks = vectors_of(gram, of)
    first, second = active
    share = preference[second] / (preference[first] + preference[second])
    return rule_of(gram, _arc(tasks[first], tasks[second], share, 1.0, zeros), of)


@merge_method("multislerp", source="Goddard, mergekit", form="rule", uses=preferred)
def multislerp(
    chunks: "Chunks", *, preference: tuple[float, ...], shape: tuple[int, ...], of: Of = "task_vectors"
) -> Rule:
    """Average the directions of the task vectors, or of the models, and their lengths, by preference.

    The merged vector has the direction of Σ w_t u_t, with u_t = τ_t / |τ_t|, and the length Σ w_t |τ_t|,
    which a mean of vectors falls short of. Uniform preference weighs all tasks alike; all preference for
    one task returns its vector. That is its barycentre in the tangent space at the weighted mean of the
    directions: what is added there sums to zero, so the barycentre is that mean. A vector of zeros, or
    one shorter than 2⁻⁶⁴ of the longest, has no direction. Where the directions cancel (a mean shorter
    than 1e-8), it is the mean of the vectors, Σ w_t τ_t. `of: models` takes the models' own vectors, as
    mergekit does without a base model.
    """
    from hub_magmax.methods.geometry.gram import Gram, rule_of, vectors_of

    active = preferred(preference)
    if len(active) == 1:
        return _alone(active[0], chunks.num_tasks)
    gram = Gram(chunks, shape)
    _, *tasks = vectors_of(gram, of)
    weights, vectors = [preference[task] for task in active], [tasks[task] for task in active]
    direction = _mean(_directions(vectors), weights)
    return rule_of(gram, _with_mean_length(direction, vectors, weights), of)


@merge_method("karcher", source="arXiv:2603.04972", form="rule", uses=preferred, in_comparison=())
def karcher(
    chunks: "Chunks",
    *,
    preference: tuple[float, ...],
    shape: tuple[int, ...],
    of: Of = "models",
    max_iter: Annotated[int, Field(ge=1, le=1000)] = 10,
    tol: Annotated[float, Field(gt=0, le=1)] = 1e-5,
) -> Rule:
    """Take the Karcher mean of the models' directions, weighted by preference, and the mean of their lengths.

    The mean is the point on the sphere whose squared angles to the directions have the least weighted
    sum. It is found from `multislerp`'s by steps along the mean of the tangents that lead to the
    directions, until a step would be shorter than `tol` or there were `max_iter`. Uniform preference
    weighs all models alike, as published; all preference for one task returns that task. Vectors without
    a direction and directions that cancel are what they are in `multislerp`. `of: task_vectors` takes
    these in place of whole models.
    """
    from hub_magmax.methods.geometry.gram import Gram, rule_of, vectors_of

    active = preferred(preference)
    if len(active) == 1:
        return _alone(active[0], chunks.num_tasks)
    gram = Gram(chunks, shape)
    _, *tasks = vectors_of(gram, of)
    weights, vectors = [preference[task] for task in active], [tasks[task] for task in active]
    units = _directions(vectors)
    mean = _mean(units, weights)
    for _ in range(max_iter if mean.length >= _CANCELS else 0):
        stepped, step = _stepped(mean.unit, units, weights)
        if step < tol:
            break
        mean = stepped
    return rule_of(gram, _with_mean_length(mean, vectors, weights), of)


def _alone(task: int, num_tasks: int) -> Rule:
    """Return the rule that gives one task's vector."""
    return weighted_rule(tuple(float(other == task) for other in range(num_tasks)))


def _arc(
    first: "Vectors", second: "Vectors", t: float, linear_above: float, zeros: Zeros = "line"
) -> "Vectors":
    """Return what lies at `t` on the arc from one vector to another, or on the straight line."""
    angle = first.unit.angle(second.unit)
    sine = np.sin(angle)
    no_arc = (np.abs(np.cos(angle)) > linear_above) | (sine < _CANCELS)
    if zeros == "line":  # otherwise the angle is 90 degrees
        no_arc |= (first.length == 0) | (second.length == 0)
    divisor = np.where(no_arc, 1.0, sine)
    shares = (np.where(no_arc, part, np.sin(part * angle) / divisor) for part in (1 - t, t))
    return first.times(next(shares)) + second.times(next(shares))


def _directions(vectors: "Sequence[Vectors]") -> "list[Vectors]":
    """Return vectors divided by their lengths, zeros for those that have no direction."""
    longest = max(vector.length for vector in vectors)
    return [vector.unit.times(vector.length > _SHORT * longest) for vector in vectors]


def _mean(vectors: "Sequence[Vectors]", weights: Sequence[float]) -> "Vectors":
    found = vectors[0].times(weights[0])
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        found = found + vector.times(weight)
    return found


def _with_mean_length(
    direction: "Vectors", vectors: "Sequence[Vectors]", weights: Sequence[float]
) -> "Vectors":
    """Return a vector of that direction and the vectors' mean length; their mean if there is no direction."""
    if direction.length < _CANCELS:
        return _mean(vectors, weights)
    lengths = [weight * vector.length for vector, weight in zip(vectors, weights, strict=True)]
    return direction.unit.times(sum(lengths))


def _stepped(
    mean: "Vectors", units: "Sequence[Vectors]", weights: Sequence[float]
) -> "tuple[Vectors, np.ndarray]":
    """Return a mean direction after one step towards the Karcher mean, and the length of the step."""
    tangents = []
    for unit in units:
        angle = mean.angle(unit) if unit.length > 0 else np.zeros(())
        across, sine = unit - mean.times(unit.dot(mean)), np.sin(angle)
        # Without a direction of its own, of a vector on the same line, there is nothing to go along.
        tangents.append(across.times(np.where(sine > _CANCELS, angle / np.where(sine > 0, sine, 1.0), 0.0)))
    step = _mean(tangents, weights)
    length = step.length
    return mean.times(np.cos(length)) + step.unit.times(np.sin(length)), length
