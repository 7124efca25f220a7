"""The verb that shows the whole job on a small example."""

from __future__ import annotations

from pathlib import Path

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.terminal import Answer, say, verb


@verb
@click.argument("folder", type=FilePath("dir"), default=Path("quickstart"))
def quickstart(folder: Path) -> Answer:
    """Train five small models in FOLDER, and merge them.

    Takes about a minute, installation aside, and shows what the preference does.

    \b
    Example:
      hub-magmax quickstart quickstart
    """
    from hub_magmax.quickstart.demo import quickstart as do_quickstart

    return Answer(*do_quickstart(folder, report=say))
