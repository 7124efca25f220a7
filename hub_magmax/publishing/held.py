"""Pushes of a merge that the Hub holds already: found, so that no commit is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.storage.hub import open_hub
from hub_magmax.errors import OutputError
from hub_magmax.merging.output.report import REPORT_NAME, SIGNATURE_NAME, parse_report, read_report
from hub_magmax.publishing.commits import Destination, Head, Published, candidates, differing, hashes_of
from hub_magmax.reporting.card_file import CARD_NAME, is_edited, stored_card


def held_already(
    destination: Destination, head: Head, folder: Path, expected: Mapping[str, str]
) -> Published | None:
    """Return the commit or the pull request that holds all files of a folder; None if there is none.

    A report is the same if it differs in times and memory alone, and so is the card that tells of them. Of a
    signed folder it is not, since the signature covers the report.

    Args:
        destination: Where to.
        head: The branch as it is now.
        folder: A finished output folder.
        expected: Hashes of each of its files, as `side_files.content_hashes` writes them.

    Raises:
        SourceError, PublishError: If the Hub does not answer.
    """
    for found in _places(destination, head):
        if not differing(found, {**expected, **_as_told_there(found, folder, expected)}):
            return found
    return None


def _places(destination: Destination, head: Head) -> Iterator[Published]:
    if head.holds_model:
        yield head.as_published(destination)
    if destination.create_pr:
        yield from candidates(destination)


def _as_told_there(found: Published, folder: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """Return hashes of report and card with the times of a published merge, if it is the folder's."""
    with closing(open_hub(found.repo_id, found.commit)) as source:
        if REPORT_NAME not in source.sizes or SIGNATURE_NAME in expected:
            return {}
        content = read_small_file(source, REPORT_NAME)
    told = {REPORT_NAME: hashes_of(content)}
    with suppress(OutputError):
        there = parse_report(content, found.repo_id)
        if there.without_effort != read_report(folder / REPORT_NAME).without_effort:
            return {}
        if CARD_NAME in expected and not is_edited(folder / CARD_NAME):
            told[CARD_NAME] = hashes_of(stored_card(folder, found.repo_id, there).encode())
        return told
    return {}
