"""Verb for routers: route."""

from __future__ import annotations

import click

from hub_magmax.cli.options import RecipeOptions, format_option, recipe_options
from hub_magmax.cli.terminal import REGRESSED, Answer, progress, say, verb
from hub_magmax.evaluation.tables import Format
from hub_magmax.files import from_here


@verb
@recipe_options
@click.option(
    "--budget", type=float, default=0.3, show_default=True, help="Target share of escalated inputs."
)
@click.option("--risk", type=float, help="Share of answers that may be wrong, in place of the budget.")
@click.option(
    "--confidence", type=float, default=0.95, show_default=True, help="Of the statement about --risk."
)
@click.option("--seed", type=int, help="Of the division of the examples; the recipe's.")
@format_option
def route(
    asked: RecipeOptions,
    budget: float,
    risk: float | None,
    confidence: float,
    seed: int | None,
    form: Format,
) -> Answer:
    """Route inputs between RECIPE's merged model and checkpoints.

    It is measured on examples of the evaluation that it was not fitted on. Exits with 3
    if the examples do not support the stated --risk.

    \b
    Example:
      hub-magmax route recipe.yaml --budget 0.2
    """
    from hub_magmax.checkpoints.index import ROUTER_NAME
    from hub_magmax.cli.recipe_and_lock import read_merged
    from hub_magmax.fleet.routing.fitting import route as do_route

    recipe, locked = read_merged(asked)
    found = do_route(
        recipe,
        locked,
        budget=budget,
        risk=risk,
        confidence=confidence,
        seed=seed,
        report=say,
        progress=progress,
    )
    say(f"wrote {from_here(recipe.output_path / ROUTER_NAME)}")
    is_refused = found.stated is not None and found.stated.threshold is None
    return Answer(found.to_dict(), found.table(form), exit_code=REGRESSED if is_refused else 0)
