"""Rebuilding: a model merged again from its pinned sources, and compared, byte for byte where that holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hub_magmax.checkpoints.index import SELECTION_SUFFIX
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import file_sha256, read_small_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import (
    CheckpointError,
    LockError,
    MismatchError,
    OutputError,
    PublishError,
    RecipeError,
    SourceError,
)
from hub_magmax.evaluation.data import changed_local_data
from hub_magmax.fleet.verifying import recipe_and_lock
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.merging.selections.files import StoredSelection
from hub_magmax.planning.headers import plan_from_headers
from hub_magmax.planning.plan import Plan
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock
from hub_magmax.recipe.matching import pinned_by_headers
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe
from hub_magmax.text import listed

#: Errors of `rebuild` that say that the model does not come out of its recipe and lock. Others (a source that
#: is not there, a missing package, too little memory) say that it could not be merged again.
DIFFERENT = (OutputError, PublishError, LockError, RecipeError, CheckpointError, MismatchError)

_CHANGED = "The model was changed after the merge, or another version of the software made it."

#: Elements of a tensor that may differ under a method whose last bits depend on the machine: one in so many,
#: by one unit in the last place of the output's dtype, or of float32 if that is wider; of elements below the
#: tensor's root mean square, of that.
ONE_IN = 100

#: Elements of a tensor that are compared at a time.
_BLOCK_ELEMENTS = 2**22


@checked
def rebuild(model: str, *, revision: str | None = None, folder: Path | None = None) -> MergeReport:
    """Merge `model` again from its recipe and lock, and compare every tensor and every file.

    Args:
        model: A merged folder, or a repository id.
        revision: Of the repository; the default branch if None.
        folder: Where the relative paths of local checkpoints start; the current folder if None.

    Returns:
        The report of the second merge. Its files are those of `model` byte for byte, but where the bytes of
        the method depend on the machine (`Lock.is_portable`): then one element of a tensor in `ONE_IN` may
        differ, by one unit in the last place.

    Raises:
        OutputError: If a tensor differs, naming the first one in the order of the files; or else a file.
        LockError: If a source, or the stored recipe, is no longer what was locked.
    """
    with ExitStack() as stack:
        stored = stack.enter_context(closing(open_model(model, revision)))
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="hub_magmax_rebuild_")))
        recipe, locked = recipe_and_lock(stored, folder or Path())
        # Recipes of models do not say which links were trusted. What they lead to is compared, and not kept.
        planned = plan_again(recipe.model_copy(update={"trusted_links": (temporary.anchor,)}), locked)
        report = merge(planned, temporary / "model")
        again = stack.enter_context(closing(LocalSource(temporary / "model", f"{stored.label} rebuilt")))
        with _naming_unsure_sources(locked):
            if recipe.output.is_selection:
                _compare_selections(stored, again)
            else:
                _compare(stored, again, is_portable=locked.is_portable)
        _compare_files(stored, again, report, is_portable=locked.is_portable)
    return report


@contextmanager
def _naming_unsure_sources(locked: Lock) -> Iterator[None]:
    """Name the checkpoints that may have other values than those that were merged, where a tensor differs."""
    try:
        yield
    except OutputError as error:
        if unsure := pinned_by_headers(locked.every_file.values()):
            error.add_hint(
                f"Or a checkpoint in a folder was changed since the merge: the lock pins {listed(unsure, 5)} "
                "by headers alone. `hub-magmax lock --hash` before a merge pins every byte."
            )
        raise


def plan_again(recipe: Recipe, locked: Lock) -> Plan:
    """Return the plan of a model's stored recipe and lock.

    Raises:
        SourceError: If a checkpoint is not there.
        LockError: If one is no longer what was locked.
    """
    try:
        return plan_from_headers(recipe, locked)
    except SourceError as error:
        raise SourceError(
            error.what, where=error.where, hint="Say where local checkpoints start: --from FOLDER."
        ) from error


def changed_data(model: str, *, revision: str | None = None, folder: Path | None = None) -> tuple[str, ...]:
    """Return the names of local data, of preference and evaluation, that differs from the model's lock.

    The weights do not depend on it: the lock holds the preference as numbers.
    """
    with closing(open_model(model, revision)) as stored:
        recipe, locked = recipe_and_lock(stored, folder or Path())
        return changed_local_data(recipe, locked.local_data)


def _compare_selections(stored: TensorSource, again: TensorSource) -> None:
    """Raise OutputError at a tensor whose values, by their sha256, are not those of a second selection."""
    found, expected = StoredSelection.of(stored).digests, StoredSelection.of(again).digests
    for name in dict.fromkeys([*expected, *found]):
        if found.get(name) != expected.get(name):
            raise _difference(stored, name, "the value of an element")


def _compare(stored: TensorSource, again: TensorSource, *, is_portable: bool) -> None:
    found, expected = stored.index.tensors, again.index.tensors
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            there, absent = (again, stored) if name in expected else (stored, again)
            raise OutputError(f"tensor {name!r} is in {there.label} only", where=absent.label)
    for name, info in expected.items():
        if (info.shape, info.dtype) != (found[name].shape, found[name].dtype):
            raise _difference(stored, name, "shape or dtype")
        if is_portable:
            _compare_bits(name, stored, again)
        else:
            _compare_nearly(name, stored, again)


def _blocks(
    name: str, stored: TensorSource, again: TensorSource
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield a tensor's parts in both models, and the index of the first element of each."""
    size = again.index.tensors[name].num_elements
    for start in range(0, size, _BLOCK_ELEMENTS):
        stop = min(start + _BLOCK_ELEMENTS, size)
        yield start, again.read(name, start, stop), stored.read(name, start, stop)


def _compare_bits(name: str, stored: TensorSource, again: TensorSource) -> None:
    for start, ours, theirs in _blocks(name, stored, again):
        different = ours.view(torch.uint8) != theirs.view(torch.uint8)
        if different.any():
            element = start + int(torch.nonzero(different)[0]) // ours.element_size()
            raise _difference(stored, name, f"element {element:,}")


def _compare_nearly(name: str, stored: TensorSource, again: TensorSource) -> None:
    """Raise OutputError at an element that differs by more than a step, or if more than a few differ."""
    num_different = 0
    for start, ours, theirs in _blocks(name, stored, again):
        different = ours.view(torch.uint8) != theirs.view(torch.uint8)
        if not different.any():
            continue
        far = torch.nonzero(_are_far(ours, theirs))
        if far.numel():
            raise _difference(stored, name, f"element {start + int(far[0]):,}")
        num_different += int((ours != theirs).sum())
    size = again.index.tensors[name].num_elements
    if num_different > max(1, size // ONE_IN):
        raise _difference(stored, name, f"more than one element in {ONE_IN} ({num_different:,} of {size:,})")


def _are_far(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Say which numbers differ by more than a step; of integers, all that differ."""
    if not ours.is_floating_point():
        return ours != theirs
    step = max(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)
    one, other = ours.double(), theirs.double()
    sizes = one.abs().clamp(min=float(one.square().mean().sqrt()))
    return ~((one - other).abs() <= step * sizes)  # NaN is no near number


def _compare_files(
    stored: TensorSource, again: TensorSource, report: MergeReport, *, is_portable: bool
) -> None:
    """Raise OutputError at the first file that differs; all tensors are the same, or nearly so.

    The second merge was made from recipe and lock, so there is nothing to compare these with.
    """
    for name, sha256 in report.sha256.items():
        if name in (RECIPE_NAME, LOCK_NAME) or name.endswith(SELECTION_SUFFIX):
            continue  # other versions of zlib give other bytes for the same choices
        if stored.size_of(name) is None:
            raise OutputError(f"there is no {name}, and the recipe and lock give one", where=stored.label)
        if name == PROVENANCE_NAME:
            same = _statement(stored, is_portable) == _statement(again, is_portable)
        elif is_portable or (header := _header(again, name)) is None:
            same = file_sha256(stored, name) == sha256
        else:
            same = _header(stored, name) == header
        if not same:
            told = " (its header; every tensor is the same)" if name.endswith(".safetensors") else ""
            raise OutputError(
                f"the file is not what the recipe and lock give{told}",
                where=f"{stored.label}, {name}",
                hint=_CHANGED,
            )


def _header(source: TensorSource, name: str) -> str | None:
    """Return the sha256 of the header of a file of weights; None of other files."""
    return next((shard.header_sha256 for shard in source.index.shards if shard.file == name), None)


def _statement(source: TensorSource, with_digests: bool) -> Any:
    """Return a model's provenance, without the versions of the software."""
    content = read_small_file(source, PROVENANCE_NAME)
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        values = json.loads(content)
        del values["predicate"]["runDetails"]
        if not with_digests:
            values["subject"] = [subject["name"] for subject in values["subject"]]
        return values
    return content


def _difference(stored: TensorSource, name: str, what: str) -> OutputError:
    return OutputError(
        f"{what} is not what the recipe and lock give",
        where=f"{stored.label}, tensor {name!r}",
        hint=_CHANGED,
    )
