"""Coverage of the rules for tensors: each has to decide about something, in blocks that there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.errors import KeyPath, Problem
from hub_magmax.recipe.blocks import block_of, depths_of
from hub_magmax.recipe.problems import together
from hub_magmax.recipe.tensor_rules import TensorRule, deciding, gradients_in
from hub_magmax.text import listed, shown

_KIND, _BLOCKS = "RecipeError", "names such as 'model.layers.0.mlp.weight'"


def check_rules(indexes: Iterable[CheckpointIndex], rules: Sequence[TensorRule]) -> None:
    """Raise RecipeError, with every problem, for rules that cover no tensor of any checkpoint."""
    names = sorted({name for index in indexes for name in index.tensors}) if rules else []
    problems = [problem for number, rule in enumerate(rules) for problem in _covering(rule, number, names)]
    if problems:
        raise together(problems)


def _covering(rule: TensorRule, number: int, names: Sequence[str]) -> Iterator[Problem]:
    """Yield why a rule covers nothing, or blocks that are not there."""
    matched = [name for name in names if rule.matches(name)]
    if not matched:
        expected = f"a glob over names such as {names[0]!r}" if names else ""
        text = f"the glob {rule.match!r} matches no tensor"
        yield Problem(_KIND, text, key=("tensors", number, "match"), expected=expected)
    elif rule.layers is not None:
        depths = depths_of(names)  # other names of a stack tell how deep it is
        stacks = {stack: depths[stack] for stack in depths_of(matched)}
        yield from _beyond(rule, ("tensors", number, "layers"), matched, stacks)


def _beyond(
    rule: TensorRule, key: KeyPath, matched: Sequence[str], stacks: Mapping[str, int]
) -> Iterator[Problem]:
    """Yield why the names that a rule matches are not in its layers, by the depths of their stacks."""
    if not stacks:
        text = f"no name that {rule.match!r} matches has a number, so none is in a block"
        yield Problem(_KIND, text, key=key, expected=_BLOCKS)
    elif rule.layers is not None and rule.layers[1] > max(stacks.values()):
        counts = [f"{shown(stack)} has {count}" for stack, count in stacks.items()]
        text = f"{[*rule.layers]} goes beyond the blocks: {listed(counts, 4)}"
        yield Problem(_KIND, text, key=key, expected=f"an end of at most {max(stacks.values())}")
    elif not any(map(rule.covers, matched)):
        yield Problem(_KIND, f"{rule.label} covers no tensor", key=key)


def check_values(
    rules: Sequence[TensorRule], merged: Collection[str], tied: Mapping[str, str], names: Collection[str]
) -> None:
    """Raise RecipeError, with every problem, for rules whose numbers would have no effect.

    Args:
        rules: Of the recipe.
        merged: Names of the tensors that are merged, or that are means of statistics.
        tied: Names of tensors that are copies of a merged one, with the name of that one.
        names: Of all tensors of the base model.
    """
    if all(rule.take is not None for rule in rules):
        return
    decided: dict[int | None, list[str]] = {}
    for name in merged:
        decided.setdefault(deciding(name, rules), []).append(name)
    telling = _Telling(rules, decided, tied, names)
    problems = [problem for number in range(len(rules)) for problem in telling.of_rule(number)]
    if problems:
        raise together(problems)


@dataclass(frozen=True)
class _Telling:
    """Tells what is wrong about rules, of which each decides about some merged tensors.

    Attributes:
        rules, tied, names: As `check_values` has them.
        decided: Merged tensors by the position of the rule that decides about them.
    """

    rules: Sequence[TensorRule]
    decided: Mapping[int | None, Sequence[str]]
    tied: Mapping[str, str]
    names: Collection[str]

    def of_rule(self, number: int) -> Iterator[Problem]:
        """Yield why the numbers of a rule have no effect."""
        rule, key, found = self.rules[number], ("tensors", number), self.decided.get(number, ())
        if rule.factor is not None:
            yield from (_not_copied(rule, key, found) for _ in found[:1])
        elif rule.take is None and not found:
            merged = [name for names in self.decided.values() for name in names]
            yield _idle(rule, key, merged, self.tied, self.names)
        elif rule.take is None and not any(map(block_of, found)):
            yield from _flat(rule, key, found)


def _not_copied(rule: TensorRule, key: KeyPath, found: Sequence[str]) -> Problem:
    """Return that a factor is said of merged tensors."""
    text = f"{rule.label} multiplies {listed([*map(shown, found)], 3)}, and no slice of layers takes them"
    hint = "Add take: base_model or a task, or cover tensors of slices with `take` only."
    return Problem(_KIND, text, key=(*key, "factor"), hint=hint)


def _idle(
    rule: TensorRule, key: KeyPath, merged: Collection[str], tied: Mapping[str, str], names: Collection[str]
) -> Problem:
    """Return why the numbers of a rule count for no tensor."""
    if any(map(rule.covers, merged)):
        text = f"rules before it decide about every tensor that {rule.label} covers"
        return Problem(_KIND, text, key=key, hint="The first rule that covers a tensor counts: move it up.")
    if covered := next(filter(rule.covers, tied), None):
        of = shown(tied[covered])
        text = f"{shown(covered)} is tied to {of}: they are one parameter, merged under that name"
        return Problem(_KIND, text, key=key, hint=f"Match {of} in its place, or both.")
    copied = listed([shown(name) for name in names if rule.covers(name)], 3)
    text = f"{rule.label} covers only tensors that are not merged: {copied}"
    hint = (
        f"Leave the rule out, or match what is merged, such as {shown(next(iter(merged)))}." if merged else ""
    )
    return Problem(_KIND, text, key=key, hint=hint or "Leave the rule out.")


def _flat(rule: TensorRule, key: KeyPath, found: Sequence[str]) -> Iterator[Problem]:
    """Yield the gradients of a rule; none of the tensors that it decides about has a block."""
    text = f"no tensor that the rule decides about is in a block: {listed([*map(shown, found)], 3)}"
    for path, _ in gradients_in(rule.values):
        yield Problem(_KIND, text, key=(*key, *path), expected=_BLOCKS, hint="Give one number.")
