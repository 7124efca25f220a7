"""Explorer page: one HTML file, without network, that shows the scores of a preference as it is dragged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

from hub_magmax.evaluation.scores import Score
from hub_magmax.files import digest, named_after
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.tradeoff_surface import EXPLORER_NAME, Point, Surface
from hub_magmax.text import at_most, cut_names, one_line, publishable, publishable_values

#: Text of the page that the measured values replace.
_PLACE = "__MEASURED__"

#: Tasks up to which long names are shown whole, and characters of a name that are shown of more.
_FEW_TASKS, _LABEL_CHARACTERS = 12, 24

#: First lines of a copied recipe, and hexadecimal digits by which the outputs of points differ.
_PLACED = "One point of a sweep. Save it beside the recipe of the sweep, from where its paths start."
_SHORTENED = "Paths of the machine are left out of pages: write them as the recipe of the sweep has them."
_NUM_DIGITS = 8


def render_explorer(recipe: Recipe, surface: Surface) -> str:
    """Return the page with everything that was measured inside.

    Args:
        recipe: Of the sweep; the page shows it with the preference of each measured point.
        surface: What was measured.
    """
    page = files("hub_magmax.reporting").joinpath(EXPLORER_NAME).read_text(encoding="utf-8")
    return page.replace(_PLACE, inert_json(_facts(recipe, surface)), 1)


def inert_json(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it can end the element or a line."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(recipe: Recipe, surface: Surface) -> dict[str, Any]:
    return {
        "title": one_line(recipe.output.push_to_hub or Path(recipe.output.path).name),
        "metric": one_line(surface.metric),
        "isShare": surface.is_share,
        "method": one_line(surface.method["name"]),
        "scaling": surface.method["scaling"],
        "tasks": surface.tasks,
        "labels": _labels(surface.tasks),
        "evaluated": surface.evaluated,
        "unit": one_line(surface.unit),
        "wanted": surface.wanted,
        "best": surface.best,
        "asked": surface.asked,
        "points": [
            {
                "weights": point.weights,
                "scores": [(*_numbers(score), point.deviation(score.task)) for score in point.scores],
                "output": _output_path(recipe, surface, point),
            }
            for point in surface.points
        ],
        "front": surface.front,
        "base": [_numbers(score) for score in surface.base_model],
        "own": [_numbers(score) for score in surface.own],
        "examples": [score.num_examples for score in surface.base_model],
        **_recipe_parts(recipe, surface),
    }


def _recipe_parts(recipe: Recipe, surface: Surface) -> dict[str, str]:
    """Return the recipe of a point but for its preference and the path of its output, as YAML.

    It is to be saved beside the recipe of the sweep, from where its relative paths start. A method that was
    chosen for the sweep is named, since another preference would choose another one.
    """
    values = {"schema": recipe.schema_version} | recipe.portable.to_dict(defaults=False)
    values.pop("preference", None)
    if recipe.method.is_auto:
        values["method"] = dict(surface.method)
    shown = publishable_values(values)
    output = {key: value for key, value in shown.pop("output", {}).items() if key != "path"}
    about = [_PLACED]
    if shown != {key: value for key, value in values.items() if key != "output"} or recipe.trusted_links:
        about.append(_SHORTENED)
    return {
        "recipe": "".join(f"# {line}\n" for line in about) + _block(shown),
        "output": indent(_block(output), "  ") if output else "",
    }


def _block(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=False)


def _output_path(recipe: Recipe, surface: Surface, point: Point) -> str:
    """Return a folder for the model of a point, which no other point and no other method has."""
    chosen = digest([dict(surface.method), list(point.weights)]).removeprefix("sha256:")[:_NUM_DIGITS]
    return named_after(publishable(recipe.output.path), chosen)


def _labels(tasks: Sequence[str]) -> list[str]:
    """Return what tasks are called beside their sliders: one line each where there are many."""
    if len(tasks) <= _FEW_TASKS:
        return list(tasks)
    return cut_names(tasks, at_most(_LABEL_CHARACTERS))


def _numbers(score: Score) -> tuple[float, float, float]:
    return score.value, score.low, score.high
