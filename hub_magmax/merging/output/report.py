"""Merge report: files, counts, sizes, times and versions of a merge."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hub_magmax.errors import OutputError
from hub_magmax.files import digest, json_text, read_json
from hub_magmax.text import Brief, format_bytes

REPORT_NAME = "merge_report.json"

#: File of a signature of the merge, beside the report.
SIGNATURE_NAME = "model.sig"

#: Reading a version parses the package's description: 15 took a third of the time of a tiny merge.
_version = cache(version)


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages of a merge, without importing them."""
    packages = ("hub_magmax", "torch", "safetensors", "huggingface_hub")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def lock_versions() -> dict[str, str]:
    """Return `software_versions()` and those of installed packages that compile, estimate and score."""
    found = software_versions()
    for name in ("numpy", "numba", "scipy", "POT", "transformers", "datasets", "lm_eval"):
        with suppress(PackageNotFoundError):
            found[name] = _version(name)
    return found


@dataclass(frozen=True)
class LostPart:
    """How far a layer of an adapter is from what was merged, as a product of the rank that it has.

    Attributes:
        layer: Name of the layer in the adapter.
        norm: Frobenius norm of the merged task vector.
        lost: Of what the product lacks.
    """

    layer: str
    norm: float
    lost: float

    @property
    def relative(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class ShardRecord:
    """Facts about a finished shard; the same on every run.

    Attributes:
        file: Name of the shard.
        size_bytes, sha256: Of the whole file.
        counts: Elements taken from each task, summed over the shard's tensors; empty for
            methods that mix values.
        num_unaligned: As reported by `algorithm-1`, summed likewise.
        duality_gap: Largest of the shard's tensors, or None.
        not_finite: Copied tensors that hold a NaN or an infinity, as their source does.
        num_unchanged: Elements of tensors that no task changes, where `counts` counts.
        lost: Layers of an adapter that were solved for.
    """

    file: str
    size_bytes: int
    sha256: str
    counts: tuple[int, ...] = ()
    num_unaligned: tuple[int, ...] = ()
    duality_gap: float | None = None
    not_finite: tuple[str, ...] = ()
    num_unchanged: int = 0
    lost: tuple[LostPart, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all values but empty ones that came later, so that earlier digests stay the same."""
        values = asdict(self)
        for name in ("not_finite", "num_unchanged", "lost"):
            if not values[name]:
                del values[name]
        return values


@dataclass(frozen=True, repr=False)
class MergeReport(Brief):
    """Result of a merge.

    Attributes:
        plan_digest: Of the plan that was carried out.
        shards: One record per output file.
        shares: By task, the share of merged elements that come from it; empty for methods that
            mix values. With `unchanged` they sum to 1.
        num_unaligned: By task, the elements that `algorithm-1` filled at random, or empty.
        duality_gap: Largest relative gap to the optimum over all tensors (`top-n`), or None.
        elements_merged, bytes_in, bytes_out: Of the whole merge.
        parameters: Elements of the output by dtype, in safetensors' names; of tied tensors once. Empty in
            reports of earlier versions.
        seconds: Wall-clock time of the run that finished it.
        profile: Seconds of that run by kind of work, added up over the threads of the first process: `read`
            and `write` files, `compute`, `store` (hash what was written, have the disk keep it, send it),
            and `wait` for values that are read by another thread.
        peak_memory_bytes: Most memory of the first process, without files that it maps: what `output.memory`
            limits. In reports of earlier versions these count.
        peak_resident_bytes: The same with files that it maps; 0 in reports of earlier versions.
        versions: Of Python and the packages that took part.
        notices: What the plan noted (tokenizers and heads that differ), and copies that are not finite.
        unchanged: Share of the merged elements in tensors that no task changes, as with adapters of some
            layers: they come from no task. 0 for methods that mix values.
        opened: How a library opened the output: `library`, with its version, and `result`; empty where it was
            not opened after the merge.
        files: sha256 of every other file that the merge wrote, by name; not of the report itself.
    """

    plan_digest: str
    shards: tuple[ShardRecord, ...]
    shares: Mapping[str, float] = field(hash=False)
    num_unaligned: Mapping[str, int] = field(hash=False)
    duality_gap: float | None
    elements_merged: int
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_memory_bytes: int
    versions: Mapping[str, str] = field(hash=False)
    notices: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    profile: Mapping[str, float] = field(default_factory=dict, hash=False)
    opened: Mapping[str, str] = field(default_factory=dict, hash=False)
    parameters: Mapping[str, int] = field(default_factory=dict, hash=False)
    peak_resident_bytes: int = 0
    unchanged: float = 0.0

    @property
    def without_effort(self) -> MergeReport:
        """The report without times and memory, which differ from run to run."""
        return replace(self, seconds=0.0, profile={}, peak_memory_bytes=0, peak_resident_bytes=0)

    @property
    def brief(self) -> str:
        done = f"{format_bytes(self.bytes_in)} read, {format_bytes(self.bytes_out)} written"
        return f"{self.elements_merged:,} elements merged, {done} in {self.seconds:.3g} s"

    @property
    def lost(self) -> tuple[LostPart, ...]:
        """Layers of an adapter that were solved for."""
        return tuple(part for shard in self.shards for part in shard.lost)

    @property
    def relative_loss(self) -> float:
        """Frobenius norm of what these layers lack, relative to that of what was merged."""
        norm = math.hypot(*(part.norm for part in self.lost))
        return math.hypot(*(part.lost for part in self.lost)) / norm if norm else 0.0

    @property
    def most_lost(self) -> LostPart:
        """The layer of these that lacks most, relative to its norm."""
        return max(self.lost, key=lambda part: part.relative)

    @property
    def sha256(self) -> dict[str, str]:
        """The sha256 of every file that the merge wrote, weights first."""
        return {shard.file: shard.sha256 for shard in self.shards} | dict(self.files)

    @property
    def digest(self) -> str:
        """Digest of plan and shards: the same on every run, whatever times, memory and versions."""
        return digest({"plan": self.plan_digest, "shards": [shard.to_dict() for shard in self.shards]})

    def to_json(self) -> str:
        values = {"digest": self.digest, **asdict(self), "shards": [s.to_dict() for s in self.shards]}
        return json_text(values)


def read_report(path: Path) -> MergeReport:
    """Return the report stored in `path`.

    Raises:
        OutputError: If it is missing or not what `to_json` writes.
    """
    try:
        return parse_report(path.read_bytes(), str(path))
    except OSError as error:
        raise OutputError(
            f"no {path.name}, so this is not a folder that a merge finished",
            where=str(path.parent),
            hint="Run the command that was interrupted again: it goes on there."
            if path.parent.name.endswith(".partial")
            else "Give the folder that `hub-magmax merge` wrote.",
        ) from error


def parse_report(content: bytes, where: str) -> MergeReport:
    """Return the report that `content` holds; `where` names it in messages.

    Raises:
        OutputError: If it is not what `to_json` writes, or was changed since.
    """
    refused = OutputError("not a merge report of this version", where=where)
    report, (stored,) = read_json(content, MergeReport, refused, ("digest",))
    if not report.shards:  # no merge writes a model without weights
        raise refused
    if stored != report.digest:
        raise OutputError(
            "the digest does not fit the content, so the merge report was changed",
            where=where,
            hint="Merge again, or take the model from where it came.",
        )
    return report
