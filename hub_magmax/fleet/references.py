"""Earlier revisions of a model by their quality: the last good one, and the previous one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import EvaluationError
from hub_magmax.fleet import MARGIN
from hub_magmax.fleet.history import Revision, described, history, last_good, list_commits, rolled_back
from hub_magmax.fleet.tags import LAST_GOOD, tagged_commit
from hub_magmax.hub import is_offline
from hub_magmax.text import Report

#: Word for the newest earlier revision that holds another model.
PREVIOUS = "previous"


def reference(repo_id: str, commit: str, against: str | None, margin: float, report: Report) -> str:
    """Return the commit whose stored scores a canary of `commit` is compared with.

    Args:
        repo_id: The repository.
        commit: The revision that is scored again.
        against: `last-good` (or None), `previous`, or a revision. Offline the history is not known, so that
            the first of these means `commit` itself.
        margin: How much worse a task of a good revision may be than the last good one before it.
        report: Told where the last good revision is another model.

    Raises:
        SourceError: If the Hub does not answer, or there is no such revision.
        EvaluationError: If there is no previous one.
    """
    if against == PREVIOUS:
        return _previous(repo_id, commit).commit
    if against not in (None, LAST_GOOD):
        return resolve_commit(repo_id, against)
    if is_offline():
        return commit
    now, good, why = _last_good(repo_id, commit, margin)
    if good is None or good.commit == commit:
        return commit
    if good.weights != now.weights:
        when = f"{good.commit[:12]}, {good.created[:10]}, {good.title!r}"
        report(f"comparing with the last good model ({when}): {why}")
    return good.commit


def _last_good(repo_id: str, commit: str, margin: float) -> tuple[Revision, Revision | None, str]:
    """Return the revision itself, the last good one up to it, and the reason for that one in words.

    The tag names it, unless that revision was rolled back, is none of this history, or was scored on other
    examples; then the stored scores say which one it is.
    """
    tagged, commits = tagged_commit(repo_id), list_commits(repo_id, commit)
    now = described(repo_id, commits[0])
    if tagged in standing(commits):
        good = described(repo_id, _by_id(commits, str(tagged)))
        if good.scores and (now.scores is None or good.scores.is_comparable(now.scores)):
            return now, good, f"the tag {LAST_GOOD} names it, since its canary passed"
    good_by_scores = last_good(history(repo_id, branch=commit), margin)
    return now, good_by_scores, "the stored scores of this one are worse"


def _previous(repo_id: str, commit: str) -> Revision:
    """Return the newest revision before `commit` that has scores, another model, and was not rolled back."""
    commits = list_commits(repo_id, commit)
    now, kept = described(repo_id, commits[0]), standing(commits)
    for earlier in commits[1:]:
        if earlier.commit_id in kept:
            found = described(repo_id, earlier)
            if found.scores is not None and found.weights != now.weights:
                return found
    raise EvaluationError(
        "there is no earlier revision with scores and another model",
        where=f"{repo_id}@{commit[:7]}",
        hint=f"`hub-magmax history {repo_id}` lists the revisions; name one with --against.",
    )


def restorable(repo_id: str, commits: Sequence[Any], *, other_weights: bool) -> Iterator[tuple[str, str]]:
    """Yield the commits before the first one of `commits` to go back to, the best first, with the reason.

    Args:
        repo_id: The repository.
        commits: From `list_commits`; the first one is left.
        other_weights: Weights that the first one holds are no improvement.
    """
    kept, tagged = standing(commits[1:], commits), tagged_commit(repo_id)
    if tagged in kept:
        yield str(tagged), f"the tag {LAST_GOOD} names it, since its canary passed"
    now, *earlier = history(repo_id, branch=commits[0].commit_id)
    others = [found for found in earlier if not (other_weights and found.weights == now.weights)]
    if (good := last_good(others, MARGIN)) is not None:
        yield good.commit, "the last good one by its stored scores"
    yield from ((name, "the newest other one that passes `verify`") for name in kept)


def standing(commits: Sequence[Any], among: Sequence[Any] = ()) -> list[str]:
    """Return the ids of commits that were not rolled back by one of them, or of `among`, in their order."""
    undone = rolled_back(among or commits)
    return [str(commit.commit_id) for commit in commits if commit.commit_id not in undone]


def _by_id(commits: Sequence[Any], commit_id: str) -> Any:
    return next(commit for commit in commits if commit.commit_id == commit_id)
