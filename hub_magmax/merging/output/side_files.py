"""Files beside the weights: index, configuration, lock, provenance and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hub_magmax.checkpoints.config import CONFIG_NAME, with_values
from hub_magmax.checkpoints.index import ADAPTER_CONFIG_NAME
from hub_magmax.checkpoints.pinning import copied_files, copy_side_file
from hub_magmax.checkpoints.side_files import is_side_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.files import os_errors, sha256_of, write_json, write_text
from hub_magmax.merging.adapters import adapter_config
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.provenance import PROVENANCE_NAME, provenance
from hub_magmax.merging.output.report import REPORT_NAME, MergeReport, ShardRecord, software_versions
from hub_magmax.merging.profile import Spent, peak_resident_bytes
from hub_magmax.planning.plan import ConfigChange, Plan
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.lockfile import LOCK_NAME, LockedSource
from hub_magmax.recipe.schema import RECIPE_NAME
from hub_magmax.text import listed, step


# Complex, and flat: sums over jobs and shards, one for each field.
def report_of(plan: Plan, place: PartialFolder, seconds: float, spent: Spent) -> MergeReport:
    """Return the report of a merge whose files are all recorded in `place`."""
    records = tuple(place.journal.recorded(shard.file) for shard in plan.shards)
    shards = tuple(record for record in records if record is not None)
    assert len(shards) == len(plan.shards), "every process records its shards before the barrier"
    elements = sum(job.num_elements for job in plan.jobs if job.merged)
    counts = _by_task(plan, [shard.counts for shard in shards])
    unaligned = _by_task(plan, [shard.num_unaligned for shard in shards])
    gaps = [shard.duality_gap for shard in shards if shard.duality_gap is not None]
    return MergeReport(
        plan_digest=plan.digest,
        shards=shards,
        shares={name: count / elements for name, count in counts.items()},
        unchanged=sum(shard.num_unchanged for shard in shards) / elements if elements else 0.0,
        num_unaligned=unaligned if any(unaligned.values()) else {},
        duality_gap=max(gaps, default=None),
        elements_merged=elements,
        bytes_in=plan.bytes_in,
        bytes_out=sum(shard.size_bytes for shard in shards),
        parameters=plan.parameters,
        seconds=seconds,
        profile=dict(spent.seconds),
        peak_memory_bytes=spent.peak_memory_bytes,
        peak_resident_bytes=peak_resident_bytes(),
        versions=software_versions(),
        notices=(*notices(plan), *_not_finite_notice(plan, shards)),
    )


def _by_task(plan: Plan, counts: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return each task's sum over the shards that count, empty where none does."""
    sums = [sum(column) for column in zip(*filter(None, counts), strict=True)]
    return dict(zip(plan.lock.tasks, sums, strict=True)) if sums else {}


def _not_finite_notice(plan: Plan, shards: Sequence[ShardRecord]) -> tuple[str, ...]:
    """Return a line about copied tensors that hold a NaN or an infinity, if there are any."""
    names = {name for shard in shards for name in shard.not_finite}
    places = [f"{job.name} of {job.source}" for job in plan.jobs if job.name in names]
    if not places:
        return ()
    return (f"copied as they are, with NaN or infinity among their values: {listed(places, 5)}",)


@step("writing the files beside the weights")
def write_beside_weights(
    plan: Plan, sources: Mapping[str, TensorSource], folder: Path, report: MergeReport
) -> MergeReport:
    """Write the files beside the weights, and return the report with their hashes."""
    _write_side_files(plan, sources, folder)
    write_text(folder / PROVENANCE_NAME, provenance(plan.recipe.portable, plan.lock, report))
    report = replace(report, files=_hashes(folder, report))
    write_text(folder / REPORT_NAME, report.to_json())
    return report


def _hashes(folder: Path, report: MergeReport) -> dict[str, str]:
    """Return the sha256 of the files in `folder` that hold no weights, by name."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = sorted(files - {shard.file for shard in report.shards})
    return {name: sha256_of(folder / name) for name in names}


def _copy_files(plan: Plan, source: TensorSource, locked: LockedSource, folder: Path) -> None:
    """Copy what a model needs beside its weights, and write the tokenizer's files that are others."""
    # transformers takes a folder with both configurations for a whole model with an adapter beside it.
    kept_out = CONFIG_NAME if plan.ranks else ADAPTER_CONFIG_NAME
    own = plan.tokenizer.contents
    for path in copied_files(source, locked):
        # An adapter is loaded beside its base model, whose code and modules it does not need.
        if path not in (kept_out, *own) and (is_side_file(path) or not plan.ranks):
            copy_side_file(source, path, locked, folder)
    for path, content in own.items():
        if content is not None:
            with os_errors(folder / path):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)


def _write_side_files(plan: Plan, sources: Mapping[str, TensorSource], folder: Path) -> None:
    """Write recipe and lock and, beside weights, what loaders read."""
    if not plan.recipe.output.is_selection:  # which holds no weights, and must not look as if it did
        _write_for_loaders(plan, sources, folder)
    write_text(folder / RECIPE_NAME, plan.recipe.portable.to_yaml())
    write_text(folder / LOCK_NAME, plan.lock.to_json())


def _write_for_loaders(plan: Plan, sources: Mapping[str, TensorSource], folder: Path) -> None:
    """Write the index, and the files that a model needs besides weights."""
    files_from = plan.recipe.output.files_from
    source, locked = sources[files_from], plan.lock.sources[files_from]
    _copy_files(plan, source, locked, folder)
    change_config(folder / CONFIG_NAME, plan.config_changes)
    if len(plan.shards) > 1:
        weight_map = {job.name: shard.file for shard in plan.shards for job in shard.jobs}
        index = {"metadata": {"total_size": plan.bytes_out}, "weight_map": weight_map}
        write_json(folder / plan.index_name, index)
    if plan.ranks:
        write_text(folder / ADAPTER_CONFIG_NAME, adapter_config(plan, sources))


def change_config(path: Path, changes: Sequence[ConfigChange]) -> None:
    """Carry out the changes in a copied config.json; without changes nothing is read or written."""
    if changes:
        with os_errors(path):
            path.write_bytes(with_changes(path.read_bytes(), changes))


def with_changes(content: bytes, changes: Sequence[ConfigChange]) -> bytes:
    """Return a config.json with some values changed, and its order of keys, indentation and end kept."""
    return with_values(content, {change.path: change.new for change in changes})
