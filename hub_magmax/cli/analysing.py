"""Verbs that learn from checkpoints and examples: diagnose, compare, sweep."""

from __future__ import annotations

import json
from pathlib import Path

from hub_magmax.cli.options import RecipeOptions, device_option, recipe_argument, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, verb, wrote


@verb
@recipe_argument
@device_option
def compare(recipe: Path, device: str | None) -> Answer:
    """Try methods, scalings and preferences in memory, and write the winner as a recipe."""
    from hub_magmax.analysis.comparing import comparable, write_comparison
    from hub_magmax.analysis.comparing import compare as do_compare
    from hub_magmax.cli.asked import read_recipe
    from hub_magmax.pipeline import lock
    from hub_magmax.recipe.loading import load_recipe

    asked = read_recipe(RecipeOptions(recipe, device=device))
    locked = lock(comparable(asked), report=say)
    comparison = do_compare(asked, locked, report=say)
    files = write_comparison(load_recipe(recipe), comparison, recipe)
    return Answer(json.loads(comparison.to_json()), f"{comparison.table()}\n{wrote(files)}")


@verb
@recipe_options
@device_option
def sweep(asked: RecipeOptions) -> Answer:
    """Merge RECIPE in memory for many preferences, and show which trade-offs there are."""
    from hub_magmax.analysis.sweeping import sweep as do_sweep
    from hub_magmax.analysis.sweeping import sweepable, write_sweep
    from hub_magmax.cli.asked import read_asked
    from hub_magmax.pipeline import lock, result_folder

    found, locked = read_asked(asked)
    locked = locked or lock(sweepable(found), report=say)
    surface = do_sweep(found, locked, report=say)
    files = [*write_sweep(found, surface, result_folder(found))]
    files += _linked_card(asked)
    return Answer(surface.to_dict(), f"{surface.table()}\n{wrote(files)}")


@verb
@recipe_options
def diagnose(asked: RecipeOptions) -> Answer:
    """Read RECIPE's checkpoints once, and say what is odd about them before they are merged."""
    from hub_magmax.analysis.diagnosing import diagnose as do_diagnose
    from hub_magmax.analysis.diagnosing import write_diagnosis
    from hub_magmax.cli.asked import read_asked
    from hub_magmax.pipeline import lock, result_folder
    from hub_magmax.pipeline import plan as make_plan

    found, locked = read_asked(asked)
    planned = make_plan(found, locked or lock(found, report=say))
    with progress(planned.bytes_out, "diagnosing") as advance:
        diagnosis = do_diagnose(planned, progress=advance)
    files = [*write_diagnosis(diagnosis, result_folder(found))]
    files += _linked_card(asked)
    return Answer(json.loads(diagnosis.to_json()), f"{diagnosis.table()}\n{wrote(files)}")


def _linked_card(asked: RecipeOptions) -> list[Path]:
    """Write the card of the merged model again where there is one, since it links to the files beside it."""
    from hub_magmax.cli.asked import read_asked, read_merged
    from hub_magmax.reporting.card_file import CARD_NAME, write_stored_card

    recipe, _ = read_asked(asked)
    if not (recipe.output_path / CARD_NAME).is_file():
        return []
    return [write_stored_card(*read_merged(asked), keep_edited=True)]
