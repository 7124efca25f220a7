"""Locations of checkpoints: a folder, a repository on the Hub, or a kind that another package brings.

A new kind is one subclass of `Location` and one line that announces it:

    [project.entry-points."hub_magmax.sources"]
    zip = "my_package:ZipArchive"

Recipes then name its checkpoints `zip:archive.zip`.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from hub_magmax.checkpoints.listing import is_weights, split_part, variant_of
from hub_magmax.errors import RecipeError, SourceError
from hub_magmax.recipe.lockfile import LockedSource
from hub_magmax.recipe.model_names import (
    expanded,
    is_folder,
    parse_model_name,
    repository_problem,
    revision_problem,
    way_to_folder,
)
from hub_magmax.registry import LOCATIONS
from hub_magmax.text import shown

if TYPE_CHECKING:
    from hub_magmax.checkpoints.source import FileSource

_WEB_URL = re.compile(
    r"https?://(?P<host>[^/@]+)/(?P<id>(?!datasets/|spaces/)[^/]+/[^/]+?)"
    r"(?:/(?:tree|blob|resolve)/(?P<rest>.+?))?/?"
)


class Pin(NamedTuple):
    """Values of a lock that pin a location, beside its name in the recipe; see `LockedSource`."""

    repo_id: str | None = None
    commit: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class ModelPlace:
    """Arguments of `from_pretrained`: a folder or a repository id, a commit for the latter, and a part.

    `part` is a folder in the repository, or a file of weights, as in `HubModel`.
    """

    name: str
    revision: str | None = None
    part: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for all of a model, its processor too."""
        folder = split_part(self.part)[0]
        options = {"revision": self.revision, "trust_remote_code": False}
        return options | ({"subfolder": folder} if folder else {})

    @property
    def variant(self) -> str | None:
        """The name of the file of weights in transformers; None for the usual one."""
        return variant_of(split_part(self.part)[1])


class Location(ABC):
    """Where a checkpoint lies: a frozen, hashable value, from a recipe or from a lock.

    Subclasses say their kind as a class argument: `class ZipArchive(Location, name="zip")`.

    Attributes:
        name: Of the kind; in locks, and before the colon of names in recipes.
    """

    name: ClassVar[str]
    location_kind: ClassVar[type[Location]]

    def __init_subclass__(cls, name: str) -> None:
        cls.name, cls.location_kind = name, cls

    @classmethod
    @abstractmethod
    def parse(cls, written: str, folder: Path) -> Self:
        """Return the location that a recipe calls `written`; relative paths start at `folder`.

        Raises:
            RecipeError: If the name is malformed.
        """

    @classmethod
    def of_lock(cls, locked: LockedSource, folder: Path) -> Self:
        """Return the location that a lock pins."""
        return cls.parse(locked.reference, folder)

    @abstractmethod
    def open(self) -> FileSource:
        """Open the checkpoint.

        Raises:
            SourceError: If there is none.
        """

    def pinned(self) -> Self:
        """Return the location with names that can move, such as branches, replaced by what they mean now."""
        return self

    def trusting(self, roots: tuple[Path, ...]) -> Self:
        """Return the location with folders that links of its files may lead to."""
        return self

    @property
    def pin(self) -> Pin:
        """Values that a lock stores of a pinned location. With a `commit`, its files can never change."""
        return Pin()

    @property
    def whole(self) -> Location:
        """The model repository or folder of which this is a part; its card states the licence."""
        return self

    @property
    def is_remote(self) -> bool:
        """Whether reading waits for a network, so that tensors are fetched ahead and in file order."""
        return False

    @property
    @abstractmethod
    def uri(self) -> str:
        """Address of the folder that holds the files, for provenance."""

    @property
    def model_place(self) -> ModelPlace:
        """Place from which transformers loads the model.

        Raises:
            SourceError: If transformers cannot load it from there.
        """
        raise SourceError(
            "transformers cannot load a model from here, to run it",
            where=self.uri,
            hint="Copy it into a folder, and name the folder in the recipe.",
        )


@dataclass(frozen=True)
class LocalFolder(Location, name="local"):
    """A checkpoint on this machine. `path` is absolute; `written` is its name in the recipe.

    `part` is the one file of weights (or index) that counts, if the recipe names one of several, and links
    may lead out of the folder below `trusted_links`.
    """

    path: Path
    written: str
    part: str = ""
    trusted_links: tuple[Path, ...] = ()

    @classmethod
    def parse(cls, written: str, folder: Path) -> Self:
        path = Path(os.path.normpath((folder / expanded(written)).absolute()))
        if is_weights(path.name) and not is_folder(path):
            return cls(path.parent, written, path.name)
        return cls(path, written)

    def open(self) -> FileSource:
        from hub_magmax.checkpoints.storage.local import LocalSource

        return LocalSource(self.path, self.written, self.part, trusted_links=self.trusted_links)

    def trusting(self, roots: tuple[Path, ...]) -> Self:
        return replace(self, trusted_links=roots)

    @property
    def pin(self) -> Pin:
        return Pin(part=self.part or None)

    @property
    def uri(self) -> str:
        return self.written.removesuffix(f"/{self.part}") if self.part else self.written

    @property
    def model_place(self) -> ModelPlace:
        return ModelPlace(str(self.path), part=self.part)


@dataclass(frozen=True)
class HubModel(Location, name="hub"):
    """A checkpoint on the Hub. `revision` is a branch, tag, commit or pull request; None is the default.

    `part` selects one model of a repository that holds several: a folder, a file of weights, or an
    index of such files. Empty selects the files at the top.
    """

    repo_id: str
    revision: str | None
    part: str = ""

    @classmethod
    def parse(cls, written: str, folder: Path) -> Self:
        repo_id, revision, part = _split_hub_name(written)
        if repository_problem(repo_id):
            raise RecipeError(
                f"{shown(written)} is neither an existing folder nor a repository id",
                expected="org/model, org/model@revision, hf://org/model@revision/part, or a folder",
                hint=way_to_folder(written, folder),
            )
        if revision is not None and (problem := revision_problem(revision)):
            raise RecipeError(problem, hint="Write org/model@revision")
        return cls(repo_id, revision, part)

    @classmethod
    def of_lock(cls, locked: LockedSource, folder: Path) -> Self:
        return cls(str(locked.repo_id), locked.commit, locked.part or "")

    def open(self) -> FileSource:
        from hub_magmax.checkpoints.storage.hub import open_hub

        return open_hub(self.repo_id, str(self.revision), self.part)

    def pinned(self) -> Self:
        from hub_magmax.checkpoints.storage.hub import resolve_commit

        return replace(self, revision=resolve_commit(self.repo_id, self.revision))

    @property
    def pin(self) -> Pin:
        return Pin(self.repo_id, self.revision, self.part or None)

    @property
    def whole(self) -> Location:
        return replace(self, part="")

    @property
    def is_remote(self) -> bool:
        from hub_magmax.hub import is_offline

        return not is_offline()

    @property
    def uri(self) -> str:
        folder = split_part(self.part)[0]
        place = f"hf://{self.repo_id}@{self.revision}"
        return f"{place}/{folder}" if folder else place

    @property
    def model_place(self) -> ModelPlace:
        return ModelPlace(self.repo_id, self.revision, self.part)


def locate(written: str, folder: Path) -> Location:
    """Return the location that a recipe calls `written`; see `model_names.parse_model_name`."""
    location: Location = parse_model_name(written, folder)
    return location


def location_of(locked: LockedSource, folder: Path) -> Location:
    """Return the location that a lock pins.

    Args:
        locked: Its source.
        folder: Where relative paths start.

    Raises:
        RecipeError: If no package that is installed reads its kind.
    """
    location: Location = LOCATIONS.get(locked.kind).of_lock(locked, folder)
    return location


def repository_of(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return the repository and the revision that a person names: `id`, `id@revision`, or its page's address.

    Args:
        model: What was written.
        revision: What was written beside it, if anything.

    Raises:
        RecipeError: If the name is malformed.
        SourceError: If it names a part of a repository, or another revision than `revision`.
    """
    found = HubModel.parse(model, Path())
    if found.part:
        raise SourceError("this names a part of a repository", where=model, expected="a whole repository")
    if None not in (revision, found.revision) and revision != found.revision:
        raise SourceError(
            f"two revisions are named, {found.revision} and {revision}", where=model, hint="Leave one out."
        )
    return found.repo_id, revision or found.revision


def followed_branch(written: str, commit: str) -> tuple[str, str | None] | None:
    """Return the repository and the branch or tag that a name follows; None where nothing can move.

    Args:
        written: Name of a checkpoint in a recipe.
        commit: What it was pinned to; empty for what is not on the Hub.
    """
    if not commit:
        return None
    try:
        found = HubModel.parse(written, Path())
    except RecipeError:
        return None
    is_commit = found.revision is not None and commit.startswith(found.revision)
    return None if is_commit else (found.repo_id, found.revision)


def _split_hub_name(written: str) -> tuple[str, str | None, str]:
    if written.startswith("hf://"):
        return _parse_hf_uri(written, written)
    if (url := _WEB_URL.fullmatch(written)) and url["host"] in _hub_hosts():
        return _parse_hf_uri(
            f"hf://{url['id']}@{url['rest']}" if url["rest"] else f"hf://{url['id']}", written
        )
    repo_id, _, revision = written.partition("@")
    return repo_id, revision or None, ""


def _hub_hosts() -> tuple[str, ...]:
    """Return the hosts whose addresses name repositories of the Hub in use."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return ("huggingface.co", "hf.co", urlsplit(endpoint).netloc)


def _parse_hf_uri(uri: str, written: str) -> tuple[str, str | None, str]:
    """Return repository, revision and part; a slash in the name of a branch is written %2F."""
    from huggingface_hub import parse_hf_uri

    try:
        found = parse_hf_uri(uri)
    except ValueError as error:
        raise RecipeError(f"{shown(written)} is not a valid hf:// path ({str(error)[:200]})") from error
    part = unquote(found.path_in_repo or "").strip("/")
    if found.type != "model" or {"", ".", ".."} & set(part.split("/") if part else ()):
        raise RecipeError(
            f"{shown(written)} does not name a model repository, or a part of one",
            expected="hf://org/model@revision, and /folder or /file.safetensors where it holds several",
        )
    return found.id, found.revision, part
