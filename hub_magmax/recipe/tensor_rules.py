"""Rules for tensors: where some come from, or by which numbers they are merged, by name and block.

The number of a block is the first number among the parts of a tensor's name: 3 in `model.layers.3.mlp.bias`.
Names that agree before it are one stack of blocks, so `encoder.block` and `decoder.block` are two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError

from hub_magmax.errors import KeyPath
from hub_magmax.recipe.blocks import BlockRange, block_of
from hub_magmax.recipe.values import MAX_PLACE_LENGTH, MAX_TASKS, Number, Spec, TaskName

#: Most numbers of a gradient.
MAX_STEPS = 4096

_NUMBER: TypeAdapter[float] = TypeAdapter(Number)


class Gradient(Spec):
    """Numbers that change over the blocks of a stack: piecewise linear, evenly spread.

    `over: layers` spreads them over the blocks that the rule's `layers` select, in place of the whole stack.
    """

    gradient: Annotated[tuple[Number, ...], Field(min_length=2, max_length=MAX_STEPS)]
    over: Literal["stack", "layers"] = "stack"

    def at(self, step: int, last: int) -> float:
        """Return the number at one of the places 0 to `last`; the last number where there is one place."""
        if last == 0:
            return self.gradient[-1]
        lower, rest = divmod(step * (len(self.gradient) - 1), last)
        low, high = self.gradient[lower], self.gradient[lower + bool(rest)]
        return low if low == high else (1 - rest / last) * low + rest / last * high


def _graded(value: Any) -> float | Gradient:
    if isinstance(value, list | tuple):
        raise ValueError(f"should be a number, or over the blocks {{gradient: {list(value)}}}")
    is_number = not isinstance(value, Mapping | Gradient)
    return _NUMBER.validate_python(value) if is_number else Gradient.model_validate(value)


def is_gradient(value: Any) -> bool:
    """Say whether a plain value is written as a gradient; a task may be called so."""
    return isinstance(value, Mapping) and isinstance(value.get("gradient"), list | tuple)


def gradients_in(values: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Gradient]]:
    """Yield the gradients among values, at any depth, each with the keys that lead to it."""
    if isinstance(values, Gradient):
        yield path, values
    elif is_gradient(values):
        with suppress(ValidationError):  # reported where options are checked
            yield path, Gradient.model_validate(values)
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from gradients_in(value, (*path, key))


def _plain(value: float | Gradient) -> Any:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Gradient) else value


#: A number, or one that changes over the blocks.
Graded = Annotated[
    float | Gradient,
    PlainValidator(_graded),
    PlainSerializer(_plain),
    WithJsonSchema({"anyOf": [{"type": "number"}, Gradient.model_json_schema()]}),
]

GradedByTask = Annotated[dict[TaskName, Graded], Field(min_length=1, max_length=MAX_TASKS)]


def _text(value: Any) -> Any:
    if value is None:
        raise PydanticKnownError("string_type")  # a task may be called null
    return value


class TensorRule(Spec):
    """Tensors that come unchanged from one source, are left out, or are merged by numbers of their own.

    The rule covers names that match the glob `match`, of blocks from the first of `layers` to the one before
    the last. `take` says whose the tensors are, and `factor` what they are multiplied by; it stands alone for
    tensors that a stack of layers takes. In their place `weights` (relative to their sum), or `coefficients`,
    `scaling` and `options` of the recipe's method say how tensors are merged; what a rule does not say is the
    recipe's.
    """

    match: Annotated[str, Field(min_length=1, max_length=MAX_PLACE_LENGTH)] = "*"
    layers: BlockRange | None = None
    take: Annotated[Annotated[str, Field(min_length=1)] | None, BeforeValidator(_text)] = None
    factor: Number | None = None
    weights: GradedByTask | None = None
    coefficients: GradedByTask | None = None
    scaling: Graded | None = None
    options: Annotated[dict[str, Any], Field(min_length=1)] | None = None

    def matches(self, tensor: str) -> bool:
        """Say whether a name matches the glob, whatever its block."""
        return fnmatchcase(tensor, self.match)

    def covers(self, tensor: str) -> bool:
        if not self.matches(tensor):
            return False
        if self.layers is None:
            return True
        block = block_of(tensor)
        return block is not None and self.layers[0] <= block.number < self.layers[1]

    @property
    def source(self) -> str:
        """Where the tensors are taken from, of a rule that takes them."""
        assert self.take is not None
        return self.take

    @property
    def values(self) -> dict[str, Any]:
        """What the rule says of merging, by key."""
        found = {key: getattr(self, key) for key in ("weights", "coefficients", "scaling", "options")}
        return {key: value for key, value in found.items() if value is not None}

    @property
    def label(self) -> str:
        """The rule as messages call it."""
        layers = "" if self.layers is None else f" in layers {[*self.layers]}"
        return f"the rule {self.match!r}{layers}"

    @property
    def locked(self) -> tuple[str, str] | dict[str, Any]:
        """The rule as a lock stores it: glob and source alone, or every key that it has."""
        if self.take is not None and self.layers is None and self.factor is None:
            return self.match, self.take
        return self.model_dump(mode="json", exclude_none=True)


def deciding(tensor: str, rules: Iterable[TensorRule]) -> int | None:
    """Return the position of the rule that decides about a tensor: the first that covers it."""
    return next((position for position, rule in enumerate(rules) if rule.covers(tensor)), None)


def rule_for(tensor: str, rules: Sequence[TensorRule]) -> TensorRule | None:
    """Return the rule by which a tensor is taken or left out; None where it is merged."""
    rule = next((rule for rule in rules if rule.covers(tensor)), None)
    return rule if rule is not None and rule.take is not None else None


def factor_of(tensor: str, rules: Sequence[TensorRule]) -> float:
    """Return what a copied tensor is multiplied by: 1 where the rule that decides about it says nothing."""
    rule = next((rule for rule in rules if rule.covers(tensor)), None)
    return 1.0 if rule is None or rule.factor is None else rule.factor


def takes_any(rules: Sequence[TensorRule]) -> bool:
    """Say whether a rule keeps any tensor from being merged."""
    return any(rule.take is not None for rule in rules)
