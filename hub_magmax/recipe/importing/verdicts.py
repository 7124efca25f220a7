"""Verdicts on the parameters of a mergekit configuration: those that count, and those that never do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hub_magmax.errors import KeyPath
from hub_magmax.recipe.importing.cases import Case
from hub_magmax.recipe.importing.configuration import Configuration
from hub_magmax.recipe.importing.counterparts import ZERO
from hub_magmax.recipe.importing.findings import Notes, Verdict
from hub_magmax.recipe.importing.mergekit_methods import MERGEKIT_METHODS, SWITCHES
from hub_magmax.recipe.importing.parameters import (
    EVERYTHING,
    Condition,
    Setting,
    Value,
    as_switch,
    can_match,
    is_exact_factor,
    is_whole,
    settings_of,
)
from hub_magmax.text import shown

#: What parameters become, where their values count.
_MEANINGS = {
    "weight": "counts in the preference",
    "density": "method.density",
    "gamma": "method.outliers",
    "lambda": "method.scaling",
    "normalize": "decides between a mean and a sum",
    "rescale": "decides whether what is left is scaled up",
}

#: Of a density that is no share.
_ABOVE_1 = "above 1, where mergekit keeps every element as with 1: a density is a share, such as 0.5"


def judge(
    configuration: Configuration,
    cases: Sequence[Case],
    notes: Notes,
    neutral: Sequence[str] = (),
) -> None:
    """Note a verdict for every parameter that mergekit reads.

    Args:
        configuration: What was read.
        cases: Of all regions.
        notes: Where they go.
        neutral: Parameters whose value changes nothing here.
    """
    method = MERGEKIT_METHODS[configuration.method_name]
    idle = _idle_gammas(cases)
    of_one = _Judge(configuration.method_name, _used(cases), idle, tuple(neutral), notes)
    for name in {**method.each, **method.shared}:
        for setting in _written(configuration, name):
            of_one.setting(name, setting)


def _used(cases: Sequence[Case]) -> frozenset[KeyPath]:
    """Return the places of values that count for a tensor."""
    picked = (one.condition for case in cases for one in case.picked.values())
    return frozenset(condition.at.path for condition in picked if condition is not None)


def _idle_gammas(cases: Sequence[Case]) -> frozenset[KeyPath]:
    """Return the places of values of gamma beside a density of 1, which drops nothing."""
    found: dict[KeyPath, bool] = {}
    for case in cases:
        for (number, name), picked in case.picked.items():
            if name == "gamma" and picked.condition is not None:
                density = case.picked[number, "density"].value
                is_idle = density is not None and is_whole(density)
                found[picked.condition.at.path] = is_idle and found.get(picked.condition.at.path, True)
    return frozenset(path for path, is_idle in found.items() if is_idle)


def _written(configuration: Configuration, name: str) -> Iterator[Setting]:
    """Yield a parameter everywhere, each place once."""
    found: dict[KeyPath, Setting] = {}
    for part in configuration.slices:
        for levels in (part.levels, *(one.levels for one in part.inputs)):
            found |= {setting.at.path: setting for setting in settings_of(levels, name)}
    yield from found.values()


class _Judge:
    """Verdicts on the parameters of one method."""

    def __init__(
        self,
        method: str,
        used: frozenset[KeyPath],
        idle: frozenset[KeyPath],
        neutral: tuple[str, ...],
        notes: Notes,
    ) -> None:
        self._name, self._used, self._idle, self._neutral, self._notes = method, used, idle, neutral, notes
        self._method = MERGEKIT_METHODS[method]

    def setting(self, name: str, setting: Setting) -> None:
        """Note a parameter, its conditions and their filters."""
        for condition in setting.conditions:
            if condition.filter_at is not None:
                self._filter(name, condition)
            if condition.at.path not in self._used:
                why = "never used: every tensor finds a value before this one"
                self._notes.add(condition.at, "exact", why)
            elif condition.at.path in self._idle:
                why = "the density is 1, and then mergekit drops nothing, outliers included"
                self._notes.add(condition.at, "warning", why)
            else:
                self._value(name, condition)
        if setting.at.is_mapping or (setting.at.is_list and any(c.filter_at for c in setting.conditions)):
            self._notes.add(
                setting.at, self._worst(name, setting), "the first filter that a name holds counts"
            )

    def _value(self, name: str, condition: Condition) -> None:
        """Note a value that counts."""
        if name == "density" and _is_above_1(condition.value):
            self._notes.add(condition.at, "warning", _ABOVE_1)
        verdict, why = self._of_value(name, condition.value)
        self._notes.add(condition.at, verdict, why + _over_blocks(condition.value))

    def _worst(self, name: str, setting: Setting) -> Verdict:
        found = {
            self._of_value(name, one.value)[0] for one in setting.conditions if one.at.path in self._used
        }
        return next((one for one in ("in expectation", "rounding") if one in found), "exact")

    def _filter(self, name: str, condition: Condition) -> None:
        at, text = condition.filter_at, condition.filter or ""
        assert at is not None
        if text == EVERYTHING:
            self._notes.add(at, "exact", "every name: a star alone is no part of a name")
        elif condition.at.path in self._used:
            verdict = self._of_value(name, condition.value)[0]
            self._notes.add(at, verdict, f"names that hold {shown(text, 60)}")
        elif can_match(text):
            self._notes.add(at, "warning", "no name of a tensor gets here that holds this text")
        else:
            why = "filters are parts of names, not patterns: no name of a tensor holds this text"
            self._notes.add(at, "warning", why)

    def _of_value(self, name: str, value: Value) -> tuple[Verdict, str]:
        meaning = _MEANINGS.get(name, f"method.{name}")
        if why := self._why_nothing(name, value):
            return "exact", why
        if name == "density" and value.in_numbers() == ZERO:
            return "rounding", "nothing of the model is kept: its weight is 0"
        if name in ("density", "epsilon", "gamma") and self._method.is_random:
            return "in expectation", f"{meaning}; other elements are drawn"
        if name == "tol":
            return "exact", meaning
        if name == "scale":
            return _of_scale(value)
        return "rounding", meaning

    def _why_nothing(self, name: str, value: Value) -> str:
        """Return why a value changes nothing; empty where it changes something."""
        default = {**self._method.each, **self._method.shared}[name]
        if name == "int8_mask":
            return "without effect on the weights, also in mergekit"
        if name in self._neutral:
            return "changes nothing here"
        if name in SWITCHES and value.is_constant and as_switch(value.first) is default:
            return f"the default of {self._name}"
        return "nothing is dropped" if name == "density" and is_whole(value) else ""


def _is_above_1(density: Value) -> bool:
    numbers = density.in_numbers()
    return numbers is not None and max(numbers.points) > 1


def _of_scale(value: Value) -> tuple[Verdict, str]:
    """Return the verdict on a factor: zero and powers of two round nothing."""
    numbers = value.in_numbers()
    is_exact = numbers is not None and len(numbers.points) == 1 and is_exact_factor(numbers.first)
    return "exact" if is_exact else "rounding", "a factor of tensors that are copied"


def _over_blocks(value: Value) -> str:
    """Return how a gradient runs; nothing of a constant."""
    if value.is_constant:
        return ""
    first, *_, last = map(str, value.points)
    return (
        f"; {first} in the first block and outside of blocks, {last} in the last one, straight lines between"
    )
