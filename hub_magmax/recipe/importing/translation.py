"""Translation of a mergekit configuration into a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing.cases import Case, cases_of
from hub_magmax.recipe.importing.configuration import Configuration, Slice, places_of
from hub_magmax.recipe.importing.counterparts import Counterpart, counterpart_of, short
from hub_magmax.recipe.importing.families import Family, family_of
from hub_magmax.recipe.importing.findings import Finding, Notes, Verdict, worst
from hub_magmax.recipe.importing.model_facts import ModelFacts, Models
from hub_magmax.recipe.importing.output_keys import OutputReader, tokenizer_of
from hub_magmax.recipe.importing.readings import Readings
from hub_magmax.recipe.importing.verdicts import judge


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
        how = self._counterpart(part, cases, family) if family else None
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

    def _counterpart(self, part: Slice, cases: Sequence[Case], family: Family) -> Counterpart | None:
        if len(cases) == 1:
            return counterpart_of(Readings(self._config, part, cases[0], family, self._notes))
        for case in cases:
            for (_, name), picked in case.picked.items():
                if picked.condition is not None and picked.condition.filter is not None:
                    self._notes.lose(picked.condition.at, f"a {name} that differs between tensors")
        return None

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

    def _written(self, family: Family, how: Counterpart, output: Mapping[str, Any]) -> dict[str, Any]:
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
