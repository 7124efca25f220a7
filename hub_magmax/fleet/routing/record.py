"""Files of a router: `router.json`, and `router.safetensors` with the verifier's arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.index import ROUTER_NAME, ROUTER_WEIGHTS_NAME
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import EvaluationError
from hub_magmax.files import digest, read_json, write_bytes, write_json
from hub_magmax.fleet.routing.verifier import Verifier
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.recipe.schema import RECIPE_NAME
from hub_magmax.reporting.router_report import RouterReport

#: Version of the files; a router of another one is refused.
FORMAT = 2

#: Files of a merge that name an evaluation made since, so that they may change while the model stays.
_NAMING = (RECIPE_NAME, LOCK_NAME, PROVENANCE_NAME)

_FIRST = "Fit one: hub-magmax route RECIPE."
_AGAIN = "Fit it again: hub-magmax route RECIPE."


@dataclass(frozen=True)
class RouterRecord:
    """Content of `router.json`.

    Attributes:
        merge: Digest of the merged model's weights and the files beside them.
        evaluator: How models run.
        seed: Of the division of the examples.
        data: By task, facts about the evaluation's examples, as `scores.json` has them.
        routing: The same of the recipe's `routing`; without it none.
        report: What was measured; its models are those of the verifier, and its threshold counts.
        weights: sha256 of `router.safetensors`.
        software: Versions and a digest of this package's code.
    """

    merge: str
    evaluator: str
    seed: int
    data: Mapping[str, Any] = field(hash=False)
    routing: Mapping[str, Any] = field(hash=False)
    report: RouterReport
    weights: str
    software: Mapping[str, Any] = field(hash=False)

    @property
    def values(self) -> dict[str, Any]:
        found = {
            name: getattr(self, name)
            for name in ("merge", "evaluator", "seed", "data", "routing", "weights", "software")
        }
        return {"format": FORMAT, **found, "report": self.report.to_dict()}

    @property
    def digest(self) -> str:
        """Digest of everything: the verifier's arrays too, by their sha256."""
        return digest(_plain(self.values))


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def merge_digest(files: Mapping[str, str]) -> str:
    """Return a digest of the sha256 of a merged model's files, but for recipe, lock and provenance."""
    return digest({name: sha256 for name, sha256 in files.items() if name not in _NAMING})


def verifier_bytes(verifier: Verifier) -> bytes:
    """Return the content of `router.safetensors`: the same for the same verifier."""
    from safetensors.numpy import save

    return save(verifier.arrays())


def sha256(content: bytes) -> str:
    """Return `sha256:` of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write_router(record: RouterRecord, arrays: bytes, folder: Path) -> None:
    """Write both files of a router; until both are there, they do not fit each other and are refused.

    Raises:
        OutputError: If they cannot be written.
    """
    write_bytes(folder / ROUTER_WEIGHTS_NAME, arrays)
    write_json(folder / ROUTER_NAME, {"digest": record.digest, **record.values})


def read_router(source: TensorSource) -> tuple[RouterRecord, Verifier]:
    """Return the router beside a model.

    Raises:
        EvaluationError: If there is none, or it was changed.
    """
    missing = [name for name in (ROUTER_NAME, ROUTER_WEIGHTS_NAME) if name not in source.sizes]
    if missing:
        is_new = len(missing) == 2
        raise EvaluationError(
            f"there is no {missing[0]}, so the model has no {'' if is_new else 'whole '}router",
            where=source.label,
            hint=_FIRST if is_new else _AGAIN,
        )
    record = _record(read_small_file(source, ROUTER_NAME), f"{source.label}, {ROUTER_NAME}")
    where = f"{source.label}, {ROUTER_WEIGHTS_NAME}"
    arrays = read_small_file(source, ROUTER_WEIGHTS_NAME)
    if sha256(arrays) != record.weights:
        raise EvaluationError(
            f"this is not the file that {ROUTER_NAME} names",
            where=where,
            expected=record.weights,
            hint=_AGAIN,
        )
    verifier = Verifier.from_arrays(_arrays(arrays, where), where)
    if len(verifier.calibration) != len(record.report.models):
        raise EvaluationError("it is of another number of models", where=where, hint=_AGAIN)
    return record, verifier


def _arrays(content: bytes, where: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(content))
    except SafetensorError as error:
        raise EvaluationError(f"this is no safetensors file ({error})", where=where, hint=_AGAIN) from error


def _record(content: bytes, where: str) -> RouterRecord:
    refused = EvaluationError("this is no record of a router", where=where, hint=_AGAIN)
    record, (stated, version) = read_json(content, RouterRecord, refused, ("digest", "format"))
    if version != FORMAT:
        raise EvaluationError(
            f"it has the format {version!r}", where=where, expected=f"format {FORMAT}", hint=_AGAIN
        )
    if record.digest != stated:
        raise EvaluationError("it was changed since the router was fitted", where=where, hint=_AGAIN)
    return record
