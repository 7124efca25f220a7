"""Numbers by which a tensor is merged: the recipe's, or those of the rule that decides about it.

They are made here and nowhere else: whoever merges a tensor asks for its `MergeValues`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from hub_magmax.errors import RecipeError
from hub_magmax.files import digest
from hub_magmax.methods import MergeMethod, check_options, get_method
from hub_magmax.recipe.blocks import block_of, depths_of
from hub_magmax.recipe.tensor_rules import Gradient, TensorRule, deciding, is_gradient

#: Returns the number that stands for one over the blocks.
Resolve = Callable[[float | Gradient], float]


@dataclass(frozen=True)
class MergeValues:
    """How tensors are merged.

    Attributes:
        method: `name`, `scaling` and every option, as a lock has them.
        weights: One per task, as `Lock.weights` has them.
    """

    method: Mapping[str, Any] = field(hash=False)
    weights: tuple[float, ...]

    @cached_property
    def how(self) -> MergeMethod:
        """The registered method."""
        return get_method(self.method["name"])

    @property
    def scaling(self) -> float:
        return float(self.method["scaling"])

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method."""
        return {key: value for key, value in self.method.items() if key not in ("name", "scaling")}

    @cached_property
    def surveyed(self) -> str:
        """Digest of what decides the rule of a tensor: all but the scaling coefficient."""
        return digest([self.method["name"], self.options, self.weights])

    def unread(self, tasks: Iterable[str]) -> tuple[str, ...]:
        """Return the tasks that do not count."""
        names = tuple(tasks)
        return tuple(names[task] for task in self.how.unread(self.weights))

    def coefficients(self) -> tuple[float, ...] | None:
        """Return what each task vector is multiplied by in the end; None if no number does it."""
        found = self.how.multipliers(len(self.weights), self.weights, self.options)
        return None if found is None else tuple(self.scaling * number for number in found)


@dataclass(frozen=True)
class RuleValues:
    """What a rule says of the merge of a tensor, as numbers.

    Attributes:
        rule: Position of the rule in the recipe.
        weights: As `MergeValues.weights`; None where the rule names none.
        scaling: None where the rule names none.
        method: Name of the method whose options these are.
        options: The options that the rule names.
    """

    rule: int
    weights: tuple[float, ...] | None
    scaling: float | None
    method: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def over(self, values: MergeValues) -> MergeValues:
        """Return a recipe's values with those of the rule in their place; options of other methods stay."""
        options = self.options if values.method["name"] == self.method else {}
        scaling = {} if self.scaling is None else {"scaling": self.scaling}
        weights = values.weights if self.weights is None else self.weights
        return MergeValues({**values.method, **scaling, **options}, weights)


def shares(masses: Sequence[float]) -> tuple[float, ...]:
    """Return masses divided by their sum; those that already sum to 1 within 1e-6 stay as written.

    A weight written by hand keeps its decimal value, so that quotas come out as the person computed.
    """
    total = math.fsum(masses)
    return tuple(masses) if abs(total - 1) <= 1e-6 else tuple(mass / total for mass in masses)


def positive_shares(numbers: Sequence[float]) -> tuple[float, ...]:
    """Return numbers above zero divided by their sum, else zero; equal shares where none is above."""
    added = [max(number, 0.0) for number in numbers]
    total = sum(added)
    return tuple(number / total if total else 1 / len(added) for number in added)


def rules_under(rules: Iterable[TensorRule], written: str, method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rules as they count under another method, as `RuleValues.over` has it.

    Args:
        rules: Of a recipe.
        written: Name of its method.
        method: The other one, as a lock has it.

    Returns:
        The keys of each. One of which nothing is left has the scaling coefficient, and covers what it did.
    """
    left_out = set[str]() if method["name"] == written else {"options"}
    left_out |= set() if get_method(method["name"]).uses_preference else {"weights"}
    found = []
    for rule in rules:
        keys = rule.model_dump(mode="json", exclude_none=True, exclude=left_out)
        is_empty = rule.values and not rule.values.keys() - left_out
        found.append(keys | {"scaling": method["scaling"]} if is_empty else keys)
    return found


def rule_values(
    rules: Sequence[TensorRule], method: Mapping[str, Any], tasks: Sequence[str], tensors: Iterable[str]
) -> dict[str, RuleValues]:
    """Return by tensor what the rules say of its merge; nothing of those that are merged as the recipe says.

    Args:
        rules: Of the recipe; the first that covers a tensor decides.
        method: The recipe's, as a lock has it.
        tasks: Names, in order.
        tensors: All names of the model: they tell how many blocks each stack has.

    Raises:
        RecipeError: If the weights of a block sum to 0, or an option has a value there that it cannot have.
    """
    if not any(rule.values for rule in rules):
        return {}
    names = tuple(tensors)
    stacks, known = depths_of(names), dict[tuple[int, int, int], RuleValues]()
    found = {}
    for name in names:
        position = deciding(name, rules)
        if position is not None and (rule := rules[position]).take is None and rule.values:
            block = block_of(name)
            place = (position, -1, 0) if block is None else (position, block.number, stacks[block.stack])
            if place not in known:
                known[place] = _resolved(rule, place, method, tasks)
            found[name] = known[place]
    return found


def _resolved(
    rule: TensorRule, place: tuple[int, int, int], method: Mapping[str, Any], tasks: Sequence[str]
) -> RuleValues:
    """Return what a rule says of the tensors of one block; a block of -1 stands for no block."""
    position, block, num_blocks = place

    def number(written: float | Gradient) -> float:
        if not isinstance(written, Gradient):
            return written
        if block < 0:
            return written.gradient[0]
        if written.over == "layers" and rule.layers is not None:
            first, end = rule.layers
            return written.at(block - first, end - first - 1)
        return written.at(block, num_blocks - 1)

    where = "tensors outside blocks" if block < 0 else f"block {block}"
    return RuleValues(
        position,
        _taken(_weights(rule, number, tasks, (position, where)), method, (position, where)),
        None if rule.scaling is None else number(rule.scaling),
        method["name"],
        _options(rule, number, method, (position, where)),
    )


def _weights(
    rule: TensorRule, number: Resolve, tasks: Sequence[str], place: tuple[int, str]
) -> tuple[float, ...] | None:
    if rule.coefficients is not None:
        return tuple(number(rule.coefficients.get(task, 0.0)) / len(tasks) for task in tasks)
    if rule.weights is None:
        return None
    masses = [number(rule.weights.get(task, 0.0)) for task in tasks]
    if not 0 < math.fsum(masses) < math.inf:
        raise RecipeError(
            f"the weights of {place[1]} sum to {math.fsum(masses):g}",
            key=("tensors", place[0], "weights"),
            expected="a weight above 0 for at least one task in every block",
        )
    return shares(masses)


def _taken(
    weights: tuple[float, ...] | None, method: Mapping[str, Any], place: tuple[int, str]
) -> tuple[float, ...] | None:
    """Return weights, unless the method takes no such number of tasks."""
    try:
        if weights is not None:
            get_method(method["name"]).unread(weights)
    except RecipeError as error:
        what = f"the weights of {place[1]}: {error.what}"
        raise RecipeError(
            what, key=("tensors", place[0], "weights"), expected=error.expected, hint=error.hint
        ) from error
    return weights


def _options(
    rule: TensorRule, number: Resolve, method: Mapping[str, Any], place: tuple[int, str]
) -> dict[str, Any]:
    if rule.options is None:
        return {}
    own = with_numbers(rule.options, number)
    stated = {key: value for key, value in method.items() if key not in ("name", "scaling")}
    try:
        checked = check_options(get_method(method["name"]), {**stated, **own})
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"the value of {place[1]} cannot be: {first['msg']}",
            key=("tensors", place[0], "options", *first["loc"]),
            hint="Choose other numbers for the gradient.",
        ) from error
    return {key: checked[key] for key in own}


def with_numbers(options: Any, number: Resolve) -> Any:
    """Return values of options with a number in place of each gradient, at any depth."""
    if is_gradient(options):
        return number(Gradient.model_validate(options))
    if not isinstance(options, Mapping):
        return options
    return {key: with_numbers(value, number) for key, value in options.items()}
