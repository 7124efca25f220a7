"""Checkpoints that do not fit each other: all that differs at once, with rules that settle it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hub_magmax.checkpoints.index import (
    EXACT_DTYPES,
    FLOAT8_DTYPES,
    MERGEABLE_DTYPES,
    CheckpointIndex,
    TensorInfo,
)
from hub_magmax.checkpoints.recognition import Refusal
from hub_magmax.checkpoints.rows.vocabulary import num_rows
from hub_magmax.checkpoints.stored_otherwise import part_of_one, unlike
from hub_magmax.errors import MismatchError
from hub_magmax.planning.fitting.globs import grouped, rules_for
from hub_magmax.planning.fitting.lookalikes import SAVE_AGAIN, lookalikes
from hub_magmax.planning.fitting.other_heads import OtherHead
from hub_magmax.planning.statistics import kind_of, may_lack
from hub_magmax.recipe.tensor_rules import TensorRule, rule_for
from hub_magmax.text import listed, number_of, shown

#: Patterns of names, or tensors, that are shown of one group.
_MOST_SHOWN = 3

_IF_MEANT = "Check that it was fine-tuned from this base model; if the difference is meant"
_TO_KEEP = "To keep one of them whole"
_AS_IT_IS = "To keep the tensor as it is"

_KNOWN_DTYPES = frozenset((*MERGEABLE_DTYPES, *EXACT_DTYPES))

Indexes = Mapping[str, CheckpointIndex]
_Pair = tuple[TensorInfo, TensorInfo]
IsRuled = Callable[[str], bool]


@dataclass(frozen=True)
class _Fact:
    """A group of tensors that one checkpoint has otherwise than the base model.

    Attributes:
        label: Name of the checkpoint.
        what: What it has, as a clause.
        names: Of the tensors.
        take: What a rule about them takes; empty where a rule would lose something.
        step: Start of the sentence with the rules, or all of it where there are none.
        alone: The fact about a tensor that is the only one: what it has, and what was expected.
    """

    label: str
    what: str
    names: tuple[str, ...]
    take: str
    step: str
    alone: tuple[str, str] | None = None


def refuse_differences(
    indexes: Indexes,
    rules: Sequence[TensorRule],
    layered: Collection[str] = (),
    heads: Callable[[], Iterable[OtherHead]] = tuple,
) -> None:
    """Raise MismatchError if tensors differ in name, shape or kind, and no rule is about them.

    Args:
        indexes: Of `base_model` and every task.
        rules: The recipe's, for tensors.
        layered: Names of tensors that a stack of layers takes from one source.
        heads: Returns the tasks with another head than the base model's; asked where tensors differ.
    """
    base, is_ruled = indexes["base_model"], _ruled(indexes, rules).union(layered).__contains__
    others = [index for index in indexes.values() if index is not base]
    facts = [fact for index in (base, *others) for fact in _facts(index, base, is_ruled)]
    if facts:
        raise _error(facts, base, indexes, heads)


def _ruled(indexes: Indexes, rules: Sequence[TensorRule]) -> set[str]:
    """Return the names that rules are about."""
    every_name = {name for index in indexes.values() for name in index.tensors} if rules else ()
    return {name for name in every_name if rule_for(name, rules)}


def _facts(index: CheckpointIndex, base: CheckpointIndex, is_ruled: IsRuled) -> Iterator[_Fact]:
    """Yield all that one checkpoint has otherwise."""
    pairs = [*_pairs(index, base, is_ruled)]
    if codes := [*_codes(index.label, pairs, len(base.tensors))]:
        yield from codes
        return  # no rule is for any tensor of what is no checkpoint of the base model
    yield from _names(index, base, is_ruled)
    yield from _transposed(index.label, pairs)
    yield from _shapes(index.label, pairs, base.label)
    yield from _dtypes(index.label, pairs, base.label)


def _names(index: CheckpointIndex, base: CheckpointIndex, is_ruled: IsRuled) -> Iterator[_Fact]:
    """Yield tensors that one side lacks; those that look like the other side's get no rule."""
    missing, surplus = _lacking(base, index), _lacking(index, base)
    alike = lookalikes(index, base, [name for name in missing if not is_ruled(name)], surplus, is_ruled)
    aside = set[str]()
    if alike is not None:
        aside = {*alike.base, *alike.own}
        yield _Fact(index.label, alike.what, (*alike.base, *alike.own), "", alike.step)
    for names, what, take in (
        (missing, "lacks {} of the base model", "base_model"),
        (surplus, "has {} that the base model lacks", "nothing"),
    ):
        if left := tuple(name for name in names if name not in aside and not is_ruled(name)):
            yield _Fact(index.label, what.format(_named(left)), left, take, _IF_MEANT)


def _lacking(one: CheckpointIndex, other: CheckpointIndex) -> list[str]:
    """Return the tensors of one checkpoint that the other lacks and should have."""
    if one.tensors.keys() <= other.tensors.keys():
        return []
    return [name for name, info in one.tensors.items() if name not in other.tensors and not may_lack(info)]


def _pairs(index: CheckpointIndex, base: CheckpointIndex, is_ruled: IsRuled) -> Iterator[_Pair]:
    """Yield tensors of both that are merged or have to agree and are not alike, if no rule is about them."""
    for name, theirs in base.tensors.items():
        own = index.tensors.get(name)
        if own is None or (own.shape == theirs.shape and own.dtype == theirs.dtype in _KNOWN_DTYPES):
            continue  # as nearly all are
        kind = kind_of(theirs)
        if not is_ruled(name) and not (kind and kind.is_copied):
            yield own, theirs


def _codes(label: str, pairs: Sequence[_Pair], num_tensors: int) -> Iterator[_Fact]:
    """Yield the tensors that are no values of the base model's, whatever a rule would say."""
    found: dict[Refusal, list[str]] = defaultdict(list)
    part = part_of_one([(own, theirs) for own, theirs in pairs if own.shape != theirs.shape], num_tensors)
    for own, theirs in pairs:
        if finding := part or unlike(own, theirs):
            found[finding].append(own.name)
    for finding, names in found.items():
        alone = (finding.what, finding.expected) if len(names) == 1 else None
        yield _Fact(label, f"{_named(names)}: {finding.what}", tuple(names), "", finding.step, alone)


def _transposed(label: str, pairs: Iterable[_Pair]) -> Iterator[_Fact]:
    """Yield the tensors that have the base model's axes in another order, which no rule brings back."""
    names = tuple(own.name for own, theirs in pairs if _is_transposed(own, theirs))
    if names:
        yield _Fact(label, f"has {_named(names)} with axes in another order", names, "", SAVE_AGAIN)


def _is_transposed(own: TensorInfo, base: TensorInfo) -> bool:
    return own.shape != base.shape and sorted(own.shape) == sorted(base.shape)


def _shapes(label: str, pairs: Iterable[_Pair], base_label: str) -> Iterator[_Fact]:
    """Yield the tensors that have another shape."""
    found = [(o, t) for o, t in pairs if o.shape != t.shape and not _is_transposed(o, t)]
    if found:
        own, theirs = found[0]
        each = [f"{shown(o.name)} {list(o.shape)}, not {list(t.shape)}" for o, t in found]
        expected = f"{list(theirs.shape)} as in {base_label}"
        what = f"has {_count(found)} of other shapes ({listed(each, _MOST_SHOWN)})"
        names = tuple(own.name for own, _ in found)
        alone = (f"shape {list(own.shape)}", expected) if len(found) == 1 else None
        yield _Fact(label, what, names, "base_model", _TO_KEEP, alone)


def _dtypes(label: str, pairs: Iterable[_Pair], base_label: str) -> Iterator[_Fact]:
    """Yield the tensors whose dtypes cannot be merged, by dtypes."""
    found: dict[str, list[str]] = defaultdict(list)
    for own, theirs in pairs:
        if own.shape == theirs.shape and not _are_mergeable(own, theirs):
            other = "" if own.dtype == theirs.dtype else f" with {theirs.dtype} of {base_label}"
            found[f"dtype {own.dtype} cannot be merged{other}"].append(own.name)
    expected = f"one of {', '.join(MERGEABLE_DTYPES)} everywhere, or the same integers everywhere"
    for what, names in found.items():
        alone = (what, expected) if len(names) == 1 else None
        yield _Fact(label, f"has {_named(names)} whose {what}", tuple(names), "base_model", _AS_IT_IS, alone)


def _are_mergeable(own: TensorInfo, base: TensorInfo) -> bool:
    if base.dtype in EXACT_DTYPES:
        return own.dtype == base.dtype
    # float8 of the base model is told of the base model itself.
    return own.dtype in MERGEABLE_DTYPES and base.dtype in (*MERGEABLE_DTYPES, *FLOAT8_DTYPES)


def _error(
    facts: Sequence[_Fact],
    base: CheckpointIndex,
    indexes: Indexes,
    heads: Callable[[], Iterable[OtherHead]],
) -> MismatchError:
    """Return one error for all facts, with the steps and the rules that settle them."""
    hint = " ".join([*_steps(facts), *_settled(facts, base, indexes), *_of_task(facts, indexes, heads())])
    if len(facts) == 1 and facts[0].alone:
        what, expected = facts[0].alone
        where = f"{facts[0].label}, tensor {facts[0].names[0]!r}"
        return MismatchError(what, where=where, expected=expected, hint=hint)
    by_source: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        by_source[fact.label].append(fact.what)
    sources: dict[str, list[str]] = defaultdict(list)
    for label, texts in by_source.items():
        sources[" and ".join(texts)].append(label)
    told = [(", ".join(labels), text) for text, labels in sources.items()]
    where, what = told[0] if len(told) == 1 else ("", "; ".join(f"{labels}: {text}" for labels, text in told))
    return MismatchError(what, where=where, expected=f"the tensors of {base.label}", hint=hint)


def _steps(facts: Sequence[_Fact]) -> Iterator[str]:
    """Yield what to do about tensors that no rule is for."""
    for step in dict.fromkeys(fact.step for fact in facts if not fact.take):
        yield step if step.endswith(".") else f"{step}."


def _settled(facts: Sequence[_Fact], base: CheckpointIndex, indexes: Indexes) -> Iterator[str]:
    """Yield a sentence with rules for all that rules can settle."""
    takes = {name: fact.take for fact in facts if fact.take for name in fact.names}
    if takes:
        besides = _besides(facts, base, indexes)
        yield f"{_start(facts)}, add to the recipe: {_rules(takes, indexes)}{besides}."


def _rules(takes: Mapping[str, str], indexes: Indexes) -> str:
    """Return the rules that take these tensors, by name, from these places."""
    every_name = {name for index in indexes.values() for name in index.tensors}
    by_place: dict[str, list[str]] = defaultdict(list)
    for name, place in sorted(takes.items(), key=lambda item: item[1]):
        by_place[place].append(name)
    rules = [rule for place, names in by_place.items() for rule in rules_for(names, every_name, place)]
    return f"tensors: [{', '.join(rules)}]"


def _of_task(facts: Sequence[_Fact], indexes: Indexes, heads: Iterable[OtherHead]) -> Iterator[str]:
    """Yield the rules that give the merged model the head of the first task that has another one."""
    takes = {name: fact.take for fact in facts if fact.take for name in fact.names}
    if "nothing" not in takes.values():
        return
    for head in heads:
        if surplus := _lacking(indexes[head.task], indexes["base_model"]):
            theirs = takes | dict.fromkeys(head.unused, "nothing") | dict.fromkeys(surplus, head.task)
            yield f"For a {head.model_class}, as {head.task} is: {_rules(theirs, indexes)}."
            return


def _start(facts: Sequence[_Fact]) -> str:
    """Return how the sentence with the rules begins."""
    steps = {fact.step for fact in facts if fact.take}
    return next(step for step in (_IF_MEANT, _TO_KEEP, _AS_IT_IS) if step in steps)


def _besides(facts: Sequence[_Fact], base: CheckpointIndex, indexes: Indexes) -> str:
    """Return what else tensors of other shapes allow, such as averaging rows by their tokens."""
    resized = {name for fact in facts if fact.step == _TO_KEEP for name in fact.names}
    if not resized:
        return ""
    tokens = _by_row([info for name, info in base.tensors.items() if name in resized], base, indexes)
    other = " (or a task's name in place of base_model"
    if not tokens:
        return f"{other})"
    # config.json follows the weights, and a tokenizer does not.
    rows = (
        f"if the rows are tokens', averaged by their strings: token_rows: {json.dumps(tokens)}, or "
        "tokenizer: union for the tokens of all"
    )
    return f"{other}, and output.files_from: TASK for its tokenizer); {rows}"


def _by_row(resized: Sequence[TensorInfo], base: CheckpointIndex, indexes: Indexes) -> list[str]:
    """Return the matrices that differ in the number of rows alone, and biases of these rows."""
    tokens = [info for info in resized if _differs_in_rows(info.name, base, indexes)]
    sizes = {info.shape[0] for info in tokens}
    biases = [info for info in resized if info not in tokens and _length(info) in sizes]
    return [info.name for info in (*tokens, *biases)]


def _length(info: TensorInfo) -> int | None:
    """Return the number of rows of a tensor whose rows have one element each; None of others."""
    return info.num_elements if info.shape and num_rows(info) == info.num_elements else None


def _differs_in_rows(name: str, base: CheckpointIndex, indexes: Indexes) -> bool:
    """Say whether a matrix differs in the number of rows alone."""
    shapes = {index.tensors[name].shape[1:] for index in indexes.values() if name in index.tensors}
    return len(base.tensors[name].shape) == 2 and len(shapes) == 1


def _count(items: Collection[object]) -> str:
    return number_of(len(items), "tensor")


def _named(names: Sequence[str]) -> str:
    found = listed([shown(pattern) for pattern in grouped(names)], _MOST_SHOWN)
    return f"tensor {found}" if len(names) == 1 else f"{_count(names)} ({found})"
