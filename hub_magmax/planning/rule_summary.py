"""Summary of the rules by which tensors are merged with numbers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hub_magmax.planning.plan import Plan, TensorJob
from hub_magmax.recipe.blocks import block_of, depths_of
from hub_magmax.recipe.merge_values import MergeValues
from hub_magmax.recipe.tensor_rules import TensorRule
from hub_magmax.text import shown


def described_rules(plan: Plan) -> list[dict[str, Any]]:
    """Return the rules for programs, each with its numbers from the first block to the last.

    Returns:
        Position in the recipe, glob and blocks of each rule, the number of tensors it decides about, and
        `values`: for each set of numbers the first tensor that has it, how many have it, and what the rule
        names of `weights`, `coefficients` (what task vectors are multiplied by), `scaling` and `options`.
    """
    depths = depths_of(job.tensor for job in plan.jobs)

    def depth(job: TensorJob) -> float:
        block = block_of(job.tensor)
        return -1.0 if block is None else block.number / max(depths[block.stack] - 1, 1)

    decided: dict[int, list[TensorJob]] = {}
    for job in sorted((job for job in plan.jobs if job.uses_values), key=depth):
        if (own := plan.own_values.get(job.tensor)) is not None:
            decided.setdefault(own.rule, []).append(job)
    return [_described(plan, number, decided[number]) for number in sorted(decided)]


def _described(plan: Plan, number: int, jobs: Sequence[TensorJob]) -> dict[str, Any]:
    rule = plan.recipe.tensors[number]
    sets: dict[Any, list[TensorJob]] = {}
    for job in jobs:
        sets.setdefault(plan.own_values[job.tensor], []).append(job)
    return {
        "rule": number,
        "match": rule.match,
        "layers": None if rule.layers is None else [*rule.layers],
        "tensors": len(jobs),
        "values": [
            {
                "tensor": same[0].tensor,
                "tensors": len(same),
                **_values(rule, plan, plan.values_of(same[0].tensor)),
            }
            for same in sets.values()
        ],
    }


def _values(rule: TensorRule, plan: Plan, values: MergeValues) -> dict[str, Any]:
    """Return the numbers that a rule names."""
    found: dict[str, Any] = {}
    if rule.weights is not None:
        found["weights"] = dict(zip(plan.lock.tasks, values.weights, strict=True))
    if rule.coefficients is not None:
        numbers = (weight * len(values.weights) for weight in values.weights)
        found["coefficients"] = dict(zip(plan.lock.tasks, numbers, strict=True))
    if rule.scaling is not None:
        found["scaling"] = values.scaling
    if rule.options is not None:
        found["options"] = {key: values.options[key] for key in rule.options}
    return found


def rule_rows(plan: Plan) -> Iterator[str]:
    """Yield a line for each rule: its tensors, and its first and its last numbers."""
    for found in described_rules(plan):
        layers = "" if found["layers"] is None else " in layers [{}, {}]".format(*found["layers"])
        count = f"{found['tensors']:,} tensor{'s' if found['tensors'] > 1 else ''}"
        first, last = found["values"][0], found["values"][-1]
        numbers = "; ".join(
            _told(key, first[key], last[key]) for key in first if key not in ("tensor", "tensors")
        )
        more = f"; {len(found['values'])} sets of numbers" if len(found["values"]) > 2 else ""
        yield f"{shown(found['match'])}{layers}: {count}, {numbers}{more}"


def _told(key: str, first: Any, last: Any) -> str:
    """Return a number or several in words, with the last ones where they are others."""
    text, other = _number(first), _number(last)
    return f"{key} {text}" if text == other else f"{key} {text} … {other}"


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(item)}" for name, item in value.items())
    return f"{value:.4g}" if type(value) in (int, float) else str(value)
