"""Names of models in configurations of mergekit: a path or an id, a revision, an adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hub_magmax.recipe.importing.marked import Marked

#: Ends of names of single files of weights.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

#: A folder or a repository as one text.
_PLACE = re.compile(r"(?P<path>[^@]+)(@(?P<revision>[^@]+))?")

#: A model as one text.
_TEXT = re.compile(
    r"(?P<model>[^@+]+)(@(?P<revision>[^@+]+))?(\+(?P<lora>[^@+]+)(@(?P<lora_revision>[^@+]+))?)?"
)


@dataclass(frozen=True)
class Place:
    """A folder or a repository, at a revision."""

    path: str
    revision: str | None = None

    @property
    def written(self) -> str:
        """The name as a recipe has it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def is_file(self) -> bool:
        return self.path.endswith(_FILES)

    @property
    def plain(self) -> Place:
        """The same place without signs in the path that mean nothing: `./x`, `x/` and `x` are one."""
        path = re.sub(r"/{2,}", "/", self.path)
        while path.startswith("./") and len(path) > 2:
            path = path[2:]
        return replace(self, path=path.rstrip("/") or path, revision=self.revision or None)


@dataclass(frozen=True)
class Reference:
    """A model of a configuration, perhaps with an adapter that is added to it."""

    model: Place
    lora: Place | None = None

    @property
    def written(self) -> str:
        """The name as mergekit has it, by which it tells models apart."""
        return f"{self.model.written}+{self.lora.written}" if self.lora else self.model.written

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.model, self.lora) if self.lora else (self.model,)

    @property
    def plain(self) -> Reference:
        return Reference(self.model.plain, self.lora.plain if self.lora else None)


def read_reference(at: Marked) -> Reference | str:
    """Return the model that is named, or why none is: text, or a mapping of `model` and `lora`."""
    if at.is_mapping:
        return _of_mapping(at)
    found = _TEXT.fullmatch(at.value) if isinstance(at.value, str) else None
    if found is None:
        return "no name of a model: it is PATH@REVISION+ADAPTER@REVISION, with one plus sign at most"
    lora = Place(found["lora"], found["lora_revision"]) if found["lora"] else None
    return Reference(Place(found["model"], found["revision"]), lora)


def _of_mapping(at: Marked) -> Reference | str:
    model, lora = (_read_place(at.get(key)) for key in ("model", "lora"))
    if model is None or (at.get("lora") and lora is None):
        return "no model: a mapping has model: {path: ..., revision: ...}, and lora: the same"
    return Reference(model, lora)


def _read_place(at: Marked | None) -> Place | None:
    if at is None:
        return None
    if at.is_mapping:
        path, revision = at.get("path"), at.get("revision")
        if path is None or not isinstance(path.value, str):
            return None
        return Place(path.value, str(revision.value) if revision else None)
    found = _PLACE.fullmatch(at.value) if isinstance(at.value, str) else None
    return Place(found["path"], found["revision"]) if found else None


def task_names(places: Sequence[Place]) -> list[str]:
    """Return a name of its own for every task, from the ends of their models' paths."""
    found: list[str] = []
    for place in places:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.path.rstrip("/").rpartition("/")[2])
        stem = stem.strip("-._")[:58] or "task"
        is_taken = stem in found or stem == "base_model"
        found.append(f"{stem}-{len(found) + 1}" if is_taken else stem)
    return found
