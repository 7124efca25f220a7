"""The verb that finds items which samples never solve: blindspots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hub_magmax.cli.options import ChainOptions, RecipeOptions, chain_options, format_option, recipe_options
from hub_magmax.cli.terminal import Answer, progress, say, table_and, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


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
    from hub_magmax.evaluation.blind_spots import BLIND_SPOTS_NAME, write_blind_spots
    from hub_magmax.evaluation.chains import ChainProtocol
    from hub_magmax.recipe.result_files import place_of_results

    beside = checked_beside(asked, [BLIND_SPOTS_NAME])
    found, locked = read_merged(asked)
    place = place_of_results(found, locked, beside)
    place.check([BLIND_SPOTS_NAME])
    size = found.evaluation.batch_size if found.evaluation else 1
    protocol = ChainProtocol(**how.given(), seed=found.seed, batch_size=size)
    spots = do_blindspots(found, locked, found.output_path, protocol=protocol, report=say, progress=progress)
    files = [write_blind_spots(spots, place.path(BLIND_SPOTS_NAME)), *linked_card(asked, place)]
    return Answer(spots.to_dict(), table_and(files, spots.table(form), form))
