"""Ways to merge that a comparison tries: methods, scaling coefficients and preferences, once each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hub_magmax import methods
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Compare, Method
from hub_magmax.recipe.values import AUTO


@dataclass(frozen=True)
class Candidate:
    """One way to merge.

    Attributes:
        method: `name`, `scaling` and every option.
        preference: Name of the weights: `recipe`, `uniform`, or a name from `compare`.
        weights: One per task.
        seeds: Of the draws to average over, for a method that draws; empty for the lock's seed.
        is_recipe: It is the recipe as it stands.
        is_listed: The comparison tries it anyway, and not only since it is the recipe.
        title: What the model is, where it is a checkpoint.
        by_rules: The recipe's rules give tensors numbers of their own.
        variant: Options that tell it from the same method with others, in words; empty where there is none.
    """

    method: Mapping[str, Any]
    preference: str
    weights: tuple[float, ...]
    seeds: tuple[int, ...] = ()
    is_recipe: bool = False
    by_rules: bool = True
    is_listed: bool = True
    title: str = ""
    variant: str = ""

    def same_as(self, other: Candidate) -> bool:
        """Say whether both give the same model."""
        return (self.method, self.weights) == (other.method, other.weights)

    @property
    def distance_to_default(self) -> float:
        """How far the scaling coefficient is from the method's own, as the logarithm of their ratio."""
        ratio = self.method["scaling"] / (methods.get_method(self.method["name"]).scaling or math.inf)
        return abs(math.log(ratio)) if ratio > 0 else math.inf

    @property
    def options(self) -> dict[str, Any]:
        """Return the method's options, by name, without its scaling coefficient."""
        return {name: value for name, value in self.method.items() if name not in ("name", "scaling")}

    @property
    def label(self) -> str:
        """Return the method as a person would name it, without what most share; the recipe says that too."""
        return f"the recipe: {self._name}" if self.is_recipe else self._name

    @property
    def told(self) -> str:
        """Return what is being scored, in words."""
        return self.title or self.label

    @property
    def group(self) -> str:
        """Return the label of what is tuned together: a method, or the recipe alone if it is not listed."""
        return self._name if self.is_listed else self.label

    @property
    def kind(self) -> str:
        """Return the method, with its selection where it has one."""
        selection = self.method.get("selection")
        return f"{self.method['name']} {selection}" if selection else str(self.method["name"])

    @property
    def _name(self) -> str:
        return f"{self.kind} {self.variant}" if self.variant else self.kind


def base_model(num_tasks: int) -> Candidate:
    """Return a merge that adds nothing."""
    weights = (1 / num_tasks,) * num_tasks
    how = {"name": "average", "scaling": 0.0}
    return Candidate(how, "none", weights, by_rules=False, title="the base model")


def one_task(task: str, tasks: Sequence[str]) -> Candidate:
    """Return a merge that takes everything from one task."""
    weights = tuple(float(other == task) for other in tasks)
    how = {"name": "single_task", "scaling": 1.0}
    return Candidate(how, "one task", weights, by_rules=False, title=f"the checkpoint of {task}")


def draws(method: Mapping[str, Any]) -> bool:
    """Say whether a method, as a lock describes it, draws: another seed is then another model.

    `top-n` draws between equals only, and counts as one that does not.
    """
    return "generator" in methods.get_method(method["name"]).supplied and method.get("selection") != "top-n"


def candidates(
    compare: Compare, written: Method, preferences: Mapping[str, tuple[float, ...]]
) -> list[Candidate]:
    """Return all that a comparison tries, once each; the recipe as it stands comes last, unless it is listed.

    Args:
        compare: Its methods and scaling coefficients; a method that names its scaling has that one only.
        written: The recipe's own method. Where its scaling is `auto`, no other is tried; where no methods are
            listed, it comes before the built-in ones.
        preferences: Weights by name, the recipe's first; methods that ignore the preference are tried with
            these only.
    """
    found: list[Candidate] = []
    for method in _methods_to_try(compare, written):
        for candidate in _variants(method, compare, preferences):
            if not any(candidate.same_as(earlier) for earlier in found):
                found.append(candidate)
    own = None if written.is_auto else _as_written(written, compare, preferences)
    return _told_apart(found if own is None else _with_own(found, own))


def _methods_to_try(compare: Compare, written: Method) -> tuple[Method, ...]:
    """Return the methods that are tried beside the recipe as it stands, in order; see `candidates`."""
    if written.name != AUTO and written.scaling == AUTO:
        return (written,)
    if written.name != AUTO and compare.methods is None:
        return (written, *compare.tried_methods)
    return tuple(compare.tried_methods)


def _told_apart(found: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates that say which options they have, where a method is tried with several."""
    firsts = {one.kind: one.options for one in reversed(found)}
    varied = {
        (one.kind, name)
        for one in found
        for name in one.options
        if one.options[name] != firsts[one.kind].get(name)
    }

    def variant(one: Candidate) -> str:
        return ", ".join(
            f"{name} {value}" for name, value in one.options.items() if (one.kind, name) in varied
        )

    return [replace(one, variant=variant(one)) for one in found]


def _with_own(found: Sequence[Candidate], own: Candidate) -> list[Candidate]:
    """Return candidates with the recipe as it stands: one of them, or else one more."""
    if any(own.same_as(other) for other in found):
        return [replace(other, is_recipe=own.same_as(other)) for other in found]
    return [*found, replace(own, is_listed=False)]


def _as_written(written: Method, compare: Compare, preferences: Mapping[str, tuple[float, ...]]) -> Candidate:
    """Return the recipe as it stands."""
    filled, (name, weights) = locked_method(written), next(iter(preferences.items()))
    return Candidate(filled, name, weights, (compare.seeds or ()) if draws(filled) else (), is_recipe=True)


def _variants(
    method: Method, compare: Compare, preferences: Mapping[str, tuple[float, ...]]
) -> Iterator[Candidate]:
    """Yield one method with every preference that it uses and every scaling coefficient."""
    registered = methods.get_method(method.name)
    own = (registered.scaling,) if compare.scaling is None else ()
    every = dict.fromkeys((*own, *compare.tried_scaling))
    scalings = every if method.scaling in (None, AUTO) else (method.scaling,)
    for name, weights in list(preferences.items())[: None if registered.uses_preference else 1]:
        for scaling in scalings:
            filled = locked_method(method.model_copy(update={"scaling": scaling}))
            yield Candidate(filled, name, weights, (compare.seeds or ()) if draws(filled) else ())
