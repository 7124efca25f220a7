"""Structure of a mergekit configuration: models and slices in the order in which they take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hub_magmax.recipe.importing.findings import Notes
from hub_magmax.recipe.importing.marked import Marked
from hub_magmax.recipe.importing.mergekit_methods import MERGEKIT_METHODS, PARAMETERS, MergekitMethod, readers
from hub_magmax.recipe.importing.parameters import Level, Setting, as_number, read_setting
from hub_magmax.recipe.importing.references import Reference, read_reference
from hub_magmax.text import listed, nearest, shown

#: Keys of a configuration, of a model in a list, of a slice, of a source in it, of a module.
_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip
_OF_MODEL = ("model", "parameters")
_OF_SLICE = ("sources", "base_model", "residual_weight", "parameters")
_OF_SOURCE = ("model", "layer_range", "parameters")
_OF_MODULE = ("slices", "models", "parameters")
_OF_CONDITION = ("filter", "value")

#: Keys of a model as a mapping, and of each of its parts.
_OF_REFERENCE = ("model", "lora", "override_architecture")
_OF_PLACE = ("path", "revision")


@dataclass(frozen=True)
class Input:
    """A model of a merge.

    Attributes:
        reference: Its name.
        at: Where it stands.
        levels: Its own parameters, then those of the slice, the module and the top.
        blocks: First block, and the one after the last, where only these take part.
        blocks_at: Where that stands.
        is_base: Whether it is the base model.
    """

    reference: Reference
    at: Marked
    levels: tuple[Level, ...]
    blocks: tuple[int, int] | None = None
    blocks_at: Marked | None = None
    is_base: bool = False


@dataclass(frozen=True)
class Slice:
    """Models that are merged block by block; all of a configuration, or one after the other.

    Attributes:
        inputs: In order. Under `models:` a base model that is not listed is the last one.
        base: The base model that counts here.
        base_at: Where that is named.
        levels: Parameters of the slice, the module and the top.
        at: Where it stands.
    """

    inputs: tuple[Input, ...]
    base: Reference | None
    base_at: Marked | None
    levels: tuple[Level, ...]
    at: Marked

    @property
    def others(self) -> tuple[Input, ...]:
        """The models that are not the base model."""
        return tuple(one for one in self.inputs if not one.is_base)


@dataclass(frozen=True)
class Configuration:
    """A mergekit configuration.

    Attributes:
        method_name: Of mergekit.
        method: Its parameters.
        slices: One for a list of models.
        base: At the top.
        top: All of the document.
    """

    method_name: str
    method: MergekitMethod
    slices: tuple[Slice, ...]
    base: Reference | None
    top: Marked

    @property
    def method_at(self) -> Marked:
        return (self.top.entries or {})["merge_method"]


def read_configuration(top: Marked, notes: Notes) -> Configuration | None:
    """Return the structure of a configuration; None, noted, where mergekit would refuse it too."""
    return _Reader(top, notes).read()


class _Reader:
    """Reads one document, and notes what mergekit reads over or refuses."""

    def __init__(self, top: Marked, notes: Notes) -> None:
        self._top, self._notes = top, notes
        self._how: MergekitMethod | None = None
        self._name = ""

    def read(self) -> Configuration | None:
        self._repeated(self._top)
        self._unknown(self._top, _TOP)
        method = self._method()
        if method is None or self._how is None:
            return None
        base = self._reference("base_model", self._top)
        if self._how.base == "required" and not (base or self._has_own_bases()):
            self._notes.lose(method, f"{self._name} needs a base_model, also in mergekit")
        levels = (self._level(self._top, is_shared=True),)
        found = self._slices(base, levels)
        if not self._notes.is_whole:
            return None
        if base is not None and self._has_own_bases():
            why = "only config and tokenizer come from it: every slice has a base model of its own"
            self._notes.add((self._top.entries or {})["base_model"], "warning", why)
        return Configuration(self._name, self._how, tuple(found), base, self._top)

    def _method(self) -> Marked | None:
        """Return where the method is named, and note one that is not there."""
        method = self._top.get("merge_method")
        if method is None:
            self._notes.lose(self._top, "there is no merge_method, which mergekit needs too")
            return None
        self._name = str(method.plain())
        self._how = MERGEKIT_METHODS.get(self._name)
        if self._how is None:
            self._no_method(method)
        return method

    def _no_method(self, method: Marked) -> None:
        hint = nearest(self._name, [*MERGEKIT_METHODS])
        text = f"{shown(method.plain(), 40)} is no method of mergekit 0.1.5 that is known here"
        self._notes.lose(method, f"{text}; {hint}" if hint else text)

    def _has_own_bases(self) -> bool:
        modules = self._top.get("modules")
        holder = (modules.get("default") if modules else None) or self._top
        slices = holder.get("slices")
        parts = slices.items if slices and slices.items else ()
        return bool(parts) and all(part.get("base_model") for part in parts)

    def _slices(self, base: Reference | None, levels: tuple[Level, ...]) -> list[Slice]:
        """Return the slices of models, slices or the one module."""
        written = {key: at for key in ("models", "slices", "modules") if (at := self._top.get(key))}
        if len(written) != 1:
            what = f"{listed([*written])} exclude each other" if written else "there are no models"
            at = [*written.values(), self._top][1 if written else 0]
            self._notes.lose(at, f"{what}: mergekit takes one of models, slices and modules")
            return []
        modules = written.get("modules")
        return self._module(modules, base, levels) if modules else self._parts(self._top, base, levels)

    def _module(self, modules: Marked, base: Reference | None, levels: tuple[Level, ...]) -> list[Slice]:
        entries = modules.entries or {}
        if [*entries] != ["default"]:
            at = [modules, *entries.values()][min(2, len(entries))]
            self._notes.lose(at, "parts of a model that are merged by settings of their own")
            return []
        module = entries["default"]
        self._unknown(module, _OF_MODULE)
        self._notes.add(module, "exact", "the one module is default: all of the model")
        return self._parts(module, base, (self._level(module, is_shared=True), *levels))

    def _parts(self, at: Marked, base: Reference | None, levels: tuple[Level, ...]) -> list[Slice]:
        models, slices = at.get("models"), at.get("slices")
        if models is not None:
            return [self._models(models, base, levels)]
        found = []
        for part in self._items(slices, "a list of slices", at):
            own = self._own_base(part)
            inner = (self._level(part, is_shared=True), *levels)
            base_at = part.get("base_model") if own else self._top.get("base_model")
            inputs = [
                self._input(source, own or base, inner, _OF_SOURCE)
                for source in self._items(part.get("sources"), "a list of sources", part)
            ]
            kept = tuple(one for one in inputs if one is not None)
            self._check_repeated(kept)
            self._check_base(kept, own or base, base_at)
            found.append(Slice(kept, own or base, base_at, inner, part))
        return found

    def _own_base(self, part: Marked) -> Reference | None:
        """Return the base model of a slice, and note its other keys."""
        self._unknown(part, _OF_SLICE)
        if residual := part.get("residual_weight"):
            self._notes.add(residual, "exact", "without effect, also in mergekit")
        return self._reference("base_model", part)

    def _models(self, models: Marked, base: Reference | None, levels: tuple[Level, ...]) -> Slice:
        inputs = [
            self._input(entry, base, levels, _OF_MODEL)
            for entry in self._items(models, "a list of models", models)
        ]
        kept = [one for one in inputs if one is not None]
        self._check_repeated(kept)
        base_at = self._top.get("base_model")
        if base is not None and base_at is not None and not any(one.is_base for one in kept):
            kept.append(Input(base, base_at, ({}, *levels), is_base=True))
        return Slice(tuple(kept), base, base_at, levels, models)

    def _items(self, at: Marked | None, expected: str, owner: Marked) -> Sequence[Marked]:
        if at is not None and at.items:
            return at.items
        self._notes.lose(at or owner, f"expected {expected}")
        return ()

    def _input(
        self, entry: Marked, base: Reference | None, levels: tuple[Level, ...], keys: Sequence[str]
    ) -> Input | None:
        """Return a model of a list; None, noted, where none is named."""
        self._unknown(entry, keys)
        reference = self._reference("model", entry)
        if reference is None:
            if not entry.get("model"):
                self._notes.lose(entry, "no model is named here: expected `- model: NAME`")
            return None
        is_base = base is not None and reference == base
        ignored = is_base and self._how is not None and self._how.base != "like the others"
        own = self._level(entry, is_shared=False, of_base=ignored)
        blocks_at = entry.get("layer_range")
        blocks = self._blocks(blocks_at) if blocks_at else None
        if "layer_range" in keys and blocks is None:
            why = "expected layer_range: [first, end], two whole numbers from 0, the second one larger"
            self._notes.lose(blocks_at or entry, why)
        return Input(reference, entry, (own, *levels), blocks, blocks_at, is_base)

    def _blocks(self, at: Marked) -> tuple[int, int] | None:
        found = [as_number(item.value) for item in at.items or ()]
        if len(found) == 2 and all(number is not None and number == int(number) for number in found):
            first, end = (int(number or 0) for number in found)
            return (first, end) if 0 <= first < end else None
        return None

    def _reference(self, key: str, entry: Marked) -> Reference | None:
        at = entry.get(key)
        if at is None:
            return None
        self._unknown(at, _OF_REFERENCE)
        for part in map(at.get, ("model", "lora") if at.is_mapping else ()):
            if part is not None:
                self._unknown(part, _OF_PLACE)
        if architecture := at.get("override_architecture"):
            why = "read over here: the merged model has the architecture that its config names"
            self._notes.add(architecture, "warning", why)
        found = read_reference(at)
        if isinstance(found, str):
            self._notes.lose(at, found)
            return None
        if any(place.is_file for place in found.places):
            why = "a file, not a model: written for mergekit-pytorch, which knows no blocks and no tokenizers"
            self._notes.add(at if key == "base_model" else entry, "refused", why)
        return found

    def _check_repeated(self, inputs: Sequence[Input]) -> None:
        """Note models that stand in a list twice, as they are spelled."""
        for number, one in enumerate(inputs):
            if any(one.reference == other.reference for other in inputs[:number]):
                self._notes.lose(one.at, "the same model for the second time, which mergekit refuses too")

    def _check_base(self, inputs: Sequence[Input], base: Reference | None, base_at: Marked | None) -> None:
        """Note a base model that takes no part: under `slices:` it is not added."""
        if self._how is None or base is None or base_at is None or any(one.is_base for one in inputs):
            return
        if self._how.base != "like the others":
            self._notes.lose(
                base_at,
                f"not among the sources of every slice, where {self._name} needs it, also in mergekit",
            )
        else:
            self._notes.add(base_at, "exact", "config and tokenizer come from it; it is not merged")

    def _level(self, entry: Marked, *, is_shared: bool, of_base: bool = False) -> Level:
        """Return the parameters that count at one level, and note all others."""
        at = entry.get("parameters")
        if at is None or self._how is None:
            return {}
        if not at.is_mapping:
            self._notes.lose(at, "expected a mapping of parameters")
            return {}
        self._repeated(at)
        found: dict[str, Setting] = {}
        for name, value in (at.entries or {}).items():
            setting = self._setting(value)
            if ignored := self._why_ignored(name, is_shared=is_shared, of_base=of_base):
                self._notes.add(value, "warning", ignored)
            elif setting is not None:
                found[name] = setting
        return found

    def _setting(self, value: Marked) -> Setting | None:
        """Return a parameter; None, noted, where it is none, which mergekit refuses of any name."""
        if value.is_empty:
            self._notes.lose(value, "nothing is written here, and mergekit refuses that: leave the line out")
            return None
        for condition in (value, *(value.items or ())):
            self._unknown(condition, _OF_CONDITION)
        found = read_setting(value)
        if isinstance(found, str):
            self._notes.lose(value, found)
            return None
        return found

    def _why_ignored(self, name: str, *, is_shared: bool, of_base: bool) -> str:
        """Return why mergekit reads over a parameter; empty where it does not."""
        assert self._how is not None
        if name not in PARAMETERS:
            hint = nearest(name, PARAMETERS)
            return f"no parameter of mergekit: it reads over this{f'; {hint}' if hint else ''}"
        if name not in {**self._how.each, **self._how.shared}:
            others = listed(readers(name), 4)
            return f"{self._name} has no {name}, so mergekit reads over it; {others} read it"
        if name in self._how.shared and not is_shared:
            return f"{name} is shared by all models: under one of them mergekit reads over it"
        if of_base:
            return f"the base model has no task vector, so mergekit does not read its {name}"
        return ""

    def _unknown(self, entry: Marked, known: Sequence[str]) -> None:
        """Note keys that mergekit does not know here."""
        if not entry.is_mapping:
            return
        if entry is not self._top:
            self._repeated(entry)
        for key, value in (entry.entries or {}).items():
            if key in known:
                continue
            if key in PARAMETERS:
                why = f"stands beside `parameters`, not under it: mergekit reads over this {key}"
            else:
                hint = nearest(key, known)
                why = f"no key of mergekit here: it reads over this{f'; {hint}' if hint else ''}"
            self._notes.add(value, "warning", why)

    def _repeated(self, entry: Marked) -> None:
        for one in entry.repeated:
            self._notes.add(one, "warning", "the same key stands here again, and mergekit takes the last one")


def places_of(configuration: Configuration) -> Mapping[str, Reference]:
    """Return every model by its spelling."""
    found = {one.reference.written: one.reference for part in configuration.slices for one in part.inputs}
    return found | ({configuration.base.written: configuration.base} if configuration.base else {})
