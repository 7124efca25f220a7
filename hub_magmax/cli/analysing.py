"""Verbs that learn from checkpoints and examples: diagnose, compare, sweep."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import (
    RecipeOptions,
    changed_recipe,
    device_option,
    faults_option,
    format_option,
    from_cache_option,
    metric_options,
    recipe_options,
)
from hub_magmax.cli.terminal import ERROR, Answer, progress, say, table_and, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


@verb
@changed_recipe
@from_cache_option
@device_option
@faults_option
@format_option
def compare(asked: RecipeOptions, in_spite_of: tuple[str, ...], form: Format) -> Answer:
    """Try methods, scalings, preferences; write the best recipe.

    Merges in memory. RECIPE names the examples to choose by and to report on under `compare`. By default all
    built-in methods are tried, with nine scalings, under the recipe's preference and a uniform one: 100 to
    300 models. Lists in compare.methods and compare.scaling try fewer; `plan` says how many.

    \b
    Examples:
      hub-magmax compare recipe.yaml
      hub-magmax compare recipe.yaml --set compare.scaling=[0.3,0.5,1]
    """
    from hub_magmax.analysis.comparing import FILES, comparable, write_comparison
    from hub_magmax.analysis.comparing import compare as do_compare
    from hub_magmax.cli.recipe_and_lock import files_beside, read_asked, read_recipe
    from hub_magmax.studies import study

    place = files_beside(asked, read_recipe(asked))
    place.check(FILES)
    found, locked = read_asked(asked, prepare=comparable)
    prepared = comparable(found)
    file = place.path("compare.journal")
    with study(found, prepared, locked, file, in_spite_of, say, progress) as (kept, journal):
        comparison = do_compare(found, kept, journal=journal, report=say, progress=progress)
        files = write_comparison(found, comparison, place)
    return Answer(json.loads(comparison.to_json()), table_and(files, comparison.table(form), form))


@verb
@recipe_options
@device_option
@faults_option
@format_option
def sweep(asked: RecipeOptions, in_spite_of: tuple[str, ...], form: Format) -> Answer:
    """Merge RECIPE for many preferences, and show the trade-offs.

    Merges in memory, and scores by the examples of `evaluation`. By default 60 preferences are tried, and the
    recipe's own; sweep.budget is their number, and `plan` says how many models that makes.

    \b
    Examples:
      hub-magmax sweep recipe.yaml
      hub-magmax sweep recipe.yaml --set sweep.budget=20
    """
    from hub_magmax.analysis.sweeping import FILES, sweepable, write_sweep
    from hub_magmax.analysis.sweeping import sweep as do_sweep
    from hub_magmax.cli.recipe_and_lock import checked_beside, linked_card, read_asked
    from hub_magmax.recipe.result_files import place_of_results
    from hub_magmax.studies import study

    beside = checked_beside(asked, FILES)
    found, locked = read_asked(asked, prepare=sweepable)
    prepared = sweepable(found)
    file = beside.path("sweep.journal")
    with study(found, prepared, locked, file, in_spite_of, say, progress) as (kept, journal):
        place = place_of_results(found, kept, beside)
        place.check(FILES)
        surface = do_sweep(found, kept, journal=journal, report=say, progress=progress)
        files = [*write_sweep(found, surface, place), *linked_card(asked, place)]
    return Answer(surface.to_dict(), table_and(files, surface.table(form), form))


@verb
@recipe_options
@click.option("--metrics", is_flag=True, is_eager=True, help="Measure pairs of tasks: do they merge well?")
@metric_options
@format_option
def diagnose(asked: RecipeOptions, metrics: bool, rank: int, examples: int, form: Format) -> Answer:
    """Read RECIPE's checkpoints once; say what is odd in them.

    Exits with 1 if one of them has a fault, for which a merge would be refused.
    --metrics reads every element, once; directions of matrices take longer, and
    how long is said before. Where evaluation names examples of every task, the
    tasks' models run on a few, for activations and gradients.

    \b
    Examples:
      hub-magmax diagnose recipe.yaml
      hub-magmax diagnose recipe.yaml --metrics --rank 0
    """
    from dataclasses import replace

    from hub_magmax.analysis.diagnosing import FILES, write_diagnosis
    from hub_magmax.analysis.diagnosing import diagnose as do_diagnose
    from hub_magmax.analysis.pair_sums import measured_pairs
    from hub_magmax.cli.recipe_and_lock import checked_beside, linked_card, lock_journal, read_asked
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.recipe.result_files import place_of_results

    beside = checked_beside(asked, FILES)
    found, locked = read_asked(asked)
    journal = lock_journal(asked, found)
    locked = locked or lock(found, report=say, progress=progress, journal=journal)
    place = place_of_results(found, locked, beside)
    place.check(FILES)
    planned = make_plan(found, locked)
    with progress(planned.bytes_out, "diagnosing") as advance:
        diagnosis = do_diagnose(planned, progress=advance)
    if metrics:
        measured = measured_pairs(planned, rank, examples, report=say, progress=progress)
        diagnosis = replace(diagnosis, metrics=measured)
    files = [*write_diagnosis(diagnosis, place), *linked_card(asked, place)]
    text = table_and(files, diagnosis.table(form), form)
    return Answer(json.loads(diagnosis.to_json()), text, exit_code=ERROR if diagnosis.suspects else 0)
