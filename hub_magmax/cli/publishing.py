"""The verb that publishes a merged folder."""

from __future__ import annotations

from pathlib import Path

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import DestinationOptions, destination_options
from hub_magmax.cli.terminal import Answer, say, verb


@verb
@click.argument("folder", type=FilePath("dir"))
@click.argument("repo_id")
@destination_options
def push(folder: Path, repo_id: str, to: DestinationOptions) -> Answer:
    """Publish a merged FOLDER as REPO_ID, in one commit.

    \b
    Example:
      hub-magmax push merged me/merged --private
    """
    from hub_magmax.merging.output.report import REPORT_NAME
    from hub_magmax.publishing.addresses import pushed, pushed_values
    from hub_magmax.publishing.commits import Destination, prepare_repository
    from hub_magmax.publishing.preflight import told_of
    from hub_magmax.publishing.pushing import push_to
    from hub_magmax.recipe.lockfile import LOCK_NAME, read_lock

    if to.private_key is not None:
        from hub_magmax.fleet.signing import sign

        sign(folder, to.private_key)
    destination = Destination(repo_id, **to.given())
    head = None
    if all((folder / name).is_file() for name in (REPORT_NAME, LOCK_NAME)):
        locked, head = read_lock(folder / LOCK_NAME), prepare_repository(destination)
        say(told_of(head, destination, locked, "another REPO_ID"))
    published = push_to(destination, folder, head)
    return Answer(pushed_values(published, to.revision), pushed(published, to.revision))
