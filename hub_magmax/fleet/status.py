"""Status of a fleet: what each of its models is, what it is behind of, and what was changed in it by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from hub_magmax.checkpoints.locations import followed_branch
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.pinning import read_small_file, stored_lock
from hub_magmax.checkpoints.source import FileSource
from hub_magmax.errors import HubMagmaxError, OutputError, explained
from hub_magmax.evaluation.scores import MERGED, stored_means
from hub_magmax.fleet.checks import Check, latest, noted
from hub_magmax.fleet.history import list_commits
from hub_magmax.fleet.members import Member, find_members
from hub_magmax.fleet.tags import tagged_commit
from hub_magmax.fleet.verifying import unlike_report
from hub_magmax.hub import without_cache_advice
from hub_magmax.merging.output.report import REPORT_NAME, parse_report
from hub_magmax.publishing.authorship import is_ours
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.lockfile import Lock, LockedSource
from hub_magmax.recipe.matching import changed_keys
from hub_magmax.text import publishable

#: Models and sources that are looked at side by side.
_PARALLEL = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """A checkpoint that a model was merged from, and its branch now.

    Attributes:
        role: `base_model`, or the task's name.
        name: As the recipe writes it.
        commit: The pinned one; empty for a folder, which is not looked at.
        head: What the branch names now; empty where it is not asked for, as of a name that is a commit.
        num_behind: Commits since the pinned one; None where the branch does not hold it any more.
        since: Time of the first of these, or of the head; empty where there are none.
        problem: Why the branch could not be asked for.
    """

    role: str
    name: str
    commit: str = ""
    head: str = ""
    num_behind: int | None = 0
    since: str = ""
    problem: str = ""

    @property
    def is_behind(self) -> bool:
        return bool(self.head) and self.head != self.commit


@dataclass(frozen=True)
class Status:
    """One model of a fleet, as far as it could be looked at.

    Attributes:
        model: Repository or folder, as it is shown.
        site: Name of the recipe's site; empty where no recipe says it.
        commit, updated: Head of the repository's branch, and its time; empty for a folder.
        method: Name, scaling and the other options.
        preference: Weight of each task, in the recipe's order.
        origins: The base model and the tasks' checkpoints.
        version: Of hub_magmax that merged it.
        metric: Of the stored scores; empty where there are none.
        guard: Merged minus base model in the mean score, by guard.
        verified, canary: The last checks that this machine noted, with the revision they were of.
        tag: `head` or `earlier`: what the tag `last-good` names; empty where there is none.
        by_hand: Titles of the newest commits that are not of this program, since its last one.
        changed: Files that are not those of the merge report: changed, missing or added.
        not_as_asked: Where a recipe names it: keys of the recipe with other values than it was merged with.
        problem: Why it could not be looked at, or not at all of it.
    """

    model: str
    site: str = ""
    commit: str = ""
    updated: str = ""
    method: Mapping[str, Any] = field(default_factory=dict, hash=False)
    preference: Mapping[str, float] = field(default_factory=dict, hash=False)
    origins: tuple[Origin, ...] = ()
    version: str = ""
    metric: str = ""
    guard: Mapping[str, float] = field(default_factory=dict, hash=False)
    verified: Check | None = None
    canary: Check | None = None
    tag: Literal["", "head", "earlier"] = ""
    by_hand: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    not_as_asked: tuple[str, ...] = ()
    problem: str = ""

    @property
    def behind(self) -> tuple[Origin, ...]:
        """Checkpoints whose branches moved since."""
        return tuple(origin for origin in self.origins if origin.is_behind)

    @property
    def problems(self) -> tuple[str, ...]:
        """All that could not be looked at."""
        asked = dict.fromkeys(origin.problem for origin in self.origins)
        return tuple(filter(None, (self.problem, *asked)))

    @property
    def is_faulty(self) -> bool:
        """Whether files changed, or the last check of this revision did not pass."""
        checks = [check for check in (self.verified, self.canary) if check and check.commit == self.commit]
        return bool(self.changed) or any(check.result != "passed" for check in checks)

    def to_dict(self) -> dict[str, Any]:
        behind = [origin.role for origin in self.behind]
        return {**asdict(self), "behind": behind, "is_faulty": self.is_faulty}


@checked
def fleet_status(target: str) -> tuple[Status, ...]:
    """Return the status of every model of a fleet, in the order in which the target names them.

    Only listings and small files are read, no weights. Of a model on the Hub that is six requests at most
    (commits, tags, files, report, lock, scores), and one for each branch that the fleet was merged from; of a
    model with commits by hand its other small files are read too. What is wrong with one model is told in
    its status.

    Args:
        target: See `members.find_members`.

    Raises:
        SourceError, RecipeError: If it is not known which models are meant.
    """
    members, checks = find_members(target), noted()
    with ThreadPoolExecutor(_PARALLEL) as pool:
        found = [*pool.map(partial(_look, checks=checks), members)]
    pinned = dict.fromkeys(o for status in found for o in status.origins if _branch(o) is not None)
    branches = dict.fromkeys(filter(None, map(_branch, pinned)))
    with ThreadPoolExecutor(_PARALLEL) as pool:
        commits = dict(zip(branches, pool.map(_commits_or_problem, branches), strict=True))
    return tuple(
        replace(status, origins=tuple(_since(origin, commits) for origin in status.origins))
        for status in found
    )


def _look(member: Member, checks: Sequence[Check]) -> Status:
    """Return what is known of a model; where something ends it, the facts until then, and the reason."""
    facts: dict[str, Any] = {}
    try:
        if member.problem is not None:
            raise member.problem
        for some in _facts(member, checks):
            facts |= some
    except (HubMagmaxError, OSError) as error:
        facts["problem"] = str(_told(error))
    return Status(member.name, member.site, **facts)


def _told(error: HubMagmaxError | OSError) -> HubMagmaxError | None:
    """Return what is said about an error; commits of branches are in no cache."""
    told = explained(error)
    return None if told is None else without_cache_advice(told)


def _facts(member: Member, checks: Sequence[Check]) -> Iterator[dict[str, Any]]:
    """Yield facts about a model, by the names of `Status`, as far as they can be read."""
    with taken_for_repository(member.repository, Path()):
        commits = [] if member.folder is not None else list_commits(member.repository, member.revision)
    commit = str(commits[0].commit_id) if commits else ""
    ours = [number for number, found in enumerate(commits) if is_ours(found.title, found.message)]
    if commits:
        yield _of_commits(member.repository, commits, commits[: ours[0] if ours else 0])
    yield {
        "verified": latest(checks, "verify", member.key, commit),
        "canary": latest(checks, "canary", member.key, commit),
    }
    with closing(open_model(member.key, commit or None)) as source:
        yield from _of_files(source, member, is_as_pushed=ours[:1] == [0])


def _of_commits(repo_id: str, commits: Sequence[Any], by_hand: Sequence[Any]) -> dict[str, Any]:
    """Return what a repository's commits tell."""
    return {
        "commit": str(commits[0].commit_id),
        "updated": commits[0].created_at.isoformat(timespec="seconds"),
        "by_hand": tuple(str(found.title) for found in by_hand),
        "tag": _tag(repo_id, str(commits[0].commit_id), commits),
    }


def _of_files(source: FileSource, member: Member, *, is_as_pushed: bool) -> Iterator[dict[str, Any]]:
    """Yield what the files of a model tell."""
    if REPORT_NAME not in source.sizes:
        raise OutputError(
            f"there is no {REPORT_NAME}, so this is not a model that hub_magmax made", where=source.label
        )
    report = parse_report(read_small_file(source, REPORT_NAME), f"{source.label}, {REPORT_NAME}")
    yield {"version": str(report.versions.get("hub_magmax", ""))}
    is_folder = member.folder is not None
    yield {"changed": unlike_report(source, report, is_folder=is_folder, is_as_pushed=is_as_pushed)}
    lock = stored_lock(source)
    if member.recipe is not None:
        yield {"not_as_asked": tuple(changed_keys(member.recipe, lock))}
    yield {
        "method": dict(lock.method),
        "preference": dict(lock.preference.weights),
        "origins": tuple(_origin(role, locked) for role, locked in lock.every_source.items()),
    }
    yield _guards(source, lock)


def _tag(repo_id: str, commit: str, commits: Sequence[Any]) -> str:
    tagged = tagged_commit(repo_id)
    is_earlier = tagged in {found.commit_id for found in commits}
    return "head" if tagged == commit else "earlier" if is_earlier else ""


def _origin(role: str, locked: LockedSource) -> Origin:
    return Origin(role, publishable(locked.reference), locked.commit or "")


def _guards(source: FileSource, lock: Lock) -> dict[str, Any]:
    """Return the metric of the stored scores, and the differences of the data sets that are of no task."""
    if (scores := stored_means(source)) is None:
        return {}
    found = {}
    for name in scores.data:
        base, merged = scores.get("base_model", name), scores.get(MERGED, name)
        if name not in lock.tasks and base and merged:
            found[name] = merged.value - base.value
    return {"metric": scores.metric, "guard": found}


#: A repository, and a branch or a tag of it; None for the default branch.
_Branch = tuple[str, str | None]


def _branch(origin: Origin) -> _Branch | None:
    return followed_branch(origin.name, origin.commit)


def _commits_or_problem(branch: _Branch) -> list[Any] | str:
    try:
        return list_commits(*branch)
    except HubMagmaxError as error:
        return str(_told(error))


def _since(origin: Origin, commits: Mapping[_Branch, list[Any] | str]) -> Origin:
    """Return a checkpoint with what its branch names now."""
    branch = _branch(origin)
    found = commits[branch] if branch is not None else []
    if isinstance(found, str):
        return replace(origin, problem=found)
    if not found:
        return origin
    ids = [str(commit.commit_id) for commit in found]
    behind = ids.index(origin.commit) if origin.commit in ids else None
    first = found[behind - 1 if behind else 0]
    since = first.created_at.isoformat(timespec="seconds") if behind != 0 else ""
    return replace(origin, head=ids[0], num_behind=behind, since=since)
