"""Sites of a recipe: a recipe for each, with some values in place of the common ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, TypeVar

from hub_magmax.errors import KeyPath, RecipeError
from hub_magmax.recipe.schema import Output, Recipe
from hub_magmax.text import listed, nearest, shown

Found = TypeVar("Found")


def site_values(values: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Return the values of one site's own recipe.

    Its keys replace the recipe's, those of `output` one by one. Where it names no path or repository of its
    own, it gets a folder in that of the recipe, and a repository that has the site's name at its end. A
    selection, which holds no weights that could be scored, does not get the common evaluation.

    Args:
        values: Of a recipe with this site.
        site: Its name.
    """
    own = {key: value for key, value in (values["sites"][site] or {}).items() if value is not None}
    common = {key: value for key, value in values.items() if key != "sites"}
    output = common.get("output") or {}
    named = {"path": f"{output.get('path', Output().path)}/{site}"}
    if output.get("push_to_hub"):
        named["push_to_hub"] = f"{output['push_to_hub']}-{site}"
    output = {**output, **named, **own.get("output", {})}
    if output.get("format") == "selection" and "evaluation" not in own:
        common.pop("evaluation", None)
    return {**common, **own, "output": output}


def site_places(places: Mapping[KeyPath, Found], site: str) -> dict[KeyPath, Found]:
    """Return what is known of the places in a recipe for the keys of one site's own recipe."""
    own = {path[2:]: found for path, found in places.items() if path[:2] == ("sites", site) and path[2:]}
    replaced = {path[: 2 if path[0] == "output" else 1] for path in own}
    common = (path for path in places if path[0:1] != ("sites",) and not {path[:1], path[:2]} & replaced)
    return {**{path: places[path] for path in common}, **own}


def shared_places(recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, str, str]]:
    """Yield sites whose output is another's too, or a folder in it: the site, the key, and the other site."""
    for (other, one), (site, recipe) in combinations(recipes.items(), 2):
        paths = one.output_path, recipe.output_path
        if paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]):
            yield site, "path", other
        if recipe.output.push_to_hub is not None and recipe.output.push_to_hub == one.output.push_to_hub:
            yield site, "push_to_hub", other


def check_site(sites: Mapping[str, Any] | None, site: str | None) -> None:
    """Raise RecipeError unless a recipe has this site, or no sites where none is named."""
    if site is None and sites:
        raise RecipeError(
            f"the recipe has {len(sites)} sites, and this is done for one",
            key=("sites",),
            expected=f"--site with one of {listed([*sites], 5)}",
            hint="`run`, `plan` and `validate` take all sites together.",
        )
    if site is not None and site not in (sites or {}):
        raise RecipeError(
            f"the recipe has no site {shown(site)}" if sites else "the recipe has no sites",
            key=("sites",),
            hint=nearest(site, [*(sites or ())]).capitalize()
            or (f"Its sites are {listed([*sites], 5)}." if sites else "Leave out --site."),
        )
