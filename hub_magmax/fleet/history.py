"""History of a published model: its revisions, their scores, the last good one, and those rolled back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hub_magmax.checkpoints.index import ROUTER_WEIGHTS_NAME, SELECTION_SUFFIX
from hub_magmax.checkpoints.locations import repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.pinning import read_small_file
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.checkpoints.storage.hub import open_hub
from hub_magmax.errors import OutputError
from hub_magmax.evaluation.scores import MERGED, stored_means
from hub_magmax.evaluation.tables import Cell, Shown, Table
from hub_magmax.files import digest
from hub_magmax.fleet.tags import tagged_commit
from hub_magmax.fleet.verifying import unlike_report
from hub_magmax.hub import hub_api, hub_errors
from hub_magmax.merging.output.report import REPORT_NAME, parse_report
from hub_magmax.publishing.authorship import is_ours
from hub_magmax.recipe.arguments import checked
from hub_magmax.text import listed

#: Revisions that are looked at, the newest.
MAX_REVISIONS = 50

#: Title of the commits of `rollback`, by which the next one knows them.
TITLE = "Roll back to {}"
_TITLE = re.compile(r"Roll back to ([0-9a-f]{12})")

#: Revisions that are listed side by side.
_PARALLEL = 8

#: Changed files that are named of many.
_FEW = 3


@dataclass(frozen=True)
class StoredScores:
    """Scores of the merged model as they are stored with it.

    Attributes:
        metric: What they are called.
        means: By task, the mean score.
        examples: By task, the fingerprint of the examples.
    """

    metric: str
    means: Mapping[str, float] = field(hash=False)
    examples: Mapping[str, str] = field(hash=False)

    def is_comparable(self, other: StoredScores) -> bool:
        """Say whether both are of one metric on the same examples."""
        return (self.metric, self.examples) == (other.metric, other.examples)

    def is_worse(self, other: StoredScores, margin: float) -> bool:
        """Say whether a task's mean is below that of `other` by more than the margin."""
        # Not a rounding error of the mean: a loss of the margin itself is allowed.
        return any(self.means[task] - value < -margin - 1e-12 for task, value in other.means.items())


@dataclass(frozen=True)
class Revision:
    """A commit of a branch.

    Attributes:
        commit, created, title: Of the commit; the time in ISO 8601.
        weights: A digest of the weight files, the same for the same model; empty where none was merged.
        scores: Of the merged model; None where none are stored, and where `changed` names files, since the
            stored ones are then those of another model.
        rolled_back: A later commit restored an earlier revision in place of it.
        last_good: The tag of the last good revision names it (`tags.LAST_GOOD`).
        changed: Where scores are stored: files that are not those of the merge report, so that they were
            changed, removed or added by hand after the model was scored.
    """

    commit: str
    created: str
    title: str
    weights: str = ""
    scores: StoredScores | None = None
    rolled_back: bool = False
    last_good: bool = False
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@checked
def history(model: str, *, branch: str | None = None, limit: int = MAX_REVISIONS) -> tuple[Revision, ...]:
    """Return the revisions of a repository, the newest first, with what is stored of their scores.

    Args:
        model: A repository id, or with `@` and a branch.
        branch: The branch, tag or commit whose history it is; the default branch if None.
        limit: How many of the newest.

    Raises:
        SourceError: If the Hub does not answer, or there is no such repository or branch.
    """
    repo_id, branch = repository_of(model, branch)
    with taken_for_repository(model):
        commits = list_commits(repo_id, branch)
    undone, tagged = rolled_back(commits), tagged_commit(repo_id)

    def describe(commit: Any) -> Revision:
        is_undone, is_good = commit.commit_id in undone, commit.commit_id == tagged
        return replace(described(repo_id, commit), rolled_back=is_undone, last_good=is_good)

    with ThreadPoolExecutor(_PARALLEL) as pool:
        return tuple(pool.map(describe, commits[:limit]))


def described(repo_id: str, commit: Any) -> Revision:
    """Return a commit of `list_commits` with what is stored there, and nothing about others."""
    created = commit.created_at.isoformat(timespec="seconds")
    with closing(open_hub(repo_id, commit.commit_id)) as source:
        found = Revision(commit.commit_id, created, commit.title, _weights(source))
        if (scores := _stored_scores(source)) is None:
            return found
        changed = _changed(source, is_as_pushed=is_ours(commit.title, commit.message))
        return replace(found, scores=None if changed else scores, changed=changed)


def _changed(source: FileSource, *, is_as_pushed: bool) -> tuple[str, ...]:
    """Return the files that are not those of the merge report; the report itself where it is none."""
    if REPORT_NAME not in source.sizes:
        return (REPORT_NAME,)
    try:
        report = parse_report(read_small_file(source, REPORT_NAME), f"{source.label}, {REPORT_NAME}")
    except OutputError:
        return (REPORT_NAME,)
    return unlike_report(source, report, is_folder=False, is_as_pushed=is_as_pushed)


def list_commits(repo_id: str, revision: str | None) -> list[Any]:
    """Return the commits of a branch as the Hub lists them, the newest first."""
    with hub_errors(f"{repo_id}@{revision}" if revision else repo_id):
        return hub_api().list_repo_commits(repo_id, revision=revision)  # asks again by itself


def rolled_back(commits: Sequence[Any]) -> set[str]:
    """Return the ids of commits that were rolled back: all between a rollback and the revision it restored.

    Args:
        commits: From `list_commits`, the newest first.
    """
    ids = [str(commit.commit_id) for commit in commits]
    found: set[str] = set()
    for position, commit in enumerate(commits):
        restored = _origin(str(commit.title), ids)
        if restored is not None:
            found.update(ids[position + 1 : restored])
    return found


def _origin(title: str, commits: Sequence[str]) -> int | None:
    """Return the position of the commit that a rollback of this title restored; None for other titles."""
    match = _TITLE.fullmatch(title)
    begun = match[1] if match else "-"
    return next((at for at, commit in enumerate(commits) if commit.startswith(begun)), None)


def last_good(revisions: Iterable[Revision], margin: float) -> Revision | None:
    """Return the newest revision that was no worse than the last good one before it, by the stored scores.

    The first one with scores is good, and so is the first one that was scored on other examples. Revisions
    that were rolled back do not count. `history` lists a limited number, 50 by default: the oldest scored
    revision in it is good, whatever came before.

    Args:
        revisions: From `history`, the newest first.
        margin: How much worse a task may get.
    """
    good: Revision | None = None
    for revision in reversed([found for found in revisions if not found.rolled_back]):
        if (now := revision.scores) is None:
            continue
        before = good.scores if good is not None else None
        if before is None or not now.is_comparable(before) or not now.is_worse(before, margin):
            good = revision
    return good


def as_table(revisions: Sequence[Revision]) -> Table:
    """Return a row for each revision: commit, time, weights, metric, plain mean and lowest score, title.

    In the mean every task counts the same, whatever the preference.
    """
    head = ("commit", "created", "model", "metric", "plain mean", "lowest", "of", "title")
    return Table(head, tuple(map(_row, revisions)))


def _row(found: Revision) -> tuple[Cell, ...]:
    metric, mean, lowest, worst = None, None, None, None
    if found.scores is not None and found.scores.means:
        means = found.scores.means
        worst = min(means, key=lambda task: means[task])
        metric, mean, lowest = found.scores.metric, sum(means.values()) / len(means), means[worst]
    when = Shown(found.created, found.created[:16].replace("T", " "))
    weights = Shown(found.weights, found.weights[:8]) if found.weights else None
    marks = ["rolled back"] * found.rolled_back + ["last good"] * found.last_good
    if found.changed:
        marks.append(f"not as merged, so not as scored: {listed(found.changed, _FEW)}")
    title = "".join([found.title, *(f" ({mark})" for mark in marks)])
    return Shown(found.commit, found.commit[:12]), when, weights, metric, mean, lowest, worst, title


def _weights(source: FileSource) -> str:
    if REPORT_NAME not in source.sizes:
        return ""
    files = {path: source.stated_hashes(path) for path in source.sizes if _is_of_model(path)}
    return digest(files).removeprefix("sha256:")


def _is_of_model(path: str) -> bool:
    return path.endswith((".safetensors", SELECTION_SUFFIX)) and path != ROUTER_WEIGHTS_NAME


def _stored_scores(source: FileSource) -> StoredScores | None:
    """Return the scores that are stored with a model; None where there are none that can be read."""
    found = stored_means(source)
    if found is None:
        return None
    examples = {task: str(data.get("fingerprint", "")) for task, data in found.data.items()}
    means = {task: score.value for task in examples if (score := found.get(MERGED, task)) is not None}
    return StoredScores(found.metric, means, examples) if means.keys() == examples.keys() else None
