"""The verb that finds items which samples never solve: blindspots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.options import RecipeOptions, format_option, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, table_and, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


class Layer(click.ParamType):  # type: ignore[type-arg]  # generic in later versions of click only
    """A whole number, or a share with a point in it."""

    name = "layer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value) if "." in str(value) else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of a layer, such as 26, nor a share, such as 0.75")


@verb
@recipe_options
@click.option("--layer", type=Layer(), help="Block, such as 26, or share of the depth; 0.75.")
@click.option("--position", type=int, help="Token of the prompt, -1 the last.")
@click.option("--grafts", metavar="KIND,...", help="Kinds, in place of all but gaussian.")
@click.option("--answer", help="line: an answer's first line (default); final: its last number or mark.")
@click.option("--max-new-tokens", type=int, help="Where an answer ends; 32.")
@click.option("--temperature", type=float, help="Of sampled chains; 0.7.")
@click.option("--top-p", type=float, help="Of sampled chains; 0.9.")
@format_option
def blindspots(asked: RecipeOptions, grafts: str | None, form: Format, **how: Any) -> Answer:
    """Find what samples of RECIPE's models never solve.

    As many greedy chains, with the residual stream overwritten, try the same
    items, and as many fresh samples. Writes blind_spots.json and the card.

    \b
    Example:
      hub-magmax blindspots questions.yaml --layer 0.75
    """
    from hub_magmax.cli.recipe_and_lock import checked_beside, linked_card, read_merged
    from hub_magmax.evaluation.blind_spot_measuring import blindspots as do_blindspots
    from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME, write_blind_spots
    from hub_magmax.evaluation.chains import ChainProtocol
    from hub_magmax.recipe.result_files import place_of_results

    beside = checked_beside(asked, [BLIND_SPOTS_NAME])
    found, locked = read_merged(asked)
    place = place_of_results(found, locked, beside)
    place.check([BLIND_SPOTS_NAME])
    given = {name: value for name, value in how.items() if value is not None}
    if grafts is not None:
        given["grafts"] = tuple(kind.strip() for kind in grafts.split(","))
    size = found.evaluation.batch_size if found.evaluation else 1
    protocol = ChainProtocol(**given, seed=found.seed, batch_size=size)
    spots = do_blindspots(found, locked, found.output_path, protocol=protocol, report=say, progress=progress)
    files = [write_blind_spots(spots, place.path(BLIND_SPOTS_NAME)), *linked_card(asked, place)]
    return Answer(spots.to_dict(), table_and(files, spots.table(form), form))
