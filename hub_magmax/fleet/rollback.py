"""Rollback of a published branch to an earlier model, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hub_magmax.checkpoints.locations import repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import HubMagmaxError, PublishError
from hub_magmax.fleet.history import TITLE, list_commits
from hub_magmax.fleet.references import restorable, standing
from hub_magmax.fleet.verifying import verify
from hub_magmax.hub import hub_api, retry
from hub_magmax.publishing.commits import Destination, Head, Published, commit, find_head, publish_errors
from hub_magmax.recipe.arguments import checked

#: Reasons that are shown where no earlier revision can be restored.
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class RolledBack(Published):
    """Commit of a rollback; after a rehearsal `commit` and `url` are empty.

    Attributes:
        restored: The revision whose files the branch holds now.
        replaced: The head of the branch before.
        copied, removed: The files that differ between them.
        why: Reason for this revision, in words; empty where it was named.
    """

    restored: str
    replaced: str
    copied: tuple[str, ...]
    removed: tuple[str, ...]
    why: str = ""


@checked
def rollback(
    model: str, *, branch: str | None = None, to: str | None = None, dry_run: bool = False
) -> RolledBack:
    """Restore the files of an earlier revision that passes `verify`, in one commit on top of the branch.

    Nothing is uploaded: the Hub copies large files by their hashes. Files that the revision does not have
    are removed, history stays, and nothing happens if the branch moves meanwhile.

    Called again it goes on to still older models: a revision that was rolled back once is restored only
    where `to` names it. The commits of rollbacks say in their titles what they restored.

    Args:
        model: A repository of merged models.
        branch: The branch to move; the default branch if None.
        to: The revision to restore. By default the last good one: the one that the tag `last-good` names,
            or the one that the stored scores tell, or else the newest one. It passes `verify`, was not
            rolled back, and holds another model than the branch does now.
        dry_run: Change nothing, and return what would be done.

    Raises:
        PublishError: If the revision does not pass, there is none, or the branch moved.
    """
    repo_id, branch = repository_of(model, branch)
    with taken_for_repository(model):
        head = find_head(Destination(repo_id, revision=branch))
    target, why = (resolve_commit(repo_id, to), "") if to is not None else _best(repo_id, head.commit)
    expected = verify(repo_id, revision=target)
    now, then = _files(repo_id, head.commit), _files(repo_id, target)
    copied = tuple(path for path in then if now.get(path) != then[path])
    removed = tuple(path for path in now if path not in then)
    if not copied and not removed:
        raise PublishError(
            f"the branch holds the files of {target[:7]} already",
            where=f"{repo_id}@{head.commit[:7]}",
            hint="Name an earlier revision with --to.",
        )
    planned = RolledBack(repo_id, "", "", target, head.commit, copied, removed, why)
    return planned if dry_run else _carried_out(planned, repo_id, branch, head, then, expected)


def _carried_out(
    planned: RolledBack,
    repo_id: str,
    branch: str | None,
    head: Head,
    files: Mapping[str, str],
    expected: Mapping[str, str],
) -> RolledBack:
    """Commit a rollback to the revision that holds `files`, and compare what the branch holds then."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    target = planned.restored
    destination = Destination(
        repo_id,
        revision=branch,
        commit_message=TITLE.format(target[:12]),
        commit_description=f"Restores the files of {target}, in place of those of {planned.replaced}.",
    )
    operations: list[Any] = [
        *(CommitOperationCopy(path, path, src_revision=target) for path in planned.copied),
        *(CommitOperationDelete(path) for path in planned.removed),
    ]
    done = commit(destination, operations, head, files)
    if verify(repo_id, revision=done.commit) != expected:
        raise PublishError(
            f"the Hub holds other files than those of {target[:7]} after the commit",
            where=f"{destination.name}, {done.commit[:7]}",
            hint="Do not use this revision; run the same command again.",
        )
    return replace(planned, commit=done.commit, url=done.url)


def _best(repo_id: str, head: str) -> tuple[str, str]:
    """Return the best commit before `head` that passes, was not rolled back, and holds another model.

    The reason for it comes with it.
    """
    with publish_errors(repo_id):
        commits = list_commits(repo_id, head)
    kept = standing(commits)
    ids = [str(commit.commit_id) for commit in commits]
    reasons = [f"{repo_id}@{name[:7]}: was rolled back" for name in ids if name not in kept]
    now = _passes(repo_id, head, [])
    tried = {head}
    for name, why in restorable(repo_id, commits, other_weights=now is not None):
        if name in tried:
            continue
        tried.add(name)
        found = _passes(repo_id, name, reasons)
        if found is not None and found != now:
            return name, why
    told = "; ".join(reasons[:_SHOWN_REASONS])
    raise PublishError(
        f"no earlier revision passes with another model{f' ({told})' if told else ''}",
        where=f"{repo_id}@{head[:7]}",
        hint="Name a revision with --to (`hub-magmax history REPO` lists them), or push a good model again.",
    )


def _passes(repo_id: str, commit: str, reasons: list[str]) -> dict[str, str] | None:
    """Return the hashes of a revision's files where all are as merged; else None, with the reason noted."""
    try:
        return verify(repo_id, revision=commit)
    except HubMagmaxError as error:
        reasons.append(f"{repo_id}@{commit[:7]}: {error.what}")
        return None


def _files(repo_id: str, commit: str) -> dict[str, str]:
    """Return the hash that the Hub states of every file at a commit, by path."""
    with publish_errors(repo_id):
        info = retry(lambda: hub_api().model_info(repo_id, revision=commit, files_metadata=True))
    return {
        file.rfilename: f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
        for file in info.siblings or []
    }
