"""Rebuilding: a model merged again from its pinned sources, and compared byte for byte."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import file_sha256, read_small_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import OutputError, SourceError
from hub_magmax.evaluation.data import changed_local_data
from hub_magmax.fleet.verifying import recipe_and_lock
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.provenance import PROVENANCE_NAME
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.methods import get_method
from hub_magmax.planning.headers import plan_from_headers
from hub_magmax.recipe.lockfile import LOCK_NAME
from hub_magmax.recipe.schema import RECIPE_NAME

_CHANGED = "The model was changed after the merge, or another version of the software made it."
_OTHER_PROCESSOR = "Or it was merged on another processor: the bytes of this method depend on it."

#: Elements of a tensor that are compared at a time.
_BLOCK_ELEMENTS = 2**22


def rebuild(model: str, *, revision: str | None = None, folder: Path | None = None) -> MergeReport:
    """Merge `model` again from its recipe and lock, and compare every tensor and every file.

    Args:
        model: A merged folder, or a repository id.
        revision: Of the repository; the default branch if None.
        folder: Where the relative paths of local checkpoints start; the current folder if None.

    Returns:
        The report of the second merge, whose files are those of `model` byte for byte.

    Raises:
        OutputError: If a tensor differs, naming the first one in the order of the files; or else a file.
        LockError: If a source, or the stored recipe, is no longer what was locked.
    """
    with ExitStack() as stack:
        stored = stack.enter_context(closing(open_model(model, revision)))
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="hub_magmax_rebuild_")))
        recipe, locked = recipe_and_lock(stored, temporary, folder or Path())
        try:
            planned = plan_from_headers(recipe, locked)
        except SourceError as error:
            raise SourceError(
                error.what, where=error.where, hint="Say where local checkpoints start: --from FOLDER."
            ) from error
        report = merge(planned, temporary / "model")
        again = stack.enter_context(closing(LocalSource(temporary / "model", f"{stored.label} rebuilt")))
        method = get_method(locked.method["name"])
        reason = _CHANGED if method.is_portable else f"{_CHANGED} {_OTHER_PROCESSOR}"
        _compare(stored, again, reason)
        _compare_files(stored, again, report, reason)
    return report


def changed_data(model: str, *, revision: str | None = None, folder: Path | None = None) -> tuple[str, ...]:
    """Return the names of local data, of preference and evaluation, that differs from the model's lock.

    The weights do not depend on it: the lock holds the preference as numbers.
    """
    with (
        closing(open_model(model, revision)) as stored,
        TemporaryDirectory(prefix="hub_magmax_rebuild_") as temporary,
    ):
        recipe, locked = recipe_and_lock(stored, Path(temporary), folder or Path())
        return changed_local_data(recipe, locked.local_data)


def _compare(stored: TensorSource, again: TensorSource, reason: str) -> None:
    found, expected = stored.index.tensors, again.index.tensors
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            there, absent = (again, stored) if name in expected else (stored, again)
            raise OutputError(f"tensor {name!r} is in {there.label} only", where=absent.label)
    for name, info in expected.items():
        if (info.shape, info.dtype) != (found[name].shape, found[name].dtype):
            raise _difference(stored, name, "shape or dtype", reason)
        for start in range(0, info.num_elements, _BLOCK_ELEMENTS):
            stop = min(start + _BLOCK_ELEMENTS, info.num_elements)
            ours, theirs = again.read(name, start, stop), stored.read(name, start, stop)
            different = ours.view(torch.uint8) != theirs.view(torch.uint8)
            if different.any():
                element = start + int(torch.nonzero(different)[0]) // ours.element_size()
                raise _difference(stored, name, f"element {element:,}", reason)


def _compare_files(stored: TensorSource, again: TensorSource, report: MergeReport, reason: str) -> None:
    """Raise OutputError at the first file that differs; all tensors are the same.

    The second merge was made from recipe and lock, so there is nothing to compare these with.
    """
    for name, sha256 in report.sha256.items():
        if name in (RECIPE_NAME, LOCK_NAME):
            continue
        if stored.size_of(name) is None:
            raise OutputError(f"there is no {name}, and the recipe and lock give one", where=stored.label)
        if name == PROVENANCE_NAME:
            same = _statement(stored) == _statement(again)
        else:
            same = file_sha256(stored, name) == sha256
        if not same:
            header = " (its header; every tensor is the same)" if name.endswith(".safetensors") else ""
            raise OutputError(
                f"the file is not what the recipe and lock give{header}",
                where=f"{stored.label}, {name}",
                hint=reason,
            )


def _statement(source: TensorSource) -> Any:
    """Return a model's provenance without the versions of the software."""
    content = read_small_file(source, PROVENANCE_NAME)
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        values = json.loads(content)
        del values["predicate"]["runDetails"]
        return values
    return content


def _difference(stored: TensorSource, name: str, what: str, reason: str) -> OutputError:
    return OutputError(
        f"{what} is not what the recipe and lock give",
        where=f"{stored.label}, tensor {name!r}",
        hint=reason,
    )
