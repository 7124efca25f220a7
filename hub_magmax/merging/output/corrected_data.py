"""The lock of a finished merge, written again after its evaluation's data was corrected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hub_magmax.files import sha256_of, write_text
from hub_magmax.merging.output.provenance import PROVENANCE_NAME, provenance
from hub_magmax.merging.output.report import REPORT_NAME, read_report
from hub_magmax.recipe.loading import load_recipe
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock
from hub_magmax.recipe.schema import RECIPE_NAME


def write_lock_again(folder: Path, lock: Lock) -> None:
    """Write a lock that names other data, and what depends on it: provenance, and the report's hashes.

    No file that loads the model changes. A signature of the folder no longer fits. Between the first file and
    the last `verify` fails; after an interruption the same call writes all of them.

    Args:
        folder: Of a finished merge.
        lock: Its own, but for the data.
    """
    report = read_report(folder / REPORT_NAME)
    write_text(folder / LOCK_NAME, lock.to_json())
    write_text(folder / PROVENANCE_NAME, provenance(load_recipe(folder / RECIPE_NAME), lock, report))
    changed = {name: sha256_of(folder / name) for name in (LOCK_NAME, PROVENANCE_NAME)}
    write_text(folder / REPORT_NAME, replace(report, files={**report.files, **changed}).to_json())
