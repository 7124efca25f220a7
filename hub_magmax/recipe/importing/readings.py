"""Parameters of one case of a mergekit configuration as numbers and switches, with their places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hub_magmax.recipe.blocks import block_of
from hub_magmax.recipe.importing.cases import Case, Picked
from hub_magmax.recipe.importing.configuration import Configuration, Slice
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.parameters import Value, as_switch, constant
from hub_magmax.recipe.importing.regions import Region
from hub_magmax.text import shown


class LostError(Exception):
    """Something has no counterpart, which is noted."""


@dataclass(frozen=True)
class Readings:
    """Parameters of one case.

    Attributes:
        configuration: What was read.
        region: Where the tensors come from.
        case: The tensors.
        family: Base model and tasks.
        notes: Where verdicts go.
    """

    configuration: Configuration
    region: Region
    case: Case
    family: Family
    notes: Notes

    @property
    def method(self) -> str:
        return self.configuration.method_name

    @property
    def part(self) -> Slice:
        """The slice, or the list of models."""
        return self.region.part

    @property
    def has_base(self) -> bool:
        """Whether mergekit has a base model here, and none of the models has to play it."""
        return self.part.base is not None

    @property
    def with_base(self) -> Readings:
        """The same with the base model as a task."""
        return replace(self, family=self.family.with_base_as_task())

    def lost(self, why: str, *places: Marked) -> LostError:
        """Note that something has no counterpart, by default the method; return what ends the reading."""
        for at in places or (self.configuration.method_at,):
            self.notes.lose(at, why)
        return LostError(why)

    def warn(self, why: str) -> None:
        """Note something about the method."""
        self.notes.add(self.configuration.method_at, "warning", why)

    def place_of(self, name: str) -> Marked:
        """Return where a shared parameter stands, or else the method, whose default counts."""
        condition = self.case.picked[None, name].condition
        return condition.at if condition else self.configuration.method_at

    def places_of_each(self, name: str) -> list[Marked]:
        """Return where a parameter of models stands."""
        found = (one.condition for (_, slot), one in self.case.picked.items() if slot == name)
        return [condition.at for condition in found if condition is not None]

    def is_written(self, name: str) -> bool:
        return self.case.picked[None, name].condition is not None

    def reads(self, name: str) -> bool:
        """Say whether the method has a parameter."""
        how = self.configuration.method
        return name in how.each or name in how.shared

    def switch(self, name: str) -> bool:
        """Return a shared parameter that is true or false.

        Raises:
            LostError: If it is neither.
        """
        picked = self.case.picked[None, name].value
        points = () if picked is None else picked.outside.points if self._is_outside else picked.points
        found = {as_switch(point) for point in points}
        if not found or None in found:
            raise self.lost("neither true nor false", self.place_of(name))
        if len(found) > 1:
            raise self.lost(f"a {name} that is true in some blocks, and false in others", self.place_of(name))
        return bool(found.pop())

    def shared(self, name: str) -> Value:
        """Return a shared parameter in numbers.

        Raises:
            LostError: If it is missing, or no number.
        """
        return self._numbers(name, self.case.picked[None, name], self.configuration.method_at)

    def number(self, name: str) -> float:
        """Return a shared parameter that is one number.

        Raises:
            LostError: If it is missing, no number, or differs between blocks.
        """
        found = self.shared(name)
        if not found.is_constant:
            raise self.lost(f"a {name} that differs between blocks", self.place_of(name))
        return float(found.first)

    def each(self, name: str) -> dict[int, Value]:
        """Return a parameter of every model that has it, in numbers, by the model's index.

        Raises:
            LostError: If one is missing, or no number.
        """
        found, lost = {}, None
        for (number, slot), picked in self.case.picked.items():
            if slot == name and number is not None:
                try:
                    found[number] = self._numbers(name, picked, self.part.inputs[number].at)
                except LostError as error:  # after all of them: whatever is lost is noted
                    lost = error
        if lost is not None:
            raise lost
        return found

    def each_by_task(self, name: str) -> dict[str, Value]:
        """Return a parameter of models by task, of those that are one.

        Raises:
            LostError: If one is missing, or no number.
        """
        tasks = {number: self.tasks_of(number) for number in range(len(self.part.inputs))}
        return {tasks[n][0]: value for n, value in self.each(name).items() if len(tasks[n]) == 1}

    def tasks_of(self, number: int) -> tuple[str, ...]:
        """Return the tasks whose vectors sum to that of a model."""
        return self.family.parts[self.part.inputs[number].reference]

    @property
    def base_tasks(self) -> tuple[str, ...]:
        """The tasks that a slice's own base model is; none where it is the recipe's base model."""
        return () if self.part.base is None else self.family.parts.get(self.part.base, ())

    def numbers(self) -> Iterable[int]:
        """Return the indices of the models that are not the base model."""
        return (n for n, one in enumerate(self.part.inputs) if not one.is_base)

    def _numbers(self, name: str, picked: Picked, owner: Marked) -> Value:
        if picked.value is None:
            raise self.lost(f"no {name}, which {self.method} needs, also in mergekit", owner)
        found = picked.value.in_numbers()
        if found is None:
            at = picked.condition.at if picked.condition else owner
            wrong = next(point for point in picked.value.points if constant_of(point) is None)
            raise self.lost(f"{shown(wrong)} is no number", at)
        return found.outside if self._is_outside else found

    @property
    def _is_outside(self) -> bool:
        """Whether no tensor is in a block, so that a gradient stands at its beginning."""
        names = self.case.names
        return self.region.is_outside or (bool(names) and all(block_of(name) is None for name in names))


def constant_of(point: object) -> Value | None:
    """Return a point as a value; None where it is no number."""
    found = Value((point,)).in_numbers()
    return None if found is None else constant(found.first)
