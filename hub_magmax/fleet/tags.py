"""Tag of a repository that names its last good revision: the newest whose canary passed."""

from __future__ import annotations

from contextlib import suppress

from hub_magmax.hub import hub_api, hub_errors, retry
from hub_magmax.publishing.commits import publish_errors

#: Name of the tag.
LAST_GOOD = "last-good"


def tagged_commit(repo_id: str) -> str | None:
    """Return the commit that the tag names; None where there is no such tag.

    Raises:
        SourceError: If the Hub does not answer, or there is no such repository.
    """
    with hub_errors(repo_id):
        refs = retry(lambda: hub_api().list_repo_refs(repo_id))
    return next((str(ref.target_commit) for ref in refs.tags if ref.name == LAST_GOOD), None)


def move_tag(repo_id: str, commit: str, before: str | None) -> None:
    """Let the tag name `commit`. The Hub cannot move one: it is removed and made again.

    Args:
        repo_id: The repository.
        commit: What it is to name.
        before: What it names, None where there is no such tag.

    Raises:
        PublishError: If this token may not, or the Hub does not answer.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    api = hub_api()
    with publish_errors(f"{repo_id}, tag {LAST_GOOD}"):
        if before is not None:
            with suppress(RevisionNotFoundError):  # somebody else removed it, or the answer was lost
                retry(lambda: api.delete_tag(repo_id, tag=LAST_GOOD))
        retry(lambda: api.create_tag(repo_id, tag=LAST_GOOD, revision=commit, exist_ok=True))
