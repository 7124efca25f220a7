"""Verbs that learn from checkpoints and examples: diagnose, compare, sweep, blindspots, tails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import (
    ChainOptions,
    RecipeOptions,
    chain_options,
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
    from hub_magmax.analysis.diagnosing import FILES, write_diagnosis
    from hub_magmax.cli.recipe_and_lock import checked_beside, linked_card, read_locked
    from hub_magmax.recipe.result_files import place_of_results
    from hub_magmax.studies import diagnose as do_diagnose

    beside = checked_beside(asked, FILES)
    found, locked = read_locked(asked)
    place = place_of_results(found, locked, beside)
    place.check(FILES)
    diagnosis = do_diagnose(
        found,
        locked,
        rank=rank if metrics else None,
        examples=examples if metrics else 0,
        report=say,
        progress=progress,
    )
    files = [*write_diagnosis(diagnosis, place), *linked_card(asked, place)]
    text = table_and(files, diagnosis.table(form), form)
    return Answer(json.loads(diagnosis.to_json()), text, exit_code=ERROR if diagnosis.suspects else 0)


@verb
@recipe_options
@chain_options
@format_option
def blindspots(asked: RecipeOptions, how: ChainOptions, form: Format) -> Answer:
    """Find what samples of RECIPE's models never solve.

    As many greedy chains, with the residual stream overwritten, try the same
    items, and as many fresh samples. Writes blind_spots.json and the card.

    \b
    Example:
      hub-magmax blindspots questions.yaml --layer 0.75
    """
    from hub_magmax.cli.recipe_and_lock import checked_beside, linked_card, read_merged
    from hub_magmax.evaluation.blind_spot_measuring import blindspots as do_blindspots
    from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME
    from hub_magmax.evaluation.chains import ChainProtocol
    from hub_magmax.files import write_json
    from hub_magmax.recipe.result_files import place_of_results

    beside = checked_beside(asked, [BLIND_SPOTS_NAME])
    found, locked = read_merged(asked)
    place = place_of_results(found, locked, beside)
    place.check([BLIND_SPOTS_NAME])
    size = found.evaluation.batch_size if found.evaluation else 1
    protocol = ChainProtocol(**how.given(), seed=found.seed, batch_size=size)
    spots = do_blindspots(found, locked, found.output_path, protocol=protocol, report=say, progress=progress)
    values = spots.to_dict()
    files = [write_json(place.path(BLIND_SPOTS_NAME), values), *linked_card(asked, place)]
    return Answer(values, table_and(files, spots.table(form), form))


@verb
@click.argument("first")
@click.argument("second")
@click.option("--column", help="Column of the data; of a merge, the task.")
@click.option("--bounds", nargs=2, type=float, help="Ends of the scale of scores that have them, as 0 1.")
@click.option("--lower", is_flag=True, help="Less is worse, as of margins: compare the lower tails.")
@click.option("--paired", is_flag=True, help="Line by line, both scored the same examples.")
@click.option(
    "--margins", nargs=2, type=float, help="Means, and CVaR at 0.9, this near are equivalent; 0.1 0.2."
)
@format_option
def tails(
    first: str,
    second: str,
    column: str | None,
    bounds: tuple[float, float] | None,
    lower: bool,
    paired: bool,
    margins: tuple[float, float] | None,
    form: Format,
) -> Answer:
    """Compare how bad the worst examples of two samples are.

    FIRST and SECOND are data with a column of scores, of which more is worse, or
    folders of merges: then of what each example lost against the task's own
    checkpoint. Mean and CVaR are always told. A claim about the shape of the
    tails is refused unless it passes every gate of docs/tails.md.

    \b
    Example:
      hub-magmax tails before.csv after.csv --column loss --paired
    """
    from hub_magmax.evaluation.tail_gates import ShapeProtocol
    from hub_magmax.evaluation.tail_samples import check_pairs, read_sample
    from hub_magmax.evaluation.tail_shape import compare_tails

    one, other = (read_sample(place, column) for place in (first, second))
    if paired:
        check_pairs(one, other)
    ends = bounds or one.bounds or other.bounds
    if lower:
        one, other, ends = one.negative, other.negative, ends and (-ends[1], -ends[0])
    found = compare_tails(
        one.values.tolist(),
        other.values.tolist(),
        names=(one.name, other.name),
        bounds=ends,
        paired=paired,
        protocol=ShapeProtocol(*margins) if margins else None,
    )
    return Answer(found.to_dict(), found.table(form))
