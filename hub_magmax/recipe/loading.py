"""Recipes loaded from YAML files and mappings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from pydantic import (
    ValidationError,
)

from hub_magmax.errors import HubMagmaxError, KeyPath, Problem, RecipeError
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.changes import Change, with_changes, without_replaced
from hub_magmax.recipe.checks import contradictions, option_problems, text_problems, text_wanted
from hub_magmax.recipe.foreign import folder_error, refuse_foreign
from hub_magmax.recipe.model_names import near_sibling
from hub_magmax.recipe.problems import all_problems, conflict, explain, in_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.sites import check_site, shared_places, site_places, site_values
from hub_magmax.recipe.sound_part import sound_part
from hub_magmax.recipe.strict_yaml import Place, read_yaml

#: A recipe is written by hand; anything larger is not one.
MAX_RECIPE_BYTES = 1_000_000

#: Folders whose files stand for streams of the process, even where a stream is a file.
_STREAMS = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


@dataclass(frozen=True)
class RecipeText:
    """Text of a recipe.

    Attributes:
        text: YAML.
        name: Of the recipe in messages.
        folder: Where its relative paths start.
        is_stream: Whether it came from a stream: nothing is written beside it.
        site: The site whose own recipe is meant, of a recipe with several.
    """

    text: str
    name: str
    folder: Path
    is_stream: bool = False
    site: str | None = None

    def of_site(self, site: str) -> RecipeText:
        """Return the same for one site; the text is not parsed again."""
        found = replace(self, site=site)
        found.__dict__["_whole"] = self._whole  # a cached property
        return found

    @cached_property
    def _whole(self) -> tuple[Any, dict[KeyPath, Place], dict[KeyPath, str]]:
        """Content of the whole text; what is known to be no recipe is refused."""
        refuse_foreign(self.text, self.name)
        return read_yaml(self.text, self.name)

    @property
    def content(self) -> tuple[Any, dict[KeyPath, Place], dict[KeyPath, str]]:
        """Values, their places, and texts of single values, as `read_yaml` returns them; those of the site.

        Raises:
            RecipeError: If the text is no recipe, or there is no such site.
        """
        values, places, written = self._whole
        if self.site is None or not isinstance(values, dict):
            return values, places, written
        sites = values.get("sites")
        try:
            check_site(sites if isinstance(sites, dict) else None, self.site)
        except RecipeError as error:
            raise in_recipe(error, self.name, places) from None
        if not isinstance(values["sites"][self.site], dict | None):
            return values, places, written  # which the schema refuses
        return site_values(values, self.site), site_places(places, self.site), site_places(written, self.site)


#: What functions take for a recipe.
RecipeLike = Recipe | Path | str | Mapping[str, Any]


def as_recipe(recipe: RecipeLike) -> Recipe:
    """Return a recipe as it is, or the one in a file of this path, or of these plain values.

    Raises:
        RecipeError: If it is not valid.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(dict(recipe)) if isinstance(recipe, Mapping) else load_recipe(recipe)


@checked
def load_recipe(path: str | Path, *, folder: Path | None = None) -> Recipe:
    """Read and check the recipe in the YAML file `path`.

    Args:
        path: A YAML file.
        folder: Where its relative paths start; the file's own folder by default.

    Raises:
        RecipeError: With every problem found, each at its line and key path.
    """
    found = read_text(Path(path))
    return parse_text(replace(found, folder=folder or found.folder))


def read_text(path: Path) -> RecipeText:
    """Return the text of a recipe's file, or of a stream such as /dev/stdin."""
    try:
        with path.open("rb") as file:
            is_stream = path.parent in _STREAMS or not path.is_file()
            return text_of(file, str(path), Path() if is_stream else path.parent, is_stream=is_stream)
    except IsADirectoryError as error:
        raise folder_error(path) from error
    except OSError as error:
        near = near_sibling(str(path), path, files=True) if isinstance(error, FileNotFoundError) else ""
        raise _unreadable(str(path), error.strerror or type(error).__name__, near) from error


def text_of(file: IO[bytes], name: str, folder: Path, *, is_stream: bool = True) -> RecipeText:
    """Return the text of an open file.

    Raises:
        RecipeError: If it is larger than any recipe, or not UTF-8.
    """
    content = file.read(MAX_RECIPE_BYTES + 1)
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"larger than {MAX_RECIPE_BYTES:,} bytes, which no recipe is", where=name)
    try:
        return RecipeText(content.decode(), name, folder, is_stream)
    except UnicodeDecodeError as error:
        raise _unreadable(name, "not UTF-8 text", "Save it as UTF-8.") from error


def _unreadable(name: str, reason: str, near: str = "") -> RecipeError:
    hint = near or "Give the path of a YAML recipe."
    return RecipeError(f"the recipe cannot be read ({reason})", where=name, hint=hint)


def parse_text(found: RecipeText, changes: Sequence[Change] = ()) -> Recipe:
    """Check the recipe in a text, with other values in place of some of its own.

    Raises:
        RecipeError: With every problem found, each at its line and key path, or at its option.
    """
    values, places, written = found.content
    values, written, options = with_changes(values, written, changes)
    return parse_recipe(
        _with_text(values, written),
        folder=found.folder,
        where=found.name,
        places=without_replaced(places, options),
    )


def with_place(error: HubMagmaxError, found: RecipeText, changes: Sequence[Change] = ()) -> HubMagmaxError:
    """Return an error about a key with its line in the recipe, as it is where there is none."""
    with suppress(HubMagmaxError):
        values, places, written = found.content
        options = with_changes(values, written, changes)[2]
        return in_recipe(error, found.name, without_replaced(places, options))
    return error


@checked
def parse_recipe(
    values: Any,
    *,
    folder: Path | None = None,
    where: str = "recipe",
    places: Mapping[KeyPath, Place | str] | None = None,
) -> Recipe:
    """Check plain values and return the recipe they describe.

    Args:
        values: Plain values of YAML or JSON.
        folder: Where relative paths start; the current folder by default.
        where: Name of the recipe in messages.
        places: Line and column by key path, where known, or the option that gives the value.

    Raises:
        RecipeError: With every problem found.
    """
    if not isinstance(values, dict):
        raise RecipeError("not a mapping of keys to values", where=where, expected="base_model:, tasks:, ...")
    problems: list[Problem] = []
    recipe, lacking = None, frozenset[str]()
    folder = (folder or Path()).absolute()
    try:
        recipe = Recipe.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        problems += explain(error, (), Recipe)
        recipe, lacking = sound_part(values, folder)
    problems += option_problems(values)
    problems += text_problems(values, ())
    if recipe is not None:
        recipe._folder = folder
        problems += _unmistaken(contradictions(recipe, lacking), problems)
        if not problems:
            problems += _site_problems(recipe)
    if problems or recipe is None:
        raise all_problems(problems, where, places or {})
    return recipe


def _site_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with the sites' own recipes; two of them may not have one place."""
    recipes: dict[str, Recipe] = {}
    for site, read in _site_recipes(recipe).items():
        try:
            recipes[site] = read()
        except RecipeError as error:
            yield from (replace(one, key=("sites", site, *one.key)) for one in error.problems)
    for site, key, other in shared_places(recipes):
        text, hint = f"this is the place of the site {other} too", "give each site its own"
        yield conflict(("sites", site, "output", key), text, hint)


def site_recipe(recipe: Recipe, site: str) -> Recipe:
    """Return the own recipe of one of a recipe's sites."""
    return _site_recipes(recipe)[site]()


def site_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the own recipes of a recipe's sites, by name."""
    return {site: read() for site, read in _site_recipes(recipe).items()}


def _site_recipes(recipe: Recipe) -> dict[str, Callable[[], Recipe]]:
    """Return what reads the own recipe of each site: the values of all are made once."""
    values = recipe.to_dict(defaults=False)

    def read(site: str) -> Recipe:
        return parse_recipe(site_values(values, site), folder=recipe.folder)

    return {site: partial(read, site) for site in recipe.sites or {}}


def _unmistaken(found: Iterable[Problem], others: Iterable[Problem]) -> list[Problem]:
    """Return problems without keys that are missing where another key is unknown: it may be meant."""
    unknown = {problem.key[:-1] for problem in others if problem.kind == "unknown_key"}
    return [problem for problem in found if problem.kind != "missing_key" or problem.key not in unknown]


def _with_text(values: Any, written: Mapping[KeyPath, str]) -> Any:
    """Return the values with what YAML took for something else as written, wherever text is wanted.

    A task may be called no, 1e3 or 2024. Numbers stay numbers where numbers are wanted.
    """
    wanted = set(text_wanted(values)) & set(written)
    if not wanted:
        return values
    found = copy.deepcopy(values)
    for path in wanted:
        *parents, key = path
        holder = found
        for part in parents:
            holder = holder[part]
        holder[key] = written[path]
    return found


def updated(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a checked copy with top-level keys replaced, e.g. `updated(recipe, {"method": "average"})`."""
    return parse_recipe(recipe.to_dict() | dict(changes), folder=recipe.folder)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema(by_alias=True)
