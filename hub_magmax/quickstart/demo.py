"""Quickstart on a small real example: checkpoints, recipe, merge, scores, card, comparison."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.scores import MERGED, Scores, score_table
from hub_magmax.evaluation.scoring import evaluate
from hub_magmax.files import from_here, own_command, write_text
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan, run
from hub_magmax.quickstart import make_family
from hub_magmax.recipe.loading import load_recipe, updated
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import Report, step


def quickstart(folder: Path, *, report: Report = lambda line: None) -> tuple[dict[str, Any], str]:
    """Make the digits benchmark in `folder`, merge it, and compare methods and preferences.

    Args:
        folder: Created if it is not there; what an earlier run finished is used again.
        report: Called with a line of text at each step.

    Returns:
        The accuracies by row and task, and the same as text for people.
    """
    make_family(folder, report=report)
    path = folder / "recipe.yaml"
    if not path.exists():
        write_text(path, shipped_recipe())
    recipe = load_recipe(path)
    locked = lock(recipe)
    done = run(recipe, locked=locked, report=report)
    assert done.scores is not None
    rows = _rows(recipe, done.scores) | _variants(recipe, locked, report)
    values = {"recipe": str(path), "merged": str(done.output), "accuracy": rows}
    return values, _text(rows, recipe, path, done.output)


def shipped_recipe() -> str:
    """Return the text of the recipe that the quickstart runs."""
    return files("hub_magmax.quickstart").joinpath("recipe.yaml").read_text(encoding="utf-8")


def _rows(recipe: Recipe, scores: Scores) -> dict[str, dict[str, float]]:
    """Return the accuracies that the run measured, by row and task."""
    tasks = recipe.task_names
    found = {(score.model, score.task): score.value for score in scores.scores}
    return {
        "base model": {task: found["base_model", task] for task in tasks},
        f"last checkpoint ({tasks[-1]})": {task: found[tasks[-1], task] for task in tasks},
        "each task's own checkpoint": {task: found[task, task] for task in tasks},
        _title(recipe): {task: found[MERGED, task] for task in tasks},
    }


def _title(recipe: Recipe) -> str:
    weights = recipe.preference.weights if recipe.preference else None
    shown = (
        "/".join(f"{weights.get(task, 0):g}" for task in recipe.task_names) if weights else "its preference"
    )
    return f"{recipe.method.name} {shown}"


def _variants(recipe: Recipe, locked: Lock, report: Report) -> dict[str, dict[str, float]]:
    """Merge and score the methods to compare with, in a folder that is deleted afterwards."""
    weights = locked.preference.weights
    mirrored = dict(zip(weights, reversed(list(weights.values())), strict=True))
    uniform: Mapping[str, Any] = {"geometric": {"ratio": 1.0}}
    recipes = {
        "average": updated(recipe, {"method": "average", "preference": uniform}),
        "magmax": updated(recipe, {"method": "magmax", "preference": uniform}),
        "mirrored": updated(recipe, {"preference": {"weights": mirrored}}),
    }
    with TemporaryDirectory(prefix="hub_magmax_") as folder:
        places = {}
        for name, variant in recipes.items():
            output = Path(folder) / name
            with step(f"merging {name} to compare with", report):
                merge(plan(variant, lock(variant)), output)
            places[name] = ModelPlace(str(output))
        scores = evaluate(recipe, locked, "", models=places, report=report)
    titles = {"average": "average", "magmax": "magmax", "mirrored": _title(recipes["mirrored"])}
    return {
        title: {score.task: score.value for score in scores.scores if score.model == name}
        for name, title in titles.items()
    }


def _text(rows: Mapping[str, Mapping[str, float]], recipe: Recipe, path: Path, output: Path) -> str:
    table = score_table("accuracy on", rows, recipe.task_names)
    return "\n".join(["", table, "", *closing_text(path, output)])


def closing_text(path: Path, output: Path) -> list[str]:
    """Return the lines that say where a recipe's merged model is, and how to go on."""
    command = f"{own_command()} run {shlex.quote(str(path))}"
    return [
        f"The merged model   {from_here(output)}",
        f"Its card           {from_here(output / 'README.md')}",
        f"Its picture        {from_here(output / 'tradeoff.png')}",
        f"To merge your own models, edit {path} and run: {command}",
    ]
