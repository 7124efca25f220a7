"""Explorer page: one HTML file, without network, that shows the scores of a preference as it is dragged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hub_magmax.evaluation.scores import Score
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.figures.short_names import cut_names
from hub_magmax.reporting.tradeoff_surface import EXPLORER_NAME, Surface
from hub_magmax.text import one_line, publishable_values

#: Text of the page that the measured values replace.
_PLACE = "__MEASURED__"

#: Tasks up to which long names are shown whole, and characters of a name that are shown of more.
_FEW_TASKS, _LABEL_CHARACTERS = 12, 24


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
    import yaml

    values = publishable_values(recipe.portable.to_dict())
    values.pop("preference", None)
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
        "points": [
            {
                "weights": point.weights,
                "scores": [(*_numbers(score), point.deviation(score.task)) for score in point.scores],
            }
            for point in surface.points
        ],
        "front": surface.front,
        "base": [_numbers(score) for score in surface.base_model],
        "own": [_numbers(score) for score in surface.own],
        "examples": [score.num_examples for score in surface.base_model],
        "recipe": yaml.safe_dump(values, sort_keys=False, allow_unicode=False),
    }


def _labels(tasks: Sequence[str]) -> list[str]:
    """Return what tasks are called beside their sliders: one line each where there are many."""
    if len(tasks) <= _FEW_TASKS:
        return list(tasks)
    return cut_names(tasks, lambda text: len(text) <= _LABEL_CHARACTERS)


def _numbers(score: Score) -> tuple[float, float, float]:
    return score.value, score.low, score.high
