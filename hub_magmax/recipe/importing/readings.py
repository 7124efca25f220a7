"""Parameters of one case of a mergekit configuration as numbers and switches, with their places."""

from __future__ import annotations

from dataclasses import dataclass

from hub_magmax.recipe.importing.cases import Case, Picked
from hub_magmax.recipe.importing.configuration import Configuration, Slice
from hub_magmax.recipe.importing.families import Family
from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.parameters import as_switch
from hub_magmax.text import shown


class LostError(Exception):
    """Something has no counterpart, which is noted."""


@dataclass(frozen=True)
class Readings:
    """Parameters of one case.

    Attributes:
        configuration: What was read.
        part: The slice.
        case: The tensors.
        family: Base model and tasks.
        notes: Where verdicts go.
    """

    configuration: Configuration
    part: Slice
    case: Case
    family: Family
    notes: Notes

    @property
    def method(self) -> str:
        return self.configuration.method_name

    def lost(self, why: str, at: Marked | None = None) -> LostError:
        """Note that something has no counterpart, by default the method; return what ends the reading."""
        self.notes.lose(at or self.configuration.method_at, why)
        return LostError(why)

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

    def switch(self, name: str) -> bool:
        """Return a shared parameter that is true or false.

        Raises:
            LostError: If it is neither.
        """
        picked = self.case.picked[None, name]
        found = as_switch(picked.value.first) if picked.value and picked.value.is_constant else None
        if found is None:
            raise self.lost("neither true nor false", self.place_of(name))
        return found

    def number(self, name: str) -> float:
        """Return a shared parameter that is one number.

        Raises:
            LostError: If it is missing, or no number.
        """
        return self._number(name, self.case.picked[None, name], self.configuration.method_at)

    def each(self, name: str) -> dict[int, float]:
        """Return a parameter of every model that has it, by the model's index.

        Raises:
            LostError: If one is missing, or no number.
        """
        found, lost = {}, None
        for (number, slot), picked in self.case.picked.items():
            if slot == name and number is not None:
                try:
                    found[number] = self._number(name, picked, self.part.inputs[number].at)
                except LostError as error:  # after all of them: whatever is lost is noted
                    lost = error
        if lost is not None:
            raise lost
        return found

    def _number(self, name: str, picked: Picked, owner: Marked) -> float:
        if picked.value is None:
            raise self.lost(f"no {name}, which {self.method} needs, also in mergekit", owner)
        found = picked.value.number()
        if found is not None:
            return found
        at = picked.condition.at if picked.condition else owner
        if picked.value.numbers() is not None:
            raise self.lost(f"a {name} that differs between blocks", at)
        raise self.lost(f"{shown(picked.value.first)} is no number", at)
