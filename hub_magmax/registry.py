"""Merge methods, evaluators and kinds of locations by name: tables, and entry points of other packages.

A module is imported when a name in it is looked up, so that a recipe is checked without paying for
torch, for other packages, or for methods that it does not use.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import marshal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hub_magmax.errors import ArgumentError, RecipeError
from hub_magmax.files import code_digest
from hub_magmax.text import nearest

#: Names that an error lists.
_MOST_LISTED = 16


@dataclass(frozen=True)
class Plugin:
    """The package that announces a merge method, an evaluator or a kind of source.

    Attributes:
        package, version: As it is installed; the version is empty where it is not known, and both where a
            program has registered something itself.
        code: sha256 of the Python files of its top-level module, by which a lock tells changed code.
    """

    package: str
    version: str
    code: str

    def __str__(self) -> str:
        return f"package {self.package} {self.version}".strip() if self.package else "of no package"

    @property
    def requirement(self) -> str:
        """The package at this version, as pip takes it."""
        return f"{self.package}=={self.version}" if self.version else self.package


@dataclass(frozen=True)
class Registry:
    """All entries of one kind.

    Attributes:
        noun: Name of the kind in messages.
        group: Group of entry points in which another package announces its own.
        built_in: Module of each built-in entry, by name.
        attribute: Attribute in which the decorator of a function or class keeps the entry.
        registered: What this program decorated itself, by name: known in this process alone.
    """

    noun: str
    group: str
    built_in: Mapping[str, str]
    attribute: str
    registered: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def register(self, name: str, decorated: Any) -> None:
        """Make what was decorated known by its name in this process, unless it is built in.

        Raises:
            ArgumentError: If the name is that of a built-in entry of another module.
        """
        if name not in self.built_in:
            self.registered[name] = decorated
        elif decorated.__module__ != self.built_in[name]:
            raise ArgumentError(
                f"{name!r} is the name of a built-in {self.noun}",
                where=f"{decorated.__module__}.{decorated.__qualname__}",
                expected="another name",
            )

    def names(self) -> tuple[str, ...]:
        """Return all names but those of this program: the built-in ones, then those of other packages."""
        return (*self.built_in, *sorted(self.plugins.keys() - self.built_in.keys()))

    def knows(self, name: str) -> bool:
        """Say whether there is an entry of a name, also one of this program."""
        return name in self.built_in or name in self.plugins or name in self.registered

    def get(self, name: str) -> Any:
        """Return the entry that recipes call `name`.

        Raises:
            RecipeError: If there is none, with the nearest name, or its package cannot be imported.
        """
        if name in self.built_in:
            module = importlib.import_module(self.built_in[name])
            # Only callables: a look at torch's lazy name, which is none, would import torch.
            found = filter(callable, vars(module).values())
            entries = (getattr(value, self.attribute, None) for value in found)
            return next(entry for entry in entries if entry is not None and entry.name == name)
        if name in self.plugins:
            return self._load(name)
        if name in self.registered:
            return getattr(self.registered[name], self.attribute)
        known = (*self.names(), *self.registered)
        raise RecipeError(
            f"there is no {self.noun} {name!r}",
            expected=_listed(self.noun, known),
            hint=nearest(name, known).replace("did", "Did", 1)
            or "If it is a plug-in, install its package beside hub_magmax. The decorator makes it known to "
            f"its own process only, a package to all by an entry point in the group {self.group!r}.",
        )

    def plugin(self, name: str) -> Plugin | None:
        """Return the package of an entry that is loaded; None of a built-in or unknown one.

        Raises:
            RecipeError: If its code cannot be read.
        """
        if name in self.built_in:
            return None
        try:
            if name in self.plugins:
                return _announced(self.plugins[name])
            return Plugin("", "", _own_code(self.registered[name])) if name in self.registered else None
        except OSError as error:
            raise RecipeError(
                f"the code of the plug-in with the {self.noun} {name!r} cannot be read ({error.strerror})",
                where=str(error.filename),
                hint="Make it readable, or install the package again.",
            ) from error

    @cached_property
    def plugins(self) -> Mapping[str, Any]:
        """Entry points by name."""
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, name: str) -> Any:
        try:
            entry = getattr(self.plugins[name].load(), self.attribute, None)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # whatever importing somebody's package may raise
            raise RecipeError(
                f"the plug-in with the {self.noun} {name!r} ({self.plugin(name)}) cannot be imported "
                f"({type(error).__name__}: {error})",
                where=f"entry point in {self.group!r}",
                hint="Repair or uninstall the package that announces it.",
            ) from error
        if getattr(entry, "name", None) != name:
            raise RecipeError(
                f"the entry point {name!r} in {self.group!r} is not a {self.noun} of that name",
                expected=f"something decorated with @{self.attribute}",
            )
        if getattr(self.registered.get(name), self.attribute, entry) is not entry:
            raise RecipeError(
                f"this program and the {self.plugin(name)} both have a {self.noun} {name!r}",
                hint="Rename one of them.",
            )
        self.registered.pop(name, None)
        return entry


def _listed(noun: str, names: Sequence[str]) -> str:
    """Return what could have been meant: all names, or the command that tells of them if they are many."""
    if len(names) <= _MOST_LISTED:
        return f"one of {', '.join(names)}"
    return f"one of those that `hub-magmax {noun.rsplit(maxsplit=1)[-1]}s` lists"


def _announced(point: Any) -> Plugin:
    """Return the package of an entry point, with the digest of its code where it is loaded."""
    distribution = getattr(point, "dist", None)
    module = str(getattr(point, "value", "")).partition(":")[0]
    package = distribution.name if distribution is not None else module.partition(".")[0]
    version = distribution.version if distribution is not None else ""
    return Plugin(package or "unknown", version, _code_digest(module) if module in sys.modules else "")


def _code_digest(module: str) -> str:
    """Return the sha256 of the Python files of a loaded module's top package; empty where there are none."""
    names = module.split(".")
    parents = (".".join(names[:length]) for length in range(1, len(names) + 1))
    loaded = (sys.modules.get(name) for name in parents)
    # A namespace package has no file, and holds packages of others.
    files = (getattr(found, "__file__", None) for found in loaded)  # a notebook has none
    file = next(filter(None, files), None)
    if file is None:
        return ""
    path = Path(file)
    return code_digest(path.parent.rglob("*.py") if path.name == "__init__.py" else [path], path.parent)


def _own_code(decorated: Any) -> str:
    """Return the sha256 of the Python files of a program's own entry; in a notebook of its own text."""
    if code := _code_digest(decorated.__module__):
        return code
    try:
        text = inspect.getsource(decorated).encode()
    except (OSError, TypeError):
        text = marshal.dumps(getattr(decorated, "__code__", None))
    return hashlib.sha256(text).hexdigest()


#: Kinds of locations of checkpoints (`checkpoints.locations.Location`); add a line here for a new one. Names
#: of checkpoints begin with the kind and a colon, but for folders and the Hub.
LOCATIONS = Registry(
    "kind of source",
    "hub_magmax.sources",
    MappingProxyType(
        {
            "local": "hub_magmax.checkpoints.locations",
            "hub": "hub_magmax.checkpoints.locations",
        }
    ),
    "location_kind",
)

#: Modules of built-in methods, and the methods that each defines; add a new one here.
_METHODS_BY_MODULE: Mapping[str, tuple[str, ...]] = {
    "linear": ("agreement", "average", "task_arithmetic", "weighted_sum"),
    "spectral": ("tsv", "iso_c", "iso_cts", "cart"),
    "covariance": ("wudi", "actmat", "regmean", "regmean_plusplus"),
    "fisher": ("fisher",),
    "sequential": ("opcm",),
    "geometry.sphere": ("slerp", "nuslerp", "multislerp", "karcher"),
    "geometry.model_stock": ("model_stock",),
    "geometry.fusion": ("arcee_fusion",),
    "sparse": ("ties", "dare", "dare_ties", "breadcrumbs", "breadcrumbs_ties"),
    "ranked": ("della", "della_linear"),
    "competing": ("sce", "pcb"),
    "stitching": ("localize_stitch", "ram", "ram_plus", "nearswap"),
    "magmax": ("random_mix", "single_task", "last_task", "magmax", "tunable_magmax"),
}
METHODS = Registry(
    "merge method",
    "hub_magmax.methods",
    MappingProxyType(
        {
            name: f"hub_magmax.methods.{module}"
            for module, names in _METHODS_BY_MODULE.items()
            for name in names
        }
    ),
    "merge_method",
)

#: Built-in evaluators and the module that defines each; add a line here for a new one.
EVALUATORS = Registry(
    "evaluator",
    "hub_magmax.evaluators",
    MappingProxyType(
        {
            "image-classification": "hub_magmax.evaluation.evaluators.classification",
            "text-classification": "hub_magmax.evaluation.evaluators.classification",
            "zero-shot-image-classification": "hub_magmax.evaluation.evaluators.zero_shot",
            "text-to-text": "hub_magmax.evaluation.evaluators.generation",
            "log-likelihood": "hub_magmax.evaluation.evaluators.causal",
            "multiple-choice": "hub_magmax.evaluation.evaluators.causal",
            "lm-eval": "hub_magmax.evaluation.evaluators.harness",
        }
    ),
    "evaluator",
)
