"""Records of finished merges, copied into a folder from wherever the models of a fleet are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.errors import HubMagmaxError, SourceError
from hub_magmax.evaluation.scores import FILES
from hub_magmax.fleet.members import Member, find_members
from hub_magmax.merging.output.report import REPORT_NAME
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.reporting.diagnosis import DIAGNOSIS_NAME
from hub_magmax.text import Report

#: Files that tell what was merged, how well it does, and what its checkpoints are like.
RECORDS = (REPORT_NAME, LOCK_NAME, *FILES, DIAGNOSIS_NAME)


def copy_records(target: str, folder: Path, report: Report = lambda line: None) -> None:
    """Copy the records of every model of a fleet, each into a folder of its own; no weights are read.

    Args:
        target: What `find_members` takes, such as a user or an organisation on the Hub.
        folder: Is there, and empty.
        report: Called with a line of text for each model, and for each that is left out, with the reason.

    Raises:
        SourceError: If the Hub does not answer, or there is no merged model.
        HubMagmaxError: If no model can be opened: what the first one's problem is.
    """
    members, problems = find_members(target), list[HubMagmaxError]()
    for number, member in enumerate(members, 1):
        report(f"reading the records of {member.name} ({number} of {len(members)})")
        try:
            _copy_records(member, folder / f"{number:05} {member.name.replace('/', ' ')[-100:]}")
        except HubMagmaxError as error:
            problems.append(error)
            report(f"{member.name} is left out: {error}")
    if len(problems) == len(members):
        raise problems[0]
    if not any((place / REPORT_NAME).is_file() for place in folder.iterdir()):
        raise SourceError(
            "no finished merge is there",
            where=target,
            expected=f"a repository with a {REPORT_NAME}, or a folder of finished merges",
            hint="Merge and score some pairs of tasks by `hub-magmax run` first.",
        )


def _copy_records(member: Member, place: Path) -> None:
    """Copy one model's records into a folder that is made, and named in errors about its files."""
    if member.problem is not None:
        raise member.problem
    with closing(open_model(member.key, member.revision)) as source:
        found = {name: read_small_file(source, name) for name in RECORDS if name in source.sizes}
    place.mkdir()
    for name, content in found.items():
        (place / name).write_bytes(content)
