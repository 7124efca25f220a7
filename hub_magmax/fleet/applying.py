"""Weights made again of a selection, and of the base model and the checkpoints that it was made from."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hub_magmax.checkpoints.index import SELECTION_SUFFIX
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import LockError, OutputError
from hub_magmax.fleet.rebuilding import plan_again
from hub_magmax.fleet.verifying import recipe_and_lock, verify
from hub_magmax.merging.execution import merge
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.merging.selections.files import StoredSelection
from hub_magmax.publishing.preflight import check_room
from hub_magmax.recipe.arguments import check_named, checked, opened
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import ProgressBar, unseen

#: Bytes of a file on the Hub that are in memory at a time.
_COPIED_BYTES = 2**24


@checked
def apply(
    selection: str,
    output: Path | str,
    *,
    revision: str | None = None,
    folder: Path | None = None,
    progress: ProgressBar = unseen,
) -> MergeReport:
    """Make the weights that a selection was made in place of, and return the report.

    They are those that its recipe gives with `output.format: weights`, byte for byte. The selection's files
    are compared with its merge report, the checkpoints with its lock, and each tensor with the sha256 that
    the merge noted of its values. Called again after an interruption it goes on.

    Args:
        selection: A folder, or a repository id, also with `@` and a revision.
        output: Folder to create.
        revision: Of the repository; the default branch if None.
        folder: Where the relative paths of local checkpoints start; the current folder if None.
        progress: Opens what is called with the bytes that are written.

    Raises:
        OutputError: If this is no selection, or its folder was changed; or if `output` is taken.
        PublishError: If the repository was changed.
        SourceError: If a checkpoint is not there.
        LockError: If a checkpoint is no longer what was locked, or the selection does not fit.
    """
    check_named(output, "apply, output")
    if Path(selection).is_dir() and Path(selection).resolve() in Path(output).absolute().resolve().parents:
        raise OutputError(
            "the output lies in the selection", where=str(output), expected="a folder beside it"
        )
    with ExitStack() as stack:
        stored = stack.enter_context(closing(open_model(selection, revision)))
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="hub_magmax_apply_")))
        recipe, locked = recipe_and_lock(stored, folder or Path())
        if not recipe.output.is_selection:
            raise OutputError(
                "this model has its weights, and no selection",
                where=stored.label,
                expected="what output.format: selection gives",
                hint="Use it as it is.",
            )
        verify(selection, revision=revision)
        if StoredSelection.of(stored).locks != {locked.digest}:
            raise LockError(
                "the choices are those of another merge than the lock beside them",
                where=stored.label,
                hint="Get the selection again, or make it again.",
            )
        files = _files(stored, selection, temporary)
        planned = plan_again(_with_output(recipe, format=None), locked)
        planned = replace(planned, selection=(files, stored.label))
        check_room(replace(planned, recipe=_with_output(recipe, path=str(Path(output).absolute()))))
        with opened(progress, planned.progress_bytes, "merging", "bytes") as advance:
            return merge(planned, output, progress=advance)


def _with_output(recipe: Recipe, **changes: str | None) -> Recipe:
    return recipe.model_copy(update={"output": recipe.output.model_copy(update=changes)})


def _files(stored: TensorSource, selection: str, temporary: Path) -> Path:
    """Return a folder with the files of a selection; those of a repository are fetched."""
    if Path(selection).is_dir():
        return Path(selection)
    for name, size in stored.sizes.items():
        if name.endswith(SELECTION_SUFFIX):
            with (temporary / name).open("wb") as file:
                for start in range(0, size, _COPIED_BYTES):
                    file.write(stored.read_bytes(name, start, min(start + _COPIED_BYTES, size)))
    return temporary
