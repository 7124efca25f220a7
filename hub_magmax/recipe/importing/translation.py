"""Translation of a mergekit configuration into a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hub_magmax.recipe.importing.cases import Case, Picked, cases_of
from hub_magmax.recipe.importing.configuration import Configuration, Slice, places_of
from hub_magmax.recipe.importing.families import Family, family_of
from hub_magmax.recipe.importing.findings import Finding, Notes, Verdict, worst
from hub_magmax.recipe.importing.model_facts import ModelFacts, Models
from hub_magmax.recipe.importing.output_keys import OutputReader, tokenizer_of
from hub_magmax.recipe.importing.parameters import as_switch
from hub_magmax.recipe.importing.verdicts import judge
from hub_magmax.text import shown

#: Below this a sum of weights counts as 0, and mergekit divides by 1.
_ZERO = 1e-8


@dataclass(frozen=True)
class Imported:
    """What a configuration of another tool becomes.

    Attributes:
        findings: By line.
        recipe: Plain values; None where something that decides the weights has no counterpart.
        remarks: What changes the result, and does not stand in the file.
    """

    findings: tuple[Finding, ...]
    recipe: Mapping[str, Any] | None
    remarks: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The verdict on the whole: that of its worst line."""
        return worst(self.findings)


@dataclass(frozen=True)
class How:
    """A method of a recipe with its numbers.

    Attributes:
        method: Name, options and scaling.
        kind: `weights` or `coefficients`.
        numbers: By task.
        verdict: Of the method as a whole.
        why: What it does.
        rules: For `tensors`.
        neutral: Parameters that change nothing.
    """

    method: Mapping[str, Any]
    kind: str
    numbers: Mapping[str, float]
    verdict: Verdict
    why: str
    rules: tuple[Mapping[str, Any], ...] = ()
    neutral: tuple[str, ...] = ()


def translate(configuration: Configuration, models: Models, notes: Notes) -> dict[str, Any] | None:
    """Return the recipe of a configuration, as far as it has one, and note a verdict on every line.

    Args:
        configuration: What was read.
        models: Looks checkpoints up.
        notes: Where verdicts go.

    Returns:
        Plain values of a recipe; None where a part has no counterpart.
    """
    return _Translator(configuration, models, notes).recipe()


class _Translator:
    def __init__(self, configuration: Configuration, models: Models, notes: Notes) -> None:
        self._config, self._models, self._notes = configuration, models, notes
        found = {
            name: [self._models.facts(place) for place in reference.places]
            for name, reference in places_of(configuration).items()
        }
        self._facts: dict[str, ModelFacts] = {
            name: facts[0] for name, facts in found.items() if facts[0] is not None
        }

    def recipe(self) -> dict[str, Any] | None:
        part = self._whole()
        if part is None:
            return None
        facts = self._facts_of(part)
        cases = cases_of(part, self._config.method, facts.names if facts else ())
        if cases is None:
            self._notes.lose(self._config.method_at, "too many filters to tell their tensors apart by name")
            return None
        family = family_of(part, self._config.method_name, self._notes)
        how = self._how(part, cases, family) if family else None
        judge(self._config, [(part, cases)], self._notes, how.neutral if how else ())
        output = self._output(part, family)
        if family is None or how is None or not self._notes.is_whole:
            return None
        return self._written(family, how, output)

    def _facts_of(self, part: Slice) -> ModelFacts | None:
        """Return what is known of a model of a slice whose names all have."""
        known = (self._facts.get(one.reference.written) for one in part.inputs)
        return next((facts for facts in known if facts is not None), None)

    def _whole(self) -> Slice | None:
        """Return the one slice, if it has all blocks of all models."""
        part, *others = self._config.slices
        if others:
            for other in self._config.slices:
                self._notes.lose(other.at, "blocks of models are not put together here")
            return None
        for one in part.inputs:
            if one.blocks_at is None or one.blocks is None:
                continue
            facts = self._facts.get(one.reference.written)
            count = facts.num_blocks if facts else None
            if count is None:
                why = f"the number of blocks of {one.reference.written} could not be read, so that these may "
                self._notes.lose(one.blocks_at, f"{why}be a part of them")
            elif one.blocks == (0, count):
                self._notes.add(
                    one.blocks_at, "exact", f"all {count} blocks, as if the model was named alone"
                )
            else:
                self._notes.lose(one.blocks_at, f"a part of {count} blocks: blocks are not put together here")
        return part

    # Values of parameters.

    def _number(self, picked: Picked, part: Slice, name: str, number: int | None) -> float | None:
        """Return a parameter that is one number; None, noted, where it is missing or none."""
        if picked.value is None:
            at = part.inputs[number].at if number is not None else self._config.method_at
            self._notes.lose(at, f"no {name}, which {self._config.method_name} needs, also in mergekit")
            return None
        found = picked.value.number()
        if found is None and picked.condition is not None:
            is_gradient = picked.value.numbers() is not None
            text = (
                f"a {name} that differs between blocks"
                if is_gradient
                else f"{shown(picked.value.first)} is no number"
            )
            self._notes.lose(picked.condition.at, text)
        return found

    def _switch(self, case: Case, name: str) -> bool | None:
        picked = case.picked[None, name]
        found = as_switch(picked.value.first) if picked.value and picked.value.is_constant else None
        if found is None and picked.condition is not None:
            self._notes.lose(picked.condition.at, "neither true nor false")
        return found

    def _each(self, part: Slice, case: Case, name: str) -> dict[int, float] | None:
        """Return a parameter of every model that has it; None, noted, where one has none."""
        found = {
            number: self._number(picked, part, name, number)
            for (number, slot), picked in case.picked.items()
            if slot == name and number is not None
        }
        return None if None in found.values() else {n: v for n, v in found.items() if v is not None}

    # Methods.

    def _how(self, part: Slice, cases: Sequence[Case], family: Family) -> How | None:
        if len(cases) > 1:
            for case in cases:
                for (_, name), picked in case.picked.items():
                    if picked.condition is not None and picked.condition.filter is not None:
                        self._notes.lose(picked.condition.at, f"a {name} that differs between tensors")
            return None
        method = self._config.method_name
        makers = {
            "linear": self._linear,
            "task_arithmetic": self._summed,
            "dare_linear": self._summed,
            "breadcrumbs": self._summed,
            "ties": self._elected,
            "dare_ties": self._elected,
            "passthrough": self._copied,
        }
        if method not in makers:
            self._notes.lose(
                self._config.method_at, f"there is no method here that computes what {method} does"
            )
            return None
        how = makers[method](part, cases[0], family)
        if how is not None:
            self._notes.add(self._config.method_at, how.verdict, how.why)
        return how

    def _linear(self, part: Slice, case: Case, family: Family) -> How | None:
        weights, normalize = self._each(part, case, "weight"), self._switch(case, "normalize")
        if weights is None or normalize is None:
            return None
        total = math.fsum(weights.values())
        picked = case.picked[None, "normalize"].condition
        if normalize and abs(total) < _ZERO:
            self._notes.lose(self._config.method_at, "weights that sum to 0, where mergekit writes NaN")
            return None
        if not normalize and abs(total - 1) > 1e-9:
            at = picked.at if picked else self._config.method_at
            self._notes.lose(at, f"weights that sum to {total:g} scale the base model too")
            return None
        numbers = self._by_task(weights, family, total)
        neutral = ("normalize",) if abs(total - 1) <= 1e-9 else ()
        return replace(self._mean(numbers, 1.0), neutral=neutral)

    def _by_task(self, weights: Mapping[int, float], family: Family, divisor: float) -> dict[str, float]:
        """Return the coefficient of every task's vector."""
        found = dict.fromkeys(family.tasks, 0.0)
        for number, weight in weights.items():
            for task in family.parts.get(number, ()):
                found[task] += weight / divisor
        return found

    def _mean(self, numbers: Mapping[str, float], scaling: float) -> How:
        """Return a mean of task vectors, or their sum where a number is negative."""
        total = math.fsum(numbers.values())
        if total > 0 and min(numbers.values()) >= 0:
            shares = {task: number / total for task, number in numbers.items()}
            method = {"name": "average", "scaling": short(scaling * total)}
            return How(method, "weights", shares, "rounding", "the weighted mean of the models")
        return How(
            {"name": "task_arithmetic", "scaling": short(scaling)},
            "coefficients",
            numbers,
            "rounding",
            "the weighted mean of the models, as a sum of task vectors",
        )

    def _summed(self, part: Slice, case: Case, family: Family) -> How | None:
        method = self._config.method_name
        weights, normalize = self._each(part, case, "weight"), self._switch(case, "normalize")
        scaling = self._number(case.picked[None, "lambda"], part, "lambda", None)
        if weights is None or normalize is None or scaling is None or not self._rescales(case):
            return None
        total = math.fsum(weights.values())
        divisor = total if normalize and abs(total) >= _ZERO else 1.0
        numbers = self._by_task(weights, family, divisor)
        options = self._options(part, case, family)
        if options is None:
            return None
        why = "a sum of task vectors" if divisor == 1.0 else "a mean of task vectors"
        name = {"dare_linear": "dare"}.get(method, method)
        if options.get("density") == 1:
            why, name, options = f"{why}: nothing is dropped", "task_arithmetic", {}
        verdict: Verdict = "in expectation" if name == "dare" else "rounding"
        if verdict == "in expectation":
            why += "; mergekit scales what is left to the L1 norm that was there, here by 1/density"
        return How(
            {"name": name, **options, "scaling": short(scaling)}, "coefficients", numbers, verdict, why
        )

    def _elected(self, part: Slice, case: Case, family: Family) -> How | None:
        method = self._config.method_name
        weights, normalize = self._each(part, case, "weight"), self._switch(case, "normalize")
        scaling = self._number(case.picked[None, "lambda"], part, "lambda", None)
        if weights is None or normalize is None or scaling is None or not self._rescales(case):
            return None
        if not normalize:
            picked = case.picked[None, "normalize"].condition
            default = "" if picked else f" (the default of {method})"
            why = f"normalize: false{default} sums the tasks that agree, where a method here takes their mean"
            self._notes.lose(picked.at if picked else self._config.method_at, why)
            return None
        numbers = self._by_task(weights, family, 1.0)
        total = math.fsum(numbers.values())
        if total <= 0 or min(numbers.values()) < 0:
            self._notes.lose(self._config.method_at, "weights below 0 are no shares of the tasks")
            return None
        options = self._options(part, case, family)
        if options is None:
            return None
        shares = {task: number / total for task, number in numbers.items()}
        verdict: Verdict = "in expectation" if method == "dare_ties" else "rounding"
        why = "the mean of the tasks that agree in sign"
        if options.get("density", 1) < 1 and method == "ties":
            more = "one element of a tensor more is kept where density times its size is no whole number"
            self._notes.add(self._config.method_at, "warning", more)
        return How({"name": method, **options, "scaling": short(scaling)}, "weights", shares, verdict, why)

    def _rescales(self, case: Case) -> bool:
        """Note where `rescale` is not what the method here does; only what was dropped is scaled up."""
        found, default = self._switch(case, "rescale"), self._config.method.shared["rescale"]
        picked = case.picked[None, "rescale"].condition
        if found is default or found is None or "density" not in self._config.method.each:
            return found is not None
        if picked:
            self._notes.lose(picked.at, f"{self._config.method_name} here always does, or never does")
        return False

    def _options(self, part: Slice, case: Case, family: Family) -> dict[str, float] | None:
        """Return density and outliers, which are the same for all tasks."""
        found: dict[str, float] = {}
        for name in ("density", "gamma"):
            if name not in self._config.method.each or self._config.method_name == "task_arithmetic":
                continue
            values = self._each(part, case, name)
            if values is None:
                return None
            own = {value for number, value in values.items() if family.parts[number]}
            if len(own) > 1:
                for (number, slot), picked in case.picked.items():
                    if slot == name and number is not None and picked.condition:
                        self._notes.lose(picked.condition.at, f"a {name} of its own for each model")
                return None
            found[name] = own.pop() if own else 1.0
        return self._bounded(case, found)

    def _bounded(self, case: Case, found: dict[str, float]) -> dict[str, float] | None:
        if "density" in found and found["density"] <= 0:
            for (_, slot), picked in case.picked.items():
                if slot == "density" and picked.condition:
                    self._notes.lose(picked.condition.at, "a density is above 0: nothing would be left")
            return None
        if "density" in found:
            found["density"] = min(found["density"], 1.0)
        if "gamma" in found:
            found["outliers"] = short(max(0.0, min(found.pop("gamma"), 1 - found["density"])))
        return found

    def _copied(self, part: Slice, case: Case, family: Family) -> How | None:
        picked = case.picked[0, "scale"]
        if len(part.inputs) != 1:
            self._notes.lose(part.at, "passthrough takes one model, also in mergekit")
            return None
        if picked.condition and picked.condition.value.number() != 1:
            self._notes.lose(picked.condition.at, "tensors times a factor")
            return None
        if not family.tasks:
            method = {"name": "single_task", "scaling": 1.0}
            rules = ({"match": "*", "take": "base_model"},)
            return How(method, "weights", {}, "exact", "a copy, bit for bit", rules)
        (task,) = family.tasks
        method = {"name": "average", "scaling": 1.0}
        return How(method, "weights", {task: 1.0}, "rounding", "the adapter added to its model")

    # The recipe.

    def _output(self, part: Slice, family: Family | None) -> dict[str, Any]:
        merged = {
            name: self._facts[name] for one in part.inputs if (name := one.reference.written) in self._facts
        }
        is_copy = self._config.method_name == "passthrough"
        base = self._models.facts(family.base) if family else None
        facts = [self._facts.get(one.reference.written) for one in part.inputs]
        tokenizer_of(self._config, facts, self._notes)
        reader = OutputReader(self._config, merged, self._notes, is_copy)
        return reader.output(base.dtypes.values() if base else ())

    def _written(self, family: Family, how: How, output: Mapping[str, Any]) -> dict[str, Any]:
        written = self._models.written
        tasks = {name: written(place) for name, place in family.tasks.items()}
        found: dict[str, Any] = {
            "schema": 1,
            "base_model": written(family.base),
            "tasks": [{"name": name, "model": model} for name, model in tasks.items()],
            "method": dict(how.method),
        }
        if not tasks:
            found["tasks"] = [{"name": "copy", "model": written(family.base)}]
        if how.numbers:
            found["preference"] = {how.kind: {name: short(number) for name, number in how.numbers.items()}}
        if how.rules:
            found["tensors"] = [dict(rule) for rule in how.rules]
        return found | {"output": {"path": "merged", **output}}


def short(value: float) -> float:
    """Return a number as a person would write it, where nothing is lost that counts."""
    return float(f"{value:.12g}")
