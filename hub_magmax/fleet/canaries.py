"""Canaries: a published model scored again, and compared with pinned results example by example.

For a scheduled job: does the model, on today's machine and software, still answer as it did when its scores
were stored, or as an earlier revision did?
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.locations import ModelPlace, repository_of
from hub_magmax.checkpoints.missing_folders import taken_for_repository
from hub_magmax.checkpoints.opening import open_model
from hub_magmax.checkpoints.storage.hub import resolve_commit
from hub_magmax.errors import EvaluationError, PublishError, SourceError
from hub_magmax.evaluation.intervals import Difference, paired_difference
from hub_magmax.evaluation.scores import MERGED, SCORES_NAME, Score, Scores, stored_scores
from hub_magmax.evaluation.scoring import Prepared, prepare, score
from hub_magmax.evaluation.tables import Measured, Shown, Table, Tabular
from hub_magmax.fleet import MARGIN
from hub_magmax.fleet.references import reference
from hub_magmax.fleet.tags import LAST_GOOD, move_tag, tagged_commit
from hub_magmax.fleet.verifying import recipe_and_lock
from hub_magmax.hub import is_offline
from hub_magmax.recipe.arguments import checked
from hub_magmax.text import ProgressBar, Report, unseen


@dataclass(frozen=True)
class TaskChange:
    """Change of one task's score.

    Attributes:
        before, now: Mean score as pinned, and measured again.
        difference: Of the two, example by example.
        regressed: The mean fell by more than the margin.
    """

    task: str
    before: float
    now: float
    difference: Difference
    regressed: bool


@dataclass(frozen=True, repr=False)
class Canary(Tabular):
    """Scores of a model now, compared with pinned results.

    Attributes:
        model, against: What was scored, and whose results are the pinned ones.
        metric: What scores are called.
        margin: How much worse a task may get.
        tasks: Each task of the pinned results.
        data: By task, the data set, its commit and the fingerprint of its examples.
        advice: How to compare with other results; told where a task regressed.
        commit: Of what was scored; empty for a folder.
        tag: The commit that the repository's tag `last-good` names now; empty where this run did not ask,
            or where there is none.
    """

    model: str
    against: str
    metric: str
    margin: float
    tasks: tuple[TaskChange, ...]
    data: Mapping[str, Mapping[str, Any]] = field(hash=False)
    advice: str = ""
    commit: str = ""
    tag: str = ""

    @property
    def regressed(self) -> tuple[str, ...]:
        """The tasks that got worse by more than the margin."""
        return tuple(change.task for change in self.tasks if change.regressed)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "regressed": list(self.regressed)}

    def as_table(self) -> Table:
        """Return a row for each task."""
        rows = tuple(
            (
                change.task,
                change.before,
                change.now,
                Measured(change.difference.mean, change.difference.low, change.difference.high),
                change.difference.gained,
                change.difference.lost,
                Shown(change.difference.p_value, f"{change.difference.p_value:.2g}"),
                "regressed" if change.regressed else "",
            )
            for change in self.tasks
        )
        worse = ", ".join(self.regressed)
        verdict = f"{worse} got worse by more than" if worse else "no task got worse by more than"
        note = f"{self.model} against {self.against}: {verdict} {self.margin:g} ({self.metric})"
        notes = (note, *([self.advice] if worse else []))
        return Table(("task", "pinned", "now", "change", "gained", "lost", "p", "verdict"), rows, notes)


@checked
def canary(
    model: str,
    *,
    revision: str | None = None,
    against: str | None = None,
    margin: float = MARGIN,
    folder: Path | None = None,
    dry_run: bool = False,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> Canary:
    """Run the evaluation stored with `model` again, on its pinned data, and compare with pinned results.

    A task has regressed if its mean is below the pinned one by more than `margin`. Both saw the same
    examples, so about these there is no uncertainty; the interval and the p-value say how far the
    difference would hold on others, and do not decide.

    By default a repository is compared with its last good revision, the newest one whose canary passed: the
    tag `last-good` names it, and until there is one the stored scores tell it (`history.last_good`). The tag
    moves to the head of the default branch when that passes, compared with the last good revision or with
    its own scores; where this token may not write, that is reported.

    Args:
        model: A merged folder, or a repository id, also with `@` and a revision.
        revision: Of the repository; the default branch if None.
        against: Whose stored scores are the pinned ones: `last-good`, `previous` (the newest earlier
            model) or a revision of the repository, or for a folder another folder. By default those of the
            last good revision, for a folder its own.
        margin: How much worse a task may get, in units of the metric.
        folder: Where the relative paths of local data start; the current folder if None.
        dry_run: Leave the tag where it is.
        report: Called with a line of text at each step.
        progress: As for `evaluate`.

    Raises:
        EvaluationError: If there are no stored scores, or those are of another evaluation or other data.
        LockError: If local data is not what the model's lock says.
    """
    repo_id, commit, place, pinned_commit = model, None, against or model, None
    if not Path(model).is_dir():
        repo_id, revision = repository_of(model, revision)
        with taken_for_repository(model, Path()):
            commit = resolve_commit(repo_id, revision)
        place, pinned_commit = repo_id, reference(repo_id, commit, against, margin, report)
    with closing(open_model(place, pinned_commit)) as stored:
        pinned, pinned_label = stored_scores(stored), stored.label
    with closing(open_model(repo_id, commit)) as stored:
        recipe, lock = recipe_and_lock(stored, folder or Path())
        label = stored.label
    prepared = prepare(recipe, lock, repo_id, {MERGED: ModelPlace(repo_id, commit)})
    _check_comparable(pinned, prepared, pinned_label)
    measured = score(prepared, report=report, progress=progress)
    _check_counts(pinned, measured, pinned_label)
    changes = tuple(_change(task, pinned, measured, margin) for task in pinned.data)
    advice = _advice(repo_id, commit, pinned_label)
    found = Canary(label, pinned_label, measured.metric, margin, changes, measured.data, advice, commit or "")
    is_judged = against in (None, LAST_GOOD) or pinned_commit == commit
    return _tagged(found, repo_id, revision, report) if is_judged and not dry_run else found


def _tagged(found: Canary, repo_id: str, revision: str | None, report: Report) -> Canary:
    """Move the tag to what passed, if it is the default branch's head; add what the tag names then."""
    if not found.commit or found.regressed or is_offline():
        return found
    commit, before = found.commit, None
    try:
        before = tagged_commit(repo_id)
        if commit == before or (revision is not None and commit != resolve_commit(repo_id, None)):
            return replace(found, tag=before or "")
        move_tag(repo_id, commit, before)
    except (SourceError, PublishError) as error:
        report(f"the tag {LAST_GOOD} does not name {commit[:12]}, which passed: {error.what}")
        return replace(found, tag=before or "")
    report(f"the tag {LAST_GOOD} names {commit[:12]} now")
    return replace(found, tag=commit)


def _advice(model: str, commit: str | None, pinned: str) -> str:
    """Say what the pinned results are, and how to compare with others."""
    if commit is None:
        command = f"hub-magmax canary {shlex.quote(model)} --against FOLDER"
        how = f"--against FOLDER takes those of another merged folder: {command}"
    else:
        how = (
            f"--against REVISION takes those of another one: hub-magmax canary {model} --against REVISION "
            f"(hub-magmax history {model} lists them)"
        )
    return f"pinned are the scores that are stored with {pinned}; {how}"


def _check_comparable(pinned: Scores, prepared: Prepared, label: str) -> None:
    """Raise EvaluationError unless both are of one metric, the same tasks and the same examples."""
    now = prepared.described
    facts = {
        "the metric": (pinned.metric, prepared.evaluator.metric),
        "the tasks": (list(pinned.data), list(now)),
        **{
            f"the examples of {task}": (data.get("fingerprint"), now[task].get("fingerprint"))
            for task, data in pinned.data.items()
            if task in now
        },
    }
    if differ := [name for name, (before, after) in facts.items() if before != after]:
        raise _other_evaluation(differ, label)


def _check_counts(pinned: Scores, measured: Scores, label: str) -> None:
    """Raise EvaluationError where the number of examples differs, as only a run tells of some evaluators."""
    counts = {task: [_score(s, task).num_examples for s in (pinned, measured)] for task in pinned.data}
    if differ := [f"the examples of {task}" for task, (before, now) in counts.items() if before != now]:
        raise _other_evaluation(differ, label)


def _other_evaluation(differ: Sequence[str], label: str) -> EvaluationError:
    return EvaluationError(
        f"the pinned results are of another evaluation: {', '.join(differ)} differ",
        where=label,
        expected="scores of the same metric on the same examples",
        hint="Name a revision that was evaluated alike, or pin the data set to a commit in the recipe.",
    )


def _change(task: str, pinned: Scores, measured: Scores, margin: float) -> TaskChange:
    before, now = _score(pinned, task), _score(measured, task)
    difference = paired_difference(now.outcomes, before.outcomes)
    # Not a rounding error of the mean: one lost answer in a hundred is within a margin of a hundredth.
    regressed = difference.mean < -margin - 1e-12
    return TaskChange(task, before.value, now.value, difference, regressed)


def _score(scores: Scores, task: str) -> Score:
    found = scores.get(MERGED, task)
    if found is None:
        raise EvaluationError(f"the merged model was not scored on {task}", where=SCORES_NAME)
    return found
