"""Models of a fleet: those that a file lists, that lie in a folder, or that a user has on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.errors import HubMagmaxError, RecipeError, SourceError
from hub_magmax.files import from_here
from hub_magmax.hub import hub_api, hub_errors
from hub_magmax.merging.output.report import REPORT_NAME
from hub_magmax.recipe.loading import parse_text, read_text, site_recipe
from hub_magmax.recipe.model_names import expanded, is_folder, is_there
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import shown

#: Endings of recipes and of files that list models.
_TEXTS = (".yaml", ".yml", ".json")

#: Levels of folders that are looked into.
_MAX_DEPTH = 6

#: The branch that the Hub makes with a repository.
_DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class Member:
    """A model of a fleet.

    Attributes:
        name: As it is shown.
        repository, revision: Of one on the Hub; the default branch if None.
        folder: Of one on this machine.
        site: Name of the recipe's site; several where more than one recipe names the model.
        recipe: The recipe that asks for it.
        problem: Why there is no model to look at, as far as that is known.
    """

    name: str
    repository: str = ""
    revision: str | None = None
    folder: Path | None = None
    site: str = ""
    recipe: Recipe | None = field(default=None, repr=False, compare=False)
    problem: HubMagmaxError | None = None

    @property
    def key(self) -> str:
        """What the journal of checks calls it, and what opens it: the repository, or the folder's path."""
        return str(self.folder.absolute()) if self.folder is not None else self.repository

    @property
    def place(self) -> tuple[Any, ...]:
        """What is the same for two names of one model."""
        if self.problem is not None:
            return ("problem", self.name)
        if self.folder is not None:
            return ("folder", self.folder.resolve())
        return ("repository", self.repository, None if self.revision == _DEFAULT_BRANCH else self.revision)

    def joined(self, other: Member) -> Member:
        """Return this one with what another name of the same model tells: its site and its recipe."""
        sites = dict.fromkeys(filter(None, (self.site, other.site)))
        return replace(self, site=", ".join(sites), recipe=self.recipe or other.recipe)


def find_members(target: str) -> tuple[Member, ...]:
    """Return the models that a target names, each once.

    Args:
        target: A folder of merged models, at any depth; a file (YAML or JSON) with a list of repositories,
            folders and recipes, or a recipe; a repository; or a user or an organisation on the Hub, of whose
            repositories those with a merge report are meant.

    Raises:
        SourceError: If the Hub does not answer, or there is no model.
        RecipeError: If the file is no such list, and no recipe.
    """
    path = Path(target)
    if _is_file(path):
        found = [*_of_file(path)]
    elif is_folder(path):
        found = [*_of_folder(path)]
    elif "/" in target or path.suffix in _TEXTS:
        found = [_of_name(target)]
    else:
        found = [*_of_user(target)]
    if not found:
        raise SourceError(
            "there is no merged model",
            where=target,
            expected=f"a {REPORT_NAME} in one of the folders or repositories",
            hint="Name a folder of merged models, a file that lists models, a user or an organisation.",
        )
    by_place: dict[Any, Member] = {}
    for member in found:
        same = by_place.get(member.place)
        by_place[member.place] = member if same is None else same.joined(member)
    return tuple(by_place.values())


def _is_file(path: Path) -> bool:
    return is_there(path) and not is_folder(path)


def _of_file(path: Path) -> Iterator[Member]:
    text = read_text(path)
    values, _, _ = text.content
    if not isinstance(values, list):
        yield from _of_recipe(path, "")
        return
    for entry in values:
        if not isinstance(entry, str):
            problem = RecipeError(
                f"{shown(entry)} is no name of a model",
                where=str(path),
                expected="a list of repositories, folders and recipes",
            )
            yield Member(shown(entry, 40), problem=problem)
            continue
        there = path.parent / expanded(entry)
        if _is_file(there) and there.suffix in _TEXTS:
            yield from _of_recipe(there, entry)
        elif is_folder(there):
            yield from _of_folder(there) or [Member(entry, folder=there)]
        else:
            yield _of_name(entry)


def _of_recipe(path: Path, name: str) -> Iterator[Member]:
    """Yield the models of a recipe, one for each of its sites."""
    try:
        recipe = parse_text(read_text(path))
        recipes = {site: site_recipe(recipe, site) for site in recipe.sites} if recipe.sites else {"": recipe}
    except HubMagmaxError as error:
        if not name:
            raise
        yield Member(name, problem=error)
        return
    for site, one in recipes.items():
        yield _of_output(one, site)


def _of_output(recipe: Recipe, site: str) -> Member:
    if recipe.output.push_to_hub is not None:
        return Member(recipe.output.push_to_hub, recipe.output.push_to_hub, site=site, recipe=recipe)
    return Member(from_here(recipe.output_path), folder=recipe.output_path, site=site, recipe=recipe)


def _of_name(name: str) -> Member:
    if Path(name).suffix in _TEXTS and "://" not in name:
        missing = SourceError("there is no such file", where=name, expected="a recipe, or a list of models")
        return Member(name, problem=missing)
    try:
        repo_id, revision = repository_of(name, None)
    except HubMagmaxError as error:
        return Member(name, problem=error)
    return Member(f"{repo_id}@{revision}" if revision else repo_id, repo_id, revision)


def _of_folder(top: Path) -> list[Member]:
    """Return the models below a folder, by their paths; of one model's folder nothing below it."""
    found = []
    for place, folders, files in os.walk(top):
        depth = len(Path(place).relative_to(top).parts)
        is_model = REPORT_NAME in files
        if is_model:
            found.append(Member(from_here(Path(place)), folder=Path(place)))
        is_end = is_model or depth >= _MAX_DEPTH
        folders[:] = (
            [] if is_end else sorted(f for f in folders if not f.endswith(".partial") and f[0] != ".")
        )
    return found


def _of_user(author: str) -> Iterator[Member]:
    with taken_for_repository(author, Path()), hub_errors(author):
        listed: list[Any] = [*hub_api().list_models(author=author, full=True)]  # asks again by itself
    for info in sorted(listed, key=lambda info: str(info.id)):
        if REPORT_NAME in {file.rfilename for file in info.siblings or ()}:
            yield Member(info.id, info.id)
