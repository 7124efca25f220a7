"""Provenance: an in-toto statement about a merge, for tools that know nothing of recipes and locks.

It says of every weight file which sources, pinned how, and which parameters it was made from. It holds
no times and no machine, so the same merge with the same versions gives the same bytes.

Formats: in-toto Statement v1 and SLSA provenance v1,
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hub_magmax.checkpoints.locations import location_of
from hub_magmax.files import json_text
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import publishable_values

PROVENANCE_NAME = "provenance.json"

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"

#: Type of the statement; docs/reliability.md describes its parameters.
BUILD_TYPE = "urn:hub_magmax:merge:1"
BUILDER = "urn:hub_magmax:builder"

#: SLSA's names of the hashes in `side_files.content_hashes`; it has none for a folder's.
_DIGESTS = {"sha256": "sha256", "git": "gitBlob", "tree": "sha256Tree"}


def provenance(recipe: Recipe, lock: Lock, report: MergeReport) -> str:
    """Return the statement as JSON; access tokens and absolute paths in the recipe are shortened.

    Args:
        recipe: What was asked for: the external parameters.
        lock: What it stood for: the internal parameters, and the sources as resolved dependencies.
        report: What came of it: the weight files as subjects, and the versions of the builder.
    """
    subjects = [{"name": shard.file, "digest": {"sha256": shard.sha256}} for shard in report.shards]
    preference = lock.preference
    internal = {
        "lock": lock.digest,
        "plan": report.plan_digest,
        "method": dict(lock.method),
        "preference": {
            "weights": dict(preference.weights),
            "kind": preference.kind,
            "data_fingerprint": preference.data_fingerprint,
        },
        "seed": lock.seed,
        "chosen": dict(lock.chosen),
    }
    if rules := lock.value_rules:
        internal["tensors"] = [*rules]
    if lock.plugin:
        internal["plugin"] = dict(lock.plugin)
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"recipe": recipe.to_dict()},
        "internalParameters": internal,
        "resolvedDependencies": [
            *(
                dependency
                for name, source in lock.every_file.items()
                for dependency in _dependencies(
                    name, source, location_of(source, recipe.folder).uri, name == recipe.output.files_from
                )
            ),
            *(_dataset(name, commit) for name, commit in lock.datasets.items()),
            *(_local_data(name, digest) for name, digest in lock.local_data.items()),
        ],
    }
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": definition,
            "runDetails": {"builder": {"id": BUILDER, "version": dict(report.versions)}},
        },
    }
    return json_text(publishable_values(statement))


def _dependencies(name: str, source: LockedSource, place: str, side_files: bool) -> Iterator[dict[str, Any]]:
    """Describe a source, its weight files, and the files that were copied from it."""
    whole: dict[str, Any] = {"name": name, "uri": place}
    yield whole | ({"digest": {"gitCommit": source.commit}} if source.commit else {})
    for file in source.files:
        digest = {"digest": {"sha256": file.sha256}} if file.sha256 else {}
        pinned = {"size_bytes": file.size_bytes, "header_sha256": file.header_sha256}
        yield {"name": f"{name}/{file.path}", "uri": f"{place}/{file.path}", **digest, "annotations": pinned}
    for path, hashes in source.side_files.items() if side_files else ():
        parts = (part.split(":", 1) for part in hashes.split())
        digests = {_DIGESTS[kind]: value for kind, value in parts}
        yield {"name": f"{name}/{path}", "uri": f"{place}/{path}", "digest": digests}


def _dataset(name: str, commit: str) -> dict[str, Any]:
    """Describe a data set on the Hub; `name` ends with the revision that was asked for."""
    place = f"hf://datasets/{name.rpartition('@')[0]}@{commit}"
    return {"name": name, "uri": place, "digest": {"gitCommit": commit}}


def _local_data(name: str, digest: str) -> dict[str, Any]:
    """Describe a local file of data, or a folder, as `data.pin_local_data` does."""
    kind, _, value = digest.partition(":")
    return {"name": name, "uri": name, "digest": {_DIGESTS[kind]: value}}
