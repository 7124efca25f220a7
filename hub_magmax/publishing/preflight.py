"""Preflight: checks, before a merge, of whatever could fail late: room, rights, names, limits, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hub_magmax.errors import HubMagmaxError, OutputError, PublishError, SourceError
from hub_magmax.evaluation.data import with_kept_data
from hub_magmax.evaluation.evaluators import evaluator_of
from hub_magmax.evaluation.needs import check_download_room, check_fits, check_inputs, evaluation_needs
from hub_magmax.evaluation.rounding import Rounding
from hub_magmax.evaluation.scoring import load_evaluation_data
from hub_magmax.files import check_folder, existing_parent, from_here, os_errors
from hub_magmax.hub import hub_api, retry
from hub_magmax.kernels.dispatch import choose_backend
from hub_magmax.merging.output.folder import PartialFolder, refuse_taken
from hub_magmax.merging.output.report import MergeReport, ShardRecord, software_versions
from hub_magmax.planning.findings.finding import refuse_faults
from hub_magmax.planning.plan import SMALL_BYTES, Plan
from hub_magmax.planning.selections import written_bytes
from hub_magmax.planning.summary import notices
from hub_magmax.processes import Processes
from hub_magmax.publishing.commits import Destination, Head, find_head, prepare_repository, publish_errors
from hub_magmax.publishing.replacing import replaced_model
from hub_magmax.publishing.scored_push import is_streamed
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.reporting.card import render_card
from hub_magmax.reporting.licence import is_stated
from hub_magmax.text import format_bytes, listed, number_of, step

#: The Hub's own limits.
MAX_FILE_BYTES = 200 * 10**9
MAX_FILES = 100_000

#: Files of weights that a merge straight to the Hub has on the disk.
_FILES_ON_DISK = 2


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: the fact found, or the error."""

    subject: str
    found: str
    error: HubMagmaxError | None = None

    def __str__(self) -> str:
        return f"{self.subject:<12} {f'FAILED: {self.error}' if self.error else self.found}"


@step("checking what a merge would stop at")
def check(plan: Plan, destination: Destination | None, *, num_processes: int = 1) -> Head | None:
    """Raise the first thing that would make carrying out `plan` fail late; return the branch to commit to.

    Creates the repository where it is missing.

    Raises:
        MismatchError: If the checkpoints have faults that are not accepted.
        OutputError: If there is no room for the output.
        RecipeError: If this machine has no such device.
        EvaluationError: If examples of the evaluation cannot be loaded, its evaluator does not fit the
            model, or there is no room for what it downloads.
        PublishError: If this token may not write, there is no such branch, or the Hub would refuse the card.
    """
    _check_sources(plan)
    check_room(plan, destination, num_processes)
    _check_output(plan)
    _check_device(plan)
    if plan.recipe.evaluation is not None:
        check_fits(plan.recipe, plan.lock)
        _check_downloads(plan, destination, num_processes)
    _check_data(plan)
    if destination is None:
        return None
    check_limits(plan)
    head = prepare_repository(destination)
    check_card(plan, destination)
    return head


@dataclass(frozen=True)
class Begun:
    """A plan that passed the checks before a merge.

    Attributes:
        destination: Where its model goes on the Hub.
        head: The branch that a push replaces, as it was then; None without a destination, and in all
            processes but the first.
    """

    plan: Plan
    destination: Destination | None
    head: Head | None


def begin(plan: Plan, destination: Destination | None, processes: Processes) -> Begun:
    """Check what would make carrying out a plan fail late; raises as `check`."""
    head = check(plan, destination, num_processes=processes.count) if processes.is_first else None
    return Begun(plan, destination, head)


#: How a recipe names another repository.
_ELSEWHERE = "--set output.push_to_hub=ORG/MODEL"


def told_of(head: Head | None, destination: Destination, lock: Lock, elsewhere: str = _ELSEWHERE) -> str:
    """Return in a line whether a repository exists, and what a push replaces there.

    Args:
        head: The branch as it is now; None where there is no repository.
        destination: Where to.
        lock: Of the model that is pushed.
        elsewhere: How to name another repository, in words.

    Raises:
        SourceError: If the Hub does not answer.
    """
    if head is None:
        kind = "private" if destination.private else "public"
        return f"{destination.name} is not there, and will be created ({kind})"
    if not head.holds_model:
        return f"{destination.name} holds no model yet"
    there = f"{destination.name} holds a model"
    if not (replaced := replaced_model(head, destination, lock, elsewhere)):
        return f"{there} of the same checkpoints, method and preference: only files that differ are pushed"
    how = "a pull request replaces" if destination.create_pr else "the push replaces"
    return f"{there}: {how} its weights and files of the same names; others stay; {replaced}"


def look_at(destination: Destination, lock: Lock) -> str:
    """Return the same, or why that is not known; whether there is a repository is asked once."""
    api = hub_api()
    try:
        with publish_errors(destination.name):
            exists = api.repo_exists(destination.repo_id)
            return told_of(find_head(destination) if exists else None, destination, lock)
    except (PublishError, SourceError) as error:
        return f"{destination.name}, which was not looked at: {error.what}"


def licence_warning(plan: Plan) -> str:
    """Return a warning about sources that state no licence, unless the recipe states one; empty without."""
    unstated = [name for name, source in plan.lock.sources.items() if not is_stated(source.license)]
    if not unstated or plan.recipe.output.license:
        return ""
    verb = "states" if len(unstated) == 1 else "state"
    return (
        f"{listed(unstated, 5)} {verb} no licence, which gives no permission to publish what is made of it: "
        "ask its owner, or say output.license"
    )


def rehearse(plan: Plan, destination: Destination | None) -> tuple[CheckResult, ...]:
    """Look at everything that `check` looks at, and change nothing anywhere."""
    return tuple(_rehearsed(plan, destination))


# A list of checks, one line each; those that a plan does not need are left out.
def _rehearsed(plan: Plan, destination: Destination | None) -> Iterator[CheckResult]:
    yield _look("checkpoints", lambda: _check_sources(plan))
    yield _look("room", lambda: f"{format_bytes(check_room(plan, destination))} needed, and there")
    if plan.recipe.output.device is not None:
        yield _look("device", lambda: _check_device(plan))
    if not is_streamed(plan.recipe, destination):
        yield _look("output", lambda: _free_output(plan))
    if destination is None:
        yield CheckResult("publishing", "not asked for: the recipe has no output.push_to_hub")
    else:
        yield _look("limits", lambda: check_limits(plan))
        yield _look("repository", lambda: _right_to_write(destination, plan.lock))
        yield _look("card", lambda: check_card(plan, destination))
        if warning := licence_warning(plan):
            yield CheckResult("licence", f"warning: {warning}")
    if plan.recipe.evaluation is not None:
        yield _look("evaluator", lambda: check_fits(plan.recipe, plan.lock))
        yield _look("downloads", lambda: _check_downloads(plan, destination))
        yield _look("data", lambda: _check_data(plan))


def _check_sources(plan: Plan) -> str:
    refuse_faults(plan.findings, plan.in_spite_of)
    return "no fault was found" if not plan.in_spite_of else f"accepted: {', '.join(plan.in_spite_of)}"


def _check_device(plan: Plan) -> str:
    device = plan.recipe.output.device
    if device is not None:
        choose_backend(0, device)
    return f"{device} is there"


def _check_data(plan: Plan) -> str:
    lock = with_kept_data(plan.lock, plan.recipe.output_path)
    examples = load_evaluation_data(plan.recipe, lock)
    if plan.recipe.evaluation is not None:
        Rounding.find(plan.recipe, lock, evaluator_of(plan.recipe.evaluation))
    check_inputs(plan.recipe, plan.lock, examples)
    return f"examples of {', '.join(examples)} are there"


def _check_downloads(plan: Plan, destination: Destination | None, num_processes: int = 1) -> str:
    needs = evaluation_needs(plan.recipe, plan.lock, plan.bytes_out)
    if needs is None:
        return "scores are there"
    room = check_room(plan, destination, num_processes)
    return check_download_room(needs, plan.recipe.output_path, room)


def _look(subject: str, at: Callable[[], str]) -> CheckResult:
    """Return the result of one check, whether it passes or fails."""
    try:
        return CheckResult(subject, at())
    except HubMagmaxError as error:
        return CheckResult(subject, "", error)


def _check_output(plan: Plan) -> None:
    """Raise OutputError where the output folder cannot be made, or what is found out cannot go into it."""
    output = plan.recipe.output_path
    with os_errors(output):
        is_made = output.is_dir() and any(output.iterdir())
    check_folder(existing_parent(output if is_made else output.parent))


def _free_output(plan: Plan) -> str:
    refuse_taken(plan.recipe.output_path)
    _check_output(plan)
    return f"{from_here(plan.recipe.output_path)} is free"


def check_room(plan: Plan, destination: Destination | None = None, num_processes: int = 1) -> int:
    """Return the bytes that the output needs on the disk and does not have yet.

    Raises:
        OutputError: If there are fewer.
    """
    output = PartialFolder(plan.recipe.output_path, plan.digest).output  # which refuses impossible paths
    sizes = sorted((shard.data_bytes for shard in plan.shards), reverse=True)
    streamed = is_streamed(plan.recipe, destination)
    kept = sum(sizes[: _FILES_ON_DISK * num_processes]) if streamed else written_bytes(plan)
    with os_errors(output):
        there = next(folder for folder in output.parents if folder.exists())
        partial = output.with_name(output.name + ".partial")
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(there).free
    needed = 0 if output.exists() else max(0, kept + plan.copied_bytes + SMALL_BYTES - written)
    if needed > free:
        raise OutputError(
            f"{format_bytes(free)} are free, and the merge needs {format_bytes(needed)} more",
            where=str(output),
            hint="Free some space, choose another output.path, or lower output.shard_size."
            if streamed
            else "Free some space or choose another output.path. Straight to the Hub (output.keep: false, "
            "not scored or signed) it needs room for two files of output.shard_size.",
        )
    return needed


def check_room_together(plans: Sequence[Plan]) -> None:
    """Raise OutputError where a disk has not the room for the outputs of several plans, as kept folders."""
    needed: dict[int, int] = {}
    for plan in plans:
        if plan.recipe.output.keep:
            there = existing_parent(plan.recipe.output_path)
            device = there.stat().st_dev
            needed[device] = needed.get(device, 0) + check_room(plan)
            free = shutil.disk_usage(there).free
            if needed[device] > free:
                raise OutputError(
                    f"{format_bytes(free)} are free, and the merges together need more",
                    where=str(plan.recipe.output_path),
                    hint="Free some space, choose other output.paths, or merge some of the sites at a time "
                    "with --site.",
                )


def check_limits(plan: Plan) -> str:
    """Raise PublishError where the Hub would refuse files for their size or number."""
    largest = max(plan.shards, key=lambda shard: shard.data_bytes)
    if largest.data_bytes > MAX_FILE_BYTES:
        raise PublishError(
            f"{largest.file} would have {format_bytes(largest.data_bytes)}",
            where="output.shard_size",
            expected=f"at most {format_bytes(MAX_FILE_BYTES)} in a file on the Hub",
            hint="Lower output.shard_size.",
        )
    if len(plan.shards) >= MAX_FILES:
        raise PublishError(
            f"{len(plan.shards):,} files",
            where="output.shard_size",
            expected=f"fewer than {MAX_FILES:,} on the Hub",
            hint="Raise output.shard_size.",
        )
    return f"{number_of(len(plan.shards), 'file')}, the largest of {format_bytes(largest.data_bytes)}"


def _right_to_write(destination: Destination, lock: Lock) -> str:
    """Return the state of the branch; raise PublishError unless this token could commit to it."""
    api, repo_id = hub_api(), destination.repo_id
    with publish_errors(destination.name):
        if not retry(lambda: api.repo_exists(repo_id)):
            return _right_to_create(destination)
        if not destination.create_pr:
            retry(lambda: api.auth_check(repo_id, write=True))
    head = find_head(destination)
    how = "a pull request can be opened" if destination.create_pr else "this token may write to it"
    return f"{told_of(head, destination, lock)}; the branch is at {head.commit[:7]}, and {how}"


def _right_to_create(destination: Destination) -> str:
    who = retry(hub_api().whoami)
    names = {str(who.get("name"))} | {str(org.get("name")) for org in who.get("orgs") or []}
    namespace, _, name = destination.repo_id.rpartition("/")
    if namespace and namespace not in names:
        own = ", ".join(sorted(names))
        raise PublishError(
            f"there is no such repository, and this token can create one under {own} only",
            where=destination.name,
            hint="Check the name, or create the repository first.",
        )
    if destination.revision is not None:
        raise PublishError(
            "there is no such repository, so no such branch",
            where=destination.name,
            hint="Create both first, or leave out the branch.",
        )
    kind = "private" if destination.private else "public"
    return f"{namespace or who.get('name')}/{name} is not there, and will be created ({kind})"


def check_card(plan: Plan, destination: Destination) -> str:
    """Raise PublishError where the Hub would refuse the card, as it stands before any measurement."""
    from huggingface_hub import ModelCard

    text = render_card(plan.recipe, plan.lock, _draft(plan), None, repo_id=destination.repo_id)
    where = f"{destination.name}, README.md"
    with publish_errors(where):
        try:
            card = ModelCard(text)
            retry(card.validate)
        except ValueError as error:
            raise PublishError(
                f"the Hub would refuse the card: {_reasons(str(error))}",
                where=where,
                hint="Mend output.license or the sources' names in the recipe; --debug shows all of it.",
            ) from error
    return f"licence {card.data.get('license') or 'unknown'}"


def _reasons(answer: str) -> str:
    """Return in words why the Hub refused a card; its answer is a list in JSON."""
    try:
        found = [str(entry["message"]) for entry in json.loads(answer)["errors"]]
    except (ValueError, KeyError, TypeError):
        found = [answer]
    return " ".join("; ".join(found).split())[:300]


def _draft(plan: Plan) -> MergeReport:
    """Return a report as large as the merge's, with placeholders for results."""
    shards = tuple(ShardRecord(shard.file, shard.data_bytes, "0" * 64) for shard in plan.shards)
    return MergeReport(
        plan_digest=plan.digest,
        shards=shards,
        shares={},
        num_unaligned={},
        duality_gap=None,
        elements_merged=sum(job.num_elements for job in plan.jobs if job.merged),
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        parameters=plan.parameters,
        seconds=0.0,
        peak_memory_bytes=0,
        versions=software_versions(),
        notices=notices(plan),
    )
