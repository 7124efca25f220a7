"""Verbs of the main story: lock, plan, merge, run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import (
    DestinationOptions,
    RecipeOptions,
    changed_recipe,
    destination_options,
    device_option,
    faults_option,
    from_cache_option,
    memory_option,
    recipe_options,
)
from hub_magmax.cli.terminal import ERROR, REGRESSED, Answer, progress, say, verb

if TYPE_CHECKING:
    from hub_magmax.evaluation.scores import Scores
    from hub_magmax.merging.output.report import MergeReport
    from hub_magmax.pipeline import Run
    from hub_magmax.planning.plan import Plan
    from hub_magmax.processes import Processes
    from hub_magmax.publishing.commits import Destination
    from hub_magmax.recipe.lockfile import Lock
    from hub_magmax.recipe.schema import Recipe


@verb
@changed_recipe
@from_cache_option
@click.option("--out", type=FilePath(), help="Where to write the lock.")
@click.option("--hash", "hash_files", is_flag=True, help="Read local checkpoints whole, and pin every byte.")
@click.option("--keep", is_flag=True, help="Keep the checkpoints that the present lock pins.")
def lock(asked: RecipeOptions, out: Path | None, hash_files: bool, keep: bool) -> Answer:
    """Pin RECIPE: commits, hashes, and the preference as numbers.

    \b
    Example:
      hub-magmax lock recipe.yaml
    """
    from hub_magmax.cli.recipe_and_lock import (
        check_lock_path,
        earlier_lock,
        lock_beside,
        lock_journal,
        read_recipe,
        renewed,
        write_lock,
    )
    from hub_magmax.errors import RecipeError
    from hub_magmax.pipeline import lock as make_lock
    from hub_magmax.recipe.matching import pinned_by_headers
    from hub_magmax.text import listed

    if keep and hash_files:
        raise RecipeError("--hash reads the checkpoints anew, and --keep does not", where="lock")
    target = out or lock_beside(asked)
    if target is None:
        raise RecipeError(
            "a recipe from a stream has no place beside it for its lock",
            where=asked.text.name,
            hint="Say where to write it: give --out FILE.",
        )
    check_lock_path(target)
    found, earlier = read_recipe(asked), earlier_lock(asked) if keep else None
    journal = lock_journal(asked, found)
    if earlier:
        locked = renewed(found, earlier, journal)
    else:
        locked = make_lock(found, hash_files=hash_files, report=say, progress=progress, journal=journal)
    path = write_lock(locked, target)
    lines = [f"{name}: {source.label}" for name, source in locked.every_source.items()]
    if unsure := pinned_by_headers(locked.every_file.values()):
        lines.append(f"pinned by header alone, not by values (--hash does that): {listed(unsure, 5)}")
    return Answer(json.loads(locked.to_json()), "\n".join([*lines, f"wrote {path}"]))


@verb
@recipe_options
@memory_option
@device_option
@faults_option
def plan(asked: RecipeOptions, in_spite_of: tuple[str, ...]) -> Answer:
    """Show what merging RECIPE will read, write and need.

    Reads headers and samples of values. Exits with 1 if a merge would be refused, for a FAULT that is not
    accepted, or if examples in local files could not be scored.

    \b
    Example:
      hub-magmax plan recipe.yaml
    """
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.cli.recipe_and_lock import read_locked
    from hub_magmax.cli.sites import plan_all, sites_of
    from hub_magmax.pipeline import destination_of
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.planning.findings.finding import faults_left
    from hub_magmax.planning.summary import lacks_columns
    from hub_magmax.publishing.preflight import licence_warning, look_at

    if sites := sites_of(asked):
        return plan_all(sites, in_spite_of)
    cache = SourceCache()
    found, locked = read_locked(asked, cache=cache)
    planned = make_plan(found, locked, cache=cache, in_spite_of=in_spite_of)
    refused = faults_left(planned.findings, planned.in_spite_of)
    values, text = _described(planned)
    if (destination := destination_of(found)) is not None:
        there, warning = look_at(destination, locked), licence_warning(planned)
        values["publishing"] = {"to": there, "warning": warning or None}
        text += f"\n{'publishes':<12} {there}" + (f"\n{'warning':<12} {warning}" if warning else "")
    return Answer(values, text, exit_code=ERROR if refused or lacks_columns(values) else 0)


def _described(planned: Plan) -> tuple[dict[str, Any], str]:
    """Return a plan with the studies of its recipe, for programs and for people."""
    from hub_magmax.planning.summary import describe, explain

    values, text = describe(planned), explain(planned)
    if planned.recipe.compare is not None or planned.recipe.sweep is not None:
        from hub_magmax.analysis.planned_studies import planned_studies, study_rows

        values["studies"] = {key: asdict(found) for key, found in planned_studies(planned).items()}
        text = "\n".join([text, *(f"{label:<12} {told}" for label, told in study_rows(planned))])
    return values, text


@verb
@recipe_options
@memory_option
@device_option
@faults_option
def merge(asked: RecipeOptions, in_spite_of: tuple[str, ...]) -> Answer:
    """Merge RECIPE into its output folder, and do no more.

    \b
    Example:
      hub-magmax merge recipe.yaml --memory 2GB
    """
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.cli.recipe_and_lock import read_locked
    from hub_magmax.merging.execution import merge as do_merge
    from hub_magmax.merging.execution import plan_unfinished
    from hub_magmax.processes import find_processes
    from hub_magmax.publishing.preflight import check_room

    processes, cache = find_processes(say), SourceCache()
    found, locked = read_locked(asked, processes.first_decides, cache)
    planned, is_old = plan_unfinished(found, locked, cache, processes, in_spite_of)
    check_room(planned)
    with progress(planned.progress_bytes, "merging") as advance:
        report = do_merge(planned, progress=advance, processes=processes, cache=cache)
    text = _summary(found, report, is_old=is_old)
    return Answer(json.loads(report.to_json()), text if processes.is_first else "")


def _summary(recipe: Recipe, report: MergeReport, *, is_old: bool) -> str:
    """Return what a merge did, in words; of one that was finished earlier, what is there."""
    from hub_magmax.files import from_here
    from hub_magmax.text import format_bytes, number_of

    keep, output = recipe.output_path.is_dir(), from_here(recipe.output_path)
    size = f"{format_bytes(report.bytes_out)} in {number_of(len(report.shards), 'file')}"
    if is_old:
        lines = [size, f"already there: {output}" if keep else "published already"]
    else:
        peak, mapped = map(format_bytes, (report.peak_memory_bytes, report.peak_resident_bytes))
        spent = sorted(report.profile.items(), key=lambda item: -item[1])
        lines = [
            f"{size}, {report.seconds:.1f} s, peak memory {peak} ({mapped} with mapped files)",
            "threads    " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in spent),
            f"wrote {output}" if keep else "no folder was kept",
        ]
    if report.lost:
        told = f"{report.relative_loss:.2%} of the merged task vectors" if report.relative_loss else "nothing"
        lines.append(
            f"lost       {told}, by the rank of {number_of(len(report.lost), 'layer')} (relative Frobenius "
            "norm)"
        )
    if report.opened:
        lines.append("opened     " + ": ".join(filter(None, report.opened.values())))
    lines += [f"note: {notice}" for notice in report.notices]
    return "\n".join([*_elements(report), *lines])


def _elements(report: MergeReport) -> list[str]:
    """Return a line with each task's share of the elements, where the method takes each from one task."""
    if not report.shares:
        return []
    shares = {**report.shares, **({"(unchanged by all)": report.unchanged} if report.unchanged else {})}
    return ["elements   " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())]


@verb
@recipe_options
@click.option("--push-anyway", is_flag=True, help="Push also if the model regressed on a guard.")
@click.option("--dry-run", is_flag=True, help="Show the plan, check everything, change nothing.")
@memory_option
@device_option
@faults_option
@destination_options
def run(
    asked: RecipeOptions,
    to: DestinationOptions,
    push_anyway: bool,
    dry_run: bool,
    in_spite_of: tuple[str, ...],
) -> Answer:
    """Do all that RECIPE asks for, from its lock to the push.

    Exits with 3 if the model regressed on a guard.

    \b
    Examples:
      hub-magmax run recipe.yaml --dry-run
      hub-magmax run recipe.yaml
    """
    from hub_magmax.cli.recipe_and_lock import read_asked, say_outdated
    from hub_magmax.cli.sites import run_all, sites_of
    from hub_magmax.pipeline import destination_of
    from hub_magmax.pipeline import run as do_run
    from hub_magmax.processes import find_processes

    if sites := sites_of(asked):
        return run_all(sites, to, in_spite_of, push_anyway=push_anyway, dry_run=dry_run)
    processes = find_processes(say)
    found, locked = read_asked(asked, processes.first_decides)
    locked = locked or _measured_lock(asked, found, processes)
    destination = destination_of(found, to.given())
    if dry_run:
        return _dry_run(found, locked, destination, in_spite_of)
    done = do_run(
        found,
        locked=locked,
        report=say,
        progress=progress,
        processes=processes,
        push_anyway=push_anyway,
        destination=destination,
        in_spite_of=in_spite_of,
    )
    if not processes.is_first:
        return Answer({}, "")
    if done.scores is not None:
        say_outdated(asked)
    branch = destination.revision if destination else None
    return answer_of_run(done, branch, push_anyway=push_anyway)


def answer_of_run(done: Run, branch: str | None = None, *, push_anyway: bool = False) -> Answer:
    """Return what a run did, in values and words; the exit code tells of guards that regressed.

    Args:
        done: The run.
        branch: That it was pushed to; the default one if None.
        push_anyway: Whether regressed guards were no matter.
    """
    from hub_magmax.files import from_here
    from hub_magmax.reporting.headline import assessment_of

    recipe = done.plan.recipe
    values = {"output": from_here(recipe.output_path), "report": json.loads(done.report.to_json())}
    text = _summary(recipe, done.report, is_old=done.merged_before)
    if done.scores is not None:
        values["scores"] = json.loads(done.scores.to_json())
        values["assessment"] = assessment_of(done.scores, done.plan.lock)
        text = f"{_measured(done, done.scores)}\n{text}"
    if done.published is not None:
        from hub_magmax.publishing.addresses import pushed, pushed_values

        values["published"] = pushed_values(done.published, branch)
        text += f"\n{pushed(done.published, branch)}"
    has_regressed = any(guard.verdict == "regressed" for guard in done.guards) and not push_anyway
    return Answer(values, text, exit_code=REGRESSED if has_regressed else 0)


def _measured_lock(asked: RecipeOptions, recipe: Recipe, processes: Processes) -> Lock | None:
    """Return the lock of a recipe for which models are scored, with a journal; None where there are none."""
    from hub_magmax.cli.recipe_and_lock import lock_journal
    from hub_magmax.pipeline import lock

    if not recipe.is_measured:
        return None
    journal = lock_journal(asked, recipe)
    return processes.first_decides(lambda: lock(recipe, report=say, progress=progress, journal=journal))


def _measured(done: Run, scores: Scores) -> str:
    """Return the scores, how the model does by them, and the verdict of each guard."""
    from hub_magmax.reporting.headline import result

    guards = "".join(f"guard {guard.name}: {guard.verdict}\n" for guard in done.guards)
    told = " ".join(filter(None, result(scores, done.plan.lock)))
    return f"{scores.table()}\n\n{told}\n{guards}"


def _dry_run(
    recipe: Recipe, locked: Lock | None, destination: Destination | None, in_spite_of: tuple[str, ...]
) -> Answer:
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.pipeline import lock
    from hub_magmax.pipeline import plan as make_plan
    from hub_magmax.publishing.preflight import rehearse

    cache = SourceCache()
    locked = locked or lock(recipe, report=say, progress=progress, cache=cache)
    planned = make_plan(recipe, locked, cache=cache, in_spite_of=in_spite_of)
    findings = rehearse(planned, destination)
    values, text = _described(planned)
    values |= {
        "checks": [
            {"subject": f.subject, "found": f.found, "error": str(f.error) if f.error else None}
            for f in findings
        ]
    }
    num_failed = sum(finding.error is not None for finding in findings)
    verdict = f"{num_failed} of {len(findings)} checks failed" if num_failed else "all checks passed"
    text = "\n".join([text, *map(str, findings), verdict])
    return Answer(values, text, exit_code=ERROR if num_failed else 0)
