"""A published or local model compared with the report of its merge."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO
from pathlib import Path

from hub_magmax.checkpoints.index import ROUTER_WEIGHTS_NAME, SELECTION_SUFFIX
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import read_small_file, stored_lock
from hub_magmax.checkpoints.side_files import is_side_file
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import HubMagmaxError, LockError, OutputError, PublishError
from hub_magmax.merging.output.report import REPORT_NAME, MergeReport, parse_report, read_report
from hub_magmax.publishing.comparing import AFTER_CHANGE, changed_files, compare_reported
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import parse_text, text_of
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock
from hub_magmax.recipe.matching import check_lock, refuse_missing_plugin
from hub_magmax.recipe.schema import RECIPE_NAME, Recipe


@checked
def verify(model: str, *, revision: str | None = None) -> dict[str, str]:
    """Compare every file that a merge wrote with the sha256 in the model's merge report.

    What people may write afterwards (the card, its picture, the scores) is not compared. Weights and other
    files that loaders read, and that the merge did not write, are errors.

    Args:
        model: A folder, or a repository id, also with `@` and a revision.
        revision: Of the repository; the default branch if None.

    Returns:
        The sha256 of each file that was compared; all of them are as recorded.

    Raises:
        OutputError: If there is no report, or a file of the folder differs, is missing or was added.
        PublishError: The same of a repository.
    """
    folder = Path(model)
    if folder.is_dir():
        report = read_report(folder / REPORT_NAME)
        with closing(LocalSource(folder, model)) as source:
            return _compare(source, report, OutputError)
    with closing(open_model(model, revision)) as source:
        if REPORT_NAME not in source.sizes:
            raise PublishError(
                f"there is no {REPORT_NAME}, so this is not a model that hub_magmax made",
                where=source.label,
            )
        content = read_small_file(source, REPORT_NAME)
        return _compare(source, parse_report(content, f"{source.label}, {REPORT_NAME}"), PublishError)


def _compare(source: TensorSource, report: MergeReport, kind: type[HubMagmaxError]) -> dict[str, str]:
    compare_reported(source, report, kind)
    if surplus := surplus_files(source, report):
        raise kind(
            "the merge did not write this file, and what loads the model reads it",
            where=f"{source.label}, {surplus[0]}",
            hint=AFTER_CHANGE[kind],
        )
    return report.sha256


def unlike_report(
    source: TensorSource, report: MergeReport, *, is_folder: bool, is_as_pushed: bool
) -> tuple[str, ...]:
    """Return the files that are not those of the report: changed, missing or added. No weights are read.

    Weights are compared by the sha256 that the Hub states, in a folder by their sizes. Small files of a
    repository are read unless the revision is a commit of this program, which compared them then.
    """
    sizes = {shard.file: shard.size_bytes for shard in report.shards}
    small = [path for path in report.files if path not in sizes]
    if is_folder:
        weights = [path for path, size in sizes.items() if source.size_of(path) != size]
    else:
        weights = [*changed_files(source, report, sizes)]
    read = [path for path in small if source.size_of(path) is None] if is_as_pushed else small
    return (*weights, *changed_files(source, report, read), *surplus_files(source, report))


def surplus_files(source: TensorSource, report: MergeReport) -> list[str]:
    """Return the files that a merge did not write, and that loading its model would read."""
    expected = report.sha256
    # A report of an earlier version lists the weights only.
    folders = dict.fromkeys(path.rpartition("/")[0] for path in sorted(expected))
    found = [path for folder in folders for path in source.contents(folder).sizes]
    added = [path for path in found if _is_loaded(path, weights_only=not report.files)]
    return [path for path in added if path not in expected]


def _is_loaded(path: str, *, weights_only: bool) -> bool:
    """Say whether loading a model reads a file of this name: weights, code, or what lies beside them."""
    if path == ROUTER_WEIGHTS_NAME:
        return False
    if weights_only or path.endswith((".safetensors", ".bin", SELECTION_SUFFIX)):
        return path.endswith((".safetensors", ".bin", SELECTION_SUFFIX))
    return path.endswith((".index.json", ".py")) or is_side_file(path.rpartition("/")[2])


def recipe_and_lock(stored: TensorSource, folder: Path) -> tuple[Recipe, Lock]:
    """Return the recipe and the lock stored with a model, with relative paths starting at `folder`.

    Raises:
        LockError: If one is missing or was changed, or they do not belong together.
        RecipeError: If the recipe was damaged.
        MissingDependencyError: If the plug-in that merged it is not installed.
    """
    for name in (RECIPE_NAME, LOCK_NAME):
        if name not in stored.sizes:
            raise LockError(
                f"there is no {name}, so what the model was made from is not known",
                where=stored.label,
                hint="Give a model that `hub-magmax` merged.",
            )
    locked = stored_lock(stored)
    refuse_missing_plugin(locked)  # first: without it the recipe's method is unknown
    content = BytesIO(read_small_file(stored, RECIPE_NAME))
    recipe = parse_text(text_of(content, f"{stored.label}, {RECIPE_NAME}", folder))
    check_lock(recipe, locked, f"{stored.label}, {LOCK_NAME}")
    return recipe, locked
