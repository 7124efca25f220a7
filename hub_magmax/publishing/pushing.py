"""Push of a finished folder: one commit, compared with the merge report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.index import ROUTER_NAME, ROUTER_WEIGHTS_NAME, SELECTION_SUFFIX
from hub_magmax.checkpoints.side_files import is_safe, is_side_file
from hub_magmax.errors import OutputError
from hub_magmax.evaluation.scores import OUTCOMES_NAME, SCORES_NAME, is_of_another
from hub_magmax.files import killed_writes
from hub_magmax.merging.output.report import REPORT_NAME, SIGNATURE_NAME, read_report
from hub_magmax.publishing.commits import (
    Destination,
    Head,
    Published,
    commit,
    hashes_of,
    holds_weights,
    prepare_repository,
)
from hub_magmax.publishing.held import held_already
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.model_names import near_sibling
from hub_magmax.recipe.result_files import picture_paths
from hub_magmax.reporting.card import JUDGEMENT_NAME
from hub_magmax.reporting.card_file import CARD_NAME, is_edited, stored_card
from hub_magmax.reporting.router_report import ROUTER_PICTURE_NAME

#: What belongs to one merged model, and would be taken for the next one's.
_OF_ONE_MODEL = (
    SCORES_NAME,
    OUTCOMES_NAME,
    SIGNATURE_NAME,
    JUDGEMENT_NAME,
    ROUTER_NAME,
    ROUTER_WEIGHTS_NAME,
    *(path.name for path in picture_paths(Path(ROUTER_PICTURE_NAME))),
)


@checked
def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "",
) -> Published:
    """Publish the files of `folder` as one commit, then compare every shard with the report.

    What the branch holds already is not pushed again (`Published.is_new` is then false).

    Args:
        folder: A finished output folder.
        repo_id: `org/model`; created if it is not there.
        private: Whether a new repository is private.
        revision: Branch to commit to; the default branch if None.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Title of the commit; by default Add or Update merged model.

    Raises:
        OutputError: If `folder` does not hold a merged model.
        PublishError: If the Hub refuses, or holds other bytes afterwards.
    """
    destination = Destination(repo_id, private, revision, create_pr, commit_message)
    return push_to(destination, Path(folder))


def push_to(destination: Destination, folder: Path, head: Head | None = None) -> Published:
    """Publish the files of `folder` as one commit on top of `head`; see `push`.

    Args:
        destination: Where to.
        folder: A finished output folder.
        head: The branch as `prepare_repository` found it; by default as it is now.
    """
    if not folder.is_dir():
        hint = near_sibling(str(folder), folder) or "Give a merged model's folder."
        raise OutputError("there is no such folder", where=str(folder), hint=hint)
    report = read_report(folder / REPORT_NAME)
    head = head or prepare_repository(destination)
    contents = contents_of(folder, destination.repo_id)
    weights = {shard.file: f"sha256:{shard.sha256}" for shard in report.shards}
    small = {name: hashes_of(content) for name, content in contents.items() if name not in weights}
    expected = weights | small
    if not _stale(contents, head) and (held := held_already(destination, head, folder, expected)) is not None:
        return held
    return commit(destination, operations(contents, head), head, expected)


def operations(contents: Mapping[str, Any], head: Head) -> list[Any]:
    """Return huggingface_hub's operations for a commit of files: paths, bytes, or operations, by name.

    Weights of an earlier push would be loaded beside, or instead of, the new ones, and are removed, with the
    configuration of an adapter; so are its scores and its signature. Beside a selection no file stays that
    belongs to weights.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [
        CommitOperationAdd(name, content) if isinstance(content, Path | bytes) else content
        for name, content in contents.items()
    ]
    return [*added, *(CommitOperationDelete(name) for name in _stale(contents, head))]


def contents_of(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Return the files to publish of a folder, by path; a card that nobody edited names its repository.

    Of sub-folders these are the files that the merge wrote.
    """
    written = filter(is_safe, read_report(folder / REPORT_NAME).files)
    unfinished = {path.name for path in killed_writes(folder)}
    names = {path.name for path in folder.iterdir()} - unfinished | {*written}
    contents: dict[str, Path | bytes] = {
        name: folder / name for name in sorted(names) if (folder / name).is_file()
    }
    if CARD_NAME in contents and not is_edited(folder / CARD_NAME):
        contents[CARD_NAME] = stored_card(folder, repo_id).encode()
    return contents


def _stale(contents: Mapping[str, Any], head: Head) -> list[str]:
    """Return the files of an earlier model that may not stay beside others."""
    rest = {*head.files} - contents.keys()
    is_selection = any(name.endswith(SELECTION_SUFFIX) for name in contents)
    return sorted(
        name
        for name in rest
        if holds_weights(name)
        or name in _OF_ONE_MODEL
        or is_of_another(name)
        or (is_selection and _is_loaded(name))
    )


def _is_loaded(path: str) -> bool:
    """Say whether a file at the top is read to load a model, besides its weights."""
    return "/" not in path and (path.endswith(".py") or is_side_file(path))
