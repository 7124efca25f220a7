"""The verb that compares the tails of two samples: tails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hub_magmax.cli.options import format_option
from hub_magmax.cli.terminal import Answer, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.tables import Format


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
