"""A recipe from file to published model: lock, plan, merge, evaluate, card, push."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hub_magmax.analysis.choosing import choose
from hub_magmax.analysis.study_journal import lock_journal
from hub_magmax.analysis.tuning import scorer_of
from hub_magmax.checkpoints.error_keys import about_sources
from hub_magmax.checkpoints.pinning import lock_source
from hub_magmax.checkpoints.source_cache import SourceCache
from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.data import pin_datasets, pin_local_data, with_pinned_data
from hub_magmax.evaluation.guards import Guard, check_guards, refuse_regression
from hub_magmax.evaluation.needs import evaluation_needs
from hub_magmax.evaluation.scores import SCORES_NAME, Scores, read_scores
from hub_magmax.evaluation.scoring import scores_asked
from hub_magmax.evaluation.statistics_files import locked_statistics
from hub_magmax.fleet.signing import check_key, sign
from hub_magmax.merging.output.evaluation_again import name_evaluation, unsigned
from hub_magmax.merging.output.report import MergeReport, lock_versions
from hub_magmax.methods.data_statistics import OF_THE_MERGE
from hub_magmax.planning.findings.look import with_findings
from hub_magmax.planning.fitting.architectures import check_types
from hub_magmax.planning.headers import check_adapters, plan_from_headers
from hub_magmax.planning.locked_sources import (
    compared_sources,
    locked_tokenizer,
    own_bases,
    pinned_sources,
    with_locked_layers,
    with_locked_token_rows,
)
from hub_magmax.planning.plan import Plan
from hub_magmax.preference import resolve_preference
from hub_magmax.processes import Processes, find_processes
from hub_magmax.publishing.commits import Destination, Head, Published
from hub_magmax.publishing.preflight import Begun, begin, licence_warning, told_of
from hub_magmax.publishing.pushing import push_to
from hub_magmax.publishing.scored_push import is_streamed, pushed_before, remove_folder
from hub_magmax.recipe.arguments import checked, opened
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import Lock, LockLike, ResolvedPreference, as_lock
from hub_magmax.recipe.matching import (
    kept_preference,
    kept_sources,
    locked_method,
    preference_digest,
    rules_of,
    with_method_facts,
)
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.sites import check_site
from hub_magmax.reporting.card_file import CARD_NAME, is_edited, write_card
from hub_magmax.reporting.headline import result
from hub_magmax.text import ProgressBar, Report, step, unseen

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Results of a run; `output` does not exist where the model went straight to the Hub.

    Attributes:
        merged_before: The merge was finished earlier, and its report is of then.
    """

    plan: Plan
    report: MergeReport
    output: Path
    scores: Scores | None = None
    published: Published | None = None
    guards: tuple[Guard, ...] = ()
    merged_before: bool = False


@checked
def run(
    recipe: RecipeLike,
    *,
    locked: LockLike | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
    processes: Processes | None = None,
    push_anyway: bool = False,
    destination: Destination | None = None,
    in_spite_of: Iterable[str] = (),
) -> Run:
    """Carry out a recipe from its sources to the published model.

    Called again after an interruption it goes on where it stopped; what is finished is not
    done again. Under `accelerate launch` all processes merge and score, and the first one does the rest.

    Args:
        recipe: What to do.
        locked: Its lock; made now where it is not given.
        report: Called with a line of text at each step.
        progress: Called with `Plan.progress_bytes`, or with the examples of a model that is scored, and with
            what is done and the unit; opens what is called with the bytes or examples of each step.
        processes: Which of how many processes this is; found from the launcher by default.
        push_anyway: Push also where a guard regressed.
        destination: Where on the Hub the model goes, and how; by default as the recipe says.
        in_spite_of: Names of faults of the checkpoints that are accepted (`Finding.name`).

    Raises:
        MismatchError: If the checkpoints do not fit each other, or have faults that are not accepted.
        RegressedError: If a guard regressed, after everything was written, in place of pushing.
        LockError: If local data of the evaluation is no longer what was locked; for a finished merge, what
            its own lock says.
    """
    from hub_magmax.merging.execution import plan_unfinished  # loads torch

    recipe = as_recipe(recipe)
    processes, cache = processes or find_processes(report), SourceCache()
    destination = destination or destination_of(recipe)
    locked = as_lock(locked) or processes.first_decides(
        lambda: lock(recipe, report=report, progress=progress, cache=cache)
    )
    planned, is_old = plan_unfinished(recipe, locked, cache, processes, in_spite_of)
    begun = begin(planned, destination, processes)
    done = carry_out(begun, report, progress, processes, cache, push_anyway=push_anyway)
    return replace(done, merged_before=is_old or done.merged_before)


def carry_out(
    begun: Begun,
    report: Report,
    progress: ProgressBar,
    processes: Processes,
    cache: SourceCache,
    *,
    push_anyway: bool,
    merged: MergeReport | None = None,
) -> Run:
    """Carry out a plan, from the merge, unless its report is given, to the published model; see `run`."""
    from hub_magmax.merging.output.opening import report_opening  # loads torch

    planned, destination, head = begun.plan, begun.destination, begun.head
    _announce(planned, destination, head, report)
    if (gone := _without_folder(planned, destination, head, progress, processes, cache)) is not None:
        return gone
    output = planned.recipe.output_path
    merged = merged or _merge(planned, progress, processes, cache)
    merged = report_opening(planned, merged, processes, cache)
    scores = scores_asked(planned.recipe, planned.lock, report, processes, progress)
    if not processes.is_first:
        return Run(planned, merged, output, scores)
    _write_card(planned, merged, scores, report)
    guards = check_guards(planned.recipe.evaluation, scores)
    done = Run(planned, merged, output, scores, guards=guards)
    published = destination and _published(done, destination, head, report, push_anyway=push_anyway)
    return published or done


def _announce(planned: Plan, destination: Destination | None, head: Head | None, report: Report) -> None:
    """Say what scoring will download and what a push replaces, before anything starts."""
    if destination is not None and head is not None:
        report(told_of(head, destination, planned.lock))
        if warning := licence_warning(planned):
            LOG.warning("%s", warning)
    needs = evaluation_needs(planned.recipe, planned.lock, planned.bytes_out)
    if needs is not None and needs.download_bytes:
        report(f"for the scores: {needs}")


def _without_folder(
    planned: Plan,
    destination: Destination | None,
    head: Head | None,
    progress: ProgressBar,
    processes: Processes,
    cache: SourceCache,
) -> Run | None:
    """Merge straight to the Hub; or find that the model is there; None where a folder has to be made."""
    output = planned.recipe.output_path
    if destination is None or planned.recipe.output.keep:
        return None
    if not is_streamed(planned.recipe, destination):
        before = processes.first_decides(partial(pushed_before, planned, destination))
        if before is None:
            return None
        report, commit, scores = before
        return Run(planned, report, output, scores, commit, merged_before=True)
    from hub_magmax.publishing.streaming_push import merge_to_hub  # loads torch

    with opened(progress, planned.progress_bytes, "merging", "bytes") as advance:
        merged, published = merge_to_hub(planned, destination, head, advance, processes, cache)
    is_old = published is not None and not published.is_new
    return Run(planned, merged, output, published=published, merged_before=is_old)


def _merge(planned: Plan, progress: ProgressBar, processes: Processes, cache: SourceCache) -> MergeReport:
    """Merge into the recipe's folder, unless that is done, and return the report."""
    from hub_magmax.merging.execution import merge  # loads torch

    with opened(progress, planned.progress_bytes, "merging", "bytes") as advance:
        return merge(planned, progress=advance, processes=processes, cache=cache)


def _write_card(planned: Plan, merged: MergeReport, scores: Scores | None, report: Report) -> None:
    """Write the card, unless somebody edited it; warn of a model that is below its base model.

    The folder of a merge that was finished earlier gets the recipe's evaluation, if it has another one. A
    recipe without evaluation leaves the scores there on the card.
    """
    if scores is not None and (below := result(scores, planned.lock)[0]):
        LOG.warning("%s", below)
    output = planned.recipe.output_path
    if scores is not None and name_evaluation(planned.recipe, planned.lock):
        report(f"the model's own recipe and lock name this evaluation now{unsigned(output)}")
    if scores is None and (output / SCORES_NAME).is_file():
        scores = read_scores(output)
    if is_edited(output / CARD_NAME):
        report(f"{CARD_NAME} was edited, so it stays as it is: `hub-magmax card` writes it anew")
    write_card(planned.recipe, planned.lock, merged, scores, output, keep_edited=True)


def _published(
    done: Run, destination: Destination, head: Head | None, report: Report, *, push_anyway: bool
) -> Run:
    """Push the model, signed where that is asked for, unless a guard regressed."""
    if not push_anyway:
        refuse_regression(done.guards, done.plan.recipe)
    if destination.private_key is not None:
        sign(done.output, destination.private_key)
    with step(f"pushing to {destination.name}", report):
        published = push_to(destination, done.output, head)
    if not done.plan.recipe.output.keep:
        remove_folder(done.output)
    return replace(done, published=published)


def destination_of(recipe: Recipe, changes: Mapping[str, Any] = MappingProxyType({})) -> Destination | None:
    """Return where the recipe publishes, None where it does not.

    Args:
        recipe: Its `output` names the repository.
        changes: Other attributes of the destination.

    Raises:
        RecipeError: If there are changes, and the recipe names no repository.
        SignatureError: If there is a private key that cannot sign.
    """
    if recipe.output.push_to_hub is None:
        if changes:
            raise RecipeError(
                f"{', '.join(changes)}: the recipe does not say where to publish",
                key=("output", "push_to_hub"),
                expected="a repository on the Hub",
            )
        return None
    found = Destination(**{"repo_id": recipe.output.push_to_hub, "private": recipe.output.private, **changes})
    if found.private_key is not None:
        check_key(found.private_key)
    return found


@checked
def lock(
    recipe: RecipeLike,
    *,
    hash_files: bool = False,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
    cache: SourceCache | None = None,
    earlier: LockLike | None = None,
    journal: Path | None = None,
) -> Lock:
    """Return what `recipe` stands for now: commits, hashes, weights, method.

    Reads headers alone, unless a preference is estimated, held-out examples check it, or `auto` leaves
    a choice to a comparison; models are then run, and merged in memory. Statistics of the tasks' data that a
    method or a correction needs and that are missing are made by runs of the tasks' checkpoints, and written
    where the recipe names them.

    Args:
        recipe: What to pin.
        hash_files: Read the weight files of folders whole, and lock their sha256 too.
        report: Called with a line of text at each long step.
        progress: Called with the number of models that are tried, what is done and the unit; opens what is
            called for each.
        cache: Checkpoints that stay open for later calls.
        earlier: A lock whose checkpoints and data sets stay as it pins them, where the recipe still has them.
        journal: File that keeps the scores of models that are tried until it is decided, so that an
            interrupted call goes on.

    Raises:
        SourceError: If a checkpoint cannot be reached.
        CheckpointError: If a checkpoint is malformed.
        RecipeError, EvaluationError: If preference or method cannot be formed.
    """
    recipe, cache, earlier = as_recipe(recipe), cache or SourceCache(), as_lock(earlier)
    check_site(recipe.sites, None)
    make = partial(lock_source, recipe, hash_files=hash_files, cache=cache)
    with step(f"pinning the base model and {len(recipe.tasks)} tasks"):
        sources = pinned_sources(recipe, make, kept_sources(earlier) if earlier else {})
    with about_sources(recipe, sources):
        check_adapters(recipe, sources)
        check_types(sources)
    sources = compared_sources(recipe, sources, cache)
    tasks = {task.name: sources[task.name] for task in recipe.tasks}
    uniform = ResolvedPreference(dict.fromkeys(tasks, 1 / max(len(tasks), 1)), "uniform")
    found = Lock(
        base_model=sources["base_model"],
        tasks=tasks,
        method=locked_method(recipe.method, recipe.preference),
        preference=uniform,
        tensors=rules_of(recipe),
        seed=recipe.seed,
        datasets=pin_datasets(recipe, earlier.datasets if earlier else {}),
        local_data=pin_local_data(recipe),
        adapters=recipe.adapters or "each",
        token_rows=recipe.token_rows or (),
        tokenizer=locked_tokenizer(recipe),
        bases=own_bases(recipe, sources),
        versions=lock_versions(),
    )
    found = with_locked_token_rows(recipe, with_locked_layers(recipe, found, cache), cache)
    statistics = locked_statistics(recipe, found, report, hash_files=hash_files, cache=cache)
    found = replace(found, statistics=statistics)
    found = _with_lengths(recipe, found, cache, report)
    with lock_journal(journal, recipe, found, report) as kept:
        if earlier and kept_preference(recipe, earlier, found):
            preference = earlier.preference
        else:
            asked = with_pinned_data(recipe, found.datasets)
            scorer = scorer_of(recipe, found, kept, progress, report)
            preference = resolve_preference(asked, sources=sources, scorer=scorer)
        found = replace(found, preference=replace(preference, spec_digest=preference_digest(recipe)))
        of_merge = locked_statistics(
            recipe, found, report, hash_files=hash_files, cache=cache, kinds=[OF_THE_MERGE]
        )
        found = replace(found, statistics={**found.statistics, **of_merge})
        if not recipe.method.is_auto:
            found = with_method_facts(recipe, found)
            return _with_correction(recipe, found, cache, report, hash_files=hash_files)
        choice = choose(recipe, found, report, progress, kept)
        return with_method_facts(recipe, replace(found, method=choice.method, chosen=choice.seen))


def _with_lengths(recipe: Recipe, found: Lock, cache: SourceCache, report: Report) -> Lock:
    """Return a lock with the lengths of the task vectors, where the recipe's `norms` needs them."""
    if recipe.norms is None:
        return found
    from hub_magmax.merging.lengths import locked_lengths  # loads torch

    with step("reading the checkpoints for the lengths of their task vectors", report):
        return replace(found, lengths=locked_lengths(recipe, found, cache))


def _with_correction(
    recipe: Recipe, found: Lock, cache: SourceCache, report: Report, *, hash_files: bool
) -> Lock:
    """Return a lock with the statistics of the recipe's correction, which are made by runs of its merge."""
    if recipe.correction is None:
        return found
    from hub_magmax.merging.locked_corrections import locked_correction  # loads torch

    return locked_correction(recipe, found, cache, report, hash_files=hash_files)


@checked
def plan(
    recipe: RecipeLike,
    locked: LockLike | None = None,
    *,
    cache: SourceCache | None = None,
    in_spite_of: Iterable[str] = (),
) -> Plan:
    """Return everything that merging `recipe` will do, from headers and from samples of values.

    Its findings say what is odd about the checkpoints. With faults among them that are not accepted it is
    made, and not carried out.

    Args:
        recipe: What to merge.
        locked: Its lock; made now where it is not given.
        cache: Checkpoints that are open already, and stay open for later calls.
        in_spite_of: Names of faults that are accepted (`Finding.name`).

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        RecipeError: If an adapter is asked for, and the tasks cannot become one.
        LockError: If a source is no longer what was locked.
    """
    recipe, cache = as_recipe(recipe), cache or SourceCache()
    locked = as_lock(locked) or lock(recipe, cache=cache)
    made = plan_from_headers(recipe, locked, cache=cache)
    return with_findings(made, cache, in_spite_of)
