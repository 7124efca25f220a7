"""Files of a model compared with the sha256 in its merge report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hub_magmax.checkpoints.pinning import file_sha256
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import HubMagmaxError, OutputError, PublishError
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.recipe.schema import RECIPE_NAME

AFTER_CHANGE: Mapping[type[HubMagmaxError], str] = {
    OutputError: "The folder changed after the merge; merge again into a new folder.",
    PublishError: "Do not use this revision; push again.",
}

#: Files of a folder that an evaluation of the finished merge writes anew.
_EVALUATION_FILES = {LOCK_NAME, PROVENANCE_NAME, RECIPE_NAME}

#: What to do where these alone differ.
_AFTER_EVALUATION = (
    "If `hub-magmax run` or `evaluate` was interrupted there, run the same command again; otherwise the "
    "folder changed after the merge: merge again into a new folder."
)


def changed_files(source: TensorSource, report: MergeReport, paths: Iterable[str]) -> dict[str, str]:
    """Return the files that a source holds otherwise than a report says: their sha256, or `missing`.

    Args:
        source: A merged folder, or a revision of a repository.
        report: Of the merge.
        paths: Files of the report that are compared.
    """
    found = {
        path: file_sha256(source, path) if source.size_of(path) is not None else "missing" for path in paths
    }
    return {path: sha256 for path, sha256 in found.items() if sha256 != report.sha256[path]}


def compare_reported(source: TensorSource, report: MergeReport, kind: type[HubMagmaxError]) -> None:
    """Raise `kind` unless a source holds every file that a merge wrote, as its report says."""
    expected = report.sha256
    found = changed_files(source, report, expected)
    if changed := [*found]:
        others = f"; also changed: {', '.join(changed[1:])}" if len(changed) > 1 else ""
        raise kind(
            f"sha256 is {found[changed[0]]}, the merge report says {expected[changed[0]]}{others}",
            where=f"{source.label}, {changed[0]}",
            hint=_AFTER_EVALUATION
            if kind is OutputError and _EVALUATION_FILES.issuperset(changed)
            else AFTER_CHANGE[kind],
        )
