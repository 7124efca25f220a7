"""Commits of a repository in the Hub's local cache, and the folder of one."""

from __future__ import annotations

from pathlib import Path

from hub_magmax.checkpoints.recognition import holds_weights
from hub_magmax.errors import SourceError
from hub_magmax.text import listed

#: Characters of a commit that name it; fewer can be the name of a branch.
_SHORTEST = 7


def cached_commits(repo_id: str) -> list[str]:
    """Return the commits of which the local cache holds files, the newest download last."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    if not folder.is_dir():
        return []
    return [path.name for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)]


def commit_in_cache(repo_id: str, revision: str | None) -> str | None:
    """Return the commit in the local cache that `revision` abbreviates.

    Args:
        repo_id: Of the repository.
        revision: What a person wrote; a name that the cache does not know.

    Returns:
        The commit, or None if the cache has no commit of the repository at all.

    Raises:
        SourceError: If it has commits, and `revision` is none of these: they are named.
    """
    commits = cached_commits(repo_id)
    begun = [commit for commit in commits if revision and commit.startswith(revision)]
    if revision and len(revision) >= _SHORTEST and len(begun) == 1:
        return begun[0]
    if commits:
        raise _other_commits(repo_id, revision, begun or commits)
    return None


def _other_commits(repo_id: str, revision: str | None, commits: list[str]) -> SourceError:
    newest, num_others = commits[-1], len(commits) - 1
    others = f" (and {', '.join(commit[:_SHORTEST] for commit in commits[-4:-1])})" if num_others else ""
    return SourceError(
        f"the local cache does not know {revision or 'the default branch'}; of this repository it has "
        f"the commit {newest}{others}",
        where=repo_id,
        expected="a commit that is in the cache, since the Hub is not reached",
        hint=f"If that is the model, name it: {repo_id}@{newest} (with HF_HUB_OFFLINE=1); or connect to "
        "the Hub, without HF_HUB_OFFLINE.",
    )


def check_complete(folder: Path, label: str, repo_id: str, commit: str) -> None:
    """Raise SourceError for a snapshot that holds files of a model, and no weights of any kind."""
    files = {path.name: 0 for path in folder.rglob("*") if path.is_file()}
    if not holds_weights((files, ())):
        raise SourceError(
            f"the local cache has no weights of this commit, only {listed(sorted(files) or ['a folder'], 3)}",
            where=label,
            expected="all files of the model",
            hint=f"Download the rest: hf download {repo_id} --revision {commit}",
        )
