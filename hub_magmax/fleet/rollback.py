"""Rollback of a published branch to an earlier model, in one commit."""

from __future__ import annotations

from typing import Any

from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import HubMagmaxError, PublishError
from hub_magmax.fleet.verifying import verify
from hub_magmax.hub import hub_api
from hub_magmax.publishing.commits import Published, publish_errors

#: Reasons that are shown where no earlier revision can be restored.
_SHOWN_REASONS = 3


def rollback(repo_id: str, *, branch: str | None = None, to: str | None = None) -> Published:
    """Restore the files of an earlier revision that passes `verify`, in one commit on top of the branch.

    Nothing is uploaded: the Hub copies large files by their hashes. Files that the revision does not have
    are removed, history stays, and nothing happens if the branch moves meanwhile.

    Args:
        repo_id: A repository of merged models.
        branch: The branch to move; the default branch if None.
        to: The revision to restore. By default the newest one of the branch that passes and holds another
            model than the branch does now.

    Raises:
        PublishError: If the revision does not pass, there is none, or the branch moved.
    """
    with publish_errors(repo_id):
        head = hub_api().model_info(repo_id, revision=branch).sha
    assert head is not None
    target = resolve_commit(repo_id, to) if to is not None else _last_that_passes(repo_id, head)
    expected = verify(repo_id, revision=target)
    operations = _operations(repo_id, head, target)
    if not operations:
        raise PublishError(
            f"the branch holds the files of {target[:7]} already",
            where=f"{repo_id}@{head[:7]}",
            hint="Name an earlier revision with --to.",
        )
    with publish_errors(repo_id):
        commit = hub_api().create_commit(
            repo_id,
            operations,
            commit_message=f"Roll back to {target[:12]}",
            commit_description=f"Restores the files of {target}, in place of those of {head}.",
            revision=branch,
            parent_commit=head,
        )
    if verify(repo_id, revision=commit.oid) != expected:
        raise PublishError(
            f"the Hub holds other files than those of {target[:7]} after the commit",
            where=f"{repo_id}@{commit.oid[:7]}",
            hint="Do not use this revision; run the same command again.",
        )
    return Published(repo_id, commit.oid, commit.commit_url)


def _last_that_passes(repo_id: str, head: str) -> str:
    """Return the newest commit before `head` that passes and holds another model."""
    with publish_errors(repo_id):
        history = [commit.commit_id for commit in hub_api().list_repo_commits(repo_id, revision=head)]
    reasons: list[str] = []
    now = _passes(repo_id, head, [])
    for commit in history[1:]:
        found = _passes(repo_id, commit, reasons)
        if found is not None and found != now:
            return commit
    told = "; ".join(reasons[:_SHOWN_REASONS])
    raise PublishError(
        f"no earlier revision passes with another model{f' ({told})' if told else ''}",
        where=f"{repo_id}@{head[:7]}",
        hint="Name a revision with --to, or push a good model again.",
    )


def _passes(repo_id: str, commit: str, reasons: list[str]) -> dict[str, str] | None:
    """Return the hashes of a revision's files where all are as merged; else None, with the reason noted."""
    try:
        return verify(repo_id, revision=commit)
    except HubMagmaxError as error:
        reasons.append(f"{repo_id}@{commit[:7]}: {error.what}")
        return None


def _operations(repo_id: str, head: str, target: str) -> list[Any]:
    """Return the operations that turn the files of `head` into those of `target`."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    now, then = _files(repo_id, head), _files(repo_id, target)
    copies = [path for path in then if now.get(path) != then[path]]
    return [
        *(CommitOperationCopy(path, path, src_revision=target) for path in copies),
        *(CommitOperationDelete(path) for path in now if path not in then),
    ]


def _files(repo_id: str, commit: str) -> dict[str, str]:
    """Return git's id of every file at a commit, by path."""
    with publish_errors(repo_id):
        info = hub_api().model_info(repo_id, revision=commit, files_metadata=True)
    return {file.rfilename: str(file.blob_id) for file in info.siblings or []}
