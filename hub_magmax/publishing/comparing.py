"""Files of a model compared with the sha256 in its merge report."""

from __future__ import annotations

from collections.abc import Mapping

from hub_magmax.checkpoints.pinning import file_sha256
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import HubMagmaxError, OutputError, PublishError
from hub_magmax.merging.output.report import MergeReport

AFTER_CHANGE: Mapping[type[HubMagmaxError], str] = {
    OutputError: "The folder changed after the merge; merge again into a new folder.",
    PublishError: "Do not use this revision; push again.",
}


def compare_reported(source: TensorSource, report: MergeReport, kind: type[HubMagmaxError]) -> None:
    """Raise `kind` unless a source holds every file that a merge wrote, as its report says."""
    expected = report.sha256
    found = {
        path: file_sha256(source, path) if source.size_of(path) is not None else "missing"
        for path in expected
    }
    changed = [path for path in expected if found[path] != expected[path]]
    if changed:
        others = f"; also changed: {', '.join(changed[1:])}" if len(changed) > 1 else ""
        raise kind(
            f"sha256 is {found[changed[0]]}, the merge report says {expected[changed[0]]}{others}",
            where=f"{source.label}, {changed[0]}",
            hint=AFTER_CHANGE[kind],
        )
