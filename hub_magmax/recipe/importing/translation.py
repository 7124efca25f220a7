"""Translation of a mergekit configuration into a recipe, by a table of mergekit's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.recipe.importing import geometry, means, trimming
from hub_magmax.recipe.importing.cases import Case, cases_of
from hub_magmax.recipe.importing.configuration import Configuration, places_of
from hub_magmax.recipe.importing.counterparts import Counterpart, Maker, one_by_one
from hub_magmax.recipe.importing.emission import Merged, NamesNeededError, NoSharesError, method_and_rules
from hub_magmax.recipe.importing.families import Family, family_of
from hub_magmax.recipe.importing.findings import Finding, Notes, Verdict, worst
from hub_magmax.recipe.importing.model_facts import Models
from hub_magmax.recipe.importing.output_keys import OutputReader
from hub_magmax.recipe.importing.readings import LostError, Readings
from hub_magmax.recipe.importing.regions import Layout, Region, layout_of
from hub_magmax.recipe.importing.stacking import check_stack, layers_of, without_tasks
from hub_magmax.recipe.importing.tokenizers import TokenizerReader
from hub_magmax.recipe.importing.verdicts import judge
from hub_magmax.registry import METHODS


@dataclass(frozen=True)
class Imported:
    """What a configuration of another tool becomes.

    Attributes:
        findings: By line.
        recipe: Plain values; None where something that decides the weights has no counterpart.
        remarks: What changes the result, and does not stand in the file.
        draws: Whether single elements are a matter of chance: they are drawn, or many are equal.
        precision: dtype in which mergekit computes, as safetensors writes it.
    """

    findings: tuple[Finding, ...]
    recipe: Mapping[str, Any] | None
    remarks: tuple[str, ...] = ()
    draws: bool = False
    precision: str = "F32"

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
            name: [models.facts(place) for place in reference.places]
            for name, reference in places_of(configuration).items()
        }
        self._facts = {name: facts[0] for name, facts in found.items() if facts[0] is not None}

    def _check_adapters(self) -> None:
        """Note adapters that are named as models."""
        for part in self._config.slices:
            for one in part.inputs:
                facts = self._facts.get(one.reference.written)
                if facts is not None and facts.is_adapter:
                    why = "an adapter, which mergekit takes as MODEL+ADAPTER alone"
                    self._notes.lose(one.at, why)

    def recipe(self) -> dict[str, Any] | None:
        self._check_adapters()
        layout = layout_of(self._config, self._facts, self._notes)
        check_stack(layout, self._facts, self._notes)
        family = family_of(self._config, self._notes)
        regions = self._cases(layout)
        if family is None or regions is None:
            return None
        found = self._counterparts(regions, family)
        if any(one.counts_base for _, cases in found or () for _, one in cases):
            family = family.with_base_as_task()
        output = self._output(family)
        if found is None or not self._notes.is_whole:
            return None
        return self._written(layout, found, family, output)

    def _cases(self, layout: Layout) -> list[tuple[Region, tuple[Case, ...]]] | None:
        """Return the cases of every region; None, noted, where there are too many."""
        every = [(region, cases_of(region, self._config.method)) for region in layout.regions]
        found = [(region, cases) for region, cases in every if cases is not None]
        if len(found) == len(every):
            return found
        why = "too many filters, or filters of which a name holds several where no names could be read"
        self._notes.lose(self._config.method_at, why)
        return None

    def _counterparts(
        self, regions: Sequence[tuple[Region, Sequence[Case]]], family: Family
    ) -> list[Merged] | None:
        """Return what merges each case of each region, and note a verdict on every parameter."""
        every = [
            Readings(self._config, region, case, family, self._notes)
            for region, cases in regions
            for case in cases
        ]
        found = counterparts_of(every)
        neutral = found[0].neutral if found else ()
        judge(self._config, [read.case for read in every], self._notes, neutral)
        if found is None:
            return None
        rest = iter(found)
        return [(region, [(case, next(rest)) for case in cases]) for region, cases in regions]

    def _output(self, family: Family) -> dict[str, Any]:
        """Return `output`, and `tokenizer` where rows are matched by token."""
        is_copy = self._config.method_name == "passthrough"
        base = self._models.facts(family.base)
        inputs = {one.reference.written for part in self._config.slices for one in part.inputs}
        merged = {name: facts for name, facts in self._facts.items() if name in inputs}
        reader = OutputReader(self._config, merged, self._notes, is_copy)
        keys = reader.output(base.dtypes.values() if base else ())
        tokenizer = TokenizerReader(self._config, self._models, family, self._notes).key()
        return {**tokenizer, "output": {"path": self._output_path(), **keys, **self._files(family)}}

    def _files(self, family: Family) -> dict[str, str]:
        """Return whose config is copied, where the base model at the top is only a task of all slices."""
        top = self._config.base
        if top is None or top.model.plain == family.base.plain:
            return {}
        own = [name for name, place in family.tasks.items() if place.plain == top.model.plain]
        return {"files_from": own[0]} if own else {}

    def _written(
        self, layout: Layout, merged: Sequence[Merged], family: Family, output: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return the recipe; None, noted, where it cannot say this."""
        layers = layers_of(layout, merged, family, self._notes)
        if not self._notes.is_whole:
            return None
        try:
            how = method_and_rules(merged, is_stack=layers is not None)
        except NoSharesError:
            why = "weights that sum to 0 in embedding, final norm or head, where mergekit divides by 1"
            self._notes.lose(self._config.method_at, why)
            return None
        except NamesNeededError:
            why = "other numbers before the blocks than after them, where no names of tensors could be read"
            self._notes.lose(self._config.method_at, why)
            return None
        stack = {} if layers is None else {"layers": layers}
        return {
            "schema": 1,
            "base_model": self._models.written(family.base),
            **({} if without_tasks(family, layers) else {"tasks": self._tasks(family)}),
            **how,
            **stack,
            **output,
        }

    def _tasks(self, family: Family) -> list[dict[str, str]]:
        """Return the tasks; one model alone is copied, and is a task too."""
        places = family.tasks or {"copy": family.base}
        return [{"name": name, "model": self._models.written(place)} for name, place in places.items()]

    def _output_path(self) -> str:
        """Return the folder of the output: a merge of several in a file is called by its name."""
        at = self._config.top.get("name")
        if at is None:
            return "merged"
        self._notes.add(at, "exact", "output.path")
        return str(at.value)


_MAKERS: Mapping[str, Maker] = {
    "linear": means.linear,
    "task_arithmetic": means.task_arithmetic,
    "passthrough": one_by_one(means.copied),
    "ties": one_by_one(trimming.elected),
    "dare_linear": one_by_one(trimming.summed),
    "dare_ties": one_by_one(trimming.elected),
    "breadcrumbs": one_by_one(trimming.summed),
    "breadcrumbs_ties": one_by_one(trimming.elected),
    "della": one_by_one(trimming.elected),
    "della_linear": one_by_one(trimming.summed),
    "slerp": geometry.slerp,
    "nuslerp": one_by_one(geometry.nuslerp),
    "multislerp": one_by_one(geometry.multislerp),
    "karcher": one_by_one(geometry.karcher),
    "model_stock": one_by_one(geometry.model_stock),
    "arcee_fusion": one_by_one(geometry.arcee_fusion),
    "nearswap": one_by_one(geometry.nearswap),
    "sce": one_by_one(geometry.sce),
    "ram": one_by_one(geometry.ram),
    "ramplus_tl": one_by_one(geometry.ram),
}


def counterparts_of(every: Sequence[Readings]) -> list[Counterpart] | None:
    """Return how each case is merged, all by one method; None, noted, where nothing computes the same."""
    first = every[0]
    maker = _MAKERS.get(first.method)
    try:
        found = _unchanged(every) or (maker(every) if maker else [])
        if not found or found[0].method not in METHODS.built_in:
            raise first.lost(f"there is no method here that computes what {first.method} does")
    except LostError:
        return None
    for one in found:
        first.notes.add(first.configuration.method_at, one.verdict, one.why)
    return found


def _unchanged(every: Sequence[Readings]) -> list[Counterpart]:
    """Return copies of the base model, where nothing is added to it; nothing where a model takes part."""
    first = every[0]
    if first.family.tasks or not first.configuration.method.adds:
        return []
    one_by_one(lambda read: read.each("weight"))(every)
    why = "no other model than the base model, which is copied"
    return [Counterpart("single_task", take="base_model", verdict="exact", why=why) for _ in every]
