"""The whole recipe: lock, plan, merge, evaluate, card, push."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hub_magmax import locking
from hub_magmax.analysis.tuning import MemoryTuner
from hub_magmax.checkpoints.source_cache import HubSources
from hub_magmax.errors import (
    CheckpointError,
    EvaluationError,
    LockError,
    MismatchError,
    PublishError,
    RecipeError,
)
from hub_magmax.evaluation.guards import Guard, check_guards, regressed
from hub_magmax.evaluation.scores import Scores, read_scores
from hub_magmax.evaluation.scoring import evaluate, load_evaluation_data
from hub_magmax.locking import plan
from hub_magmax.merging.output.folder import PartialFolder
from hub_magmax.merging.output.report import MergeReport
from hub_magmax.planning.plan import Plan
from hub_magmax.processes import Processes, find_processes
from hub_magmax.publishing import preflight
from hub_magmax.publishing.commits import Destination, Published
from hub_magmax.publishing.preflight import Finding, check
from hub_magmax.publishing.pushing import push_to
from hub_magmax.recipe.lockfile import LOCK_NAME, Lock, LockedSource, read_lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.card import write_card

ProgressBar = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]


@dataclass(frozen=True)
class Run:
    """What running a recipe left behind; `output` is not there where the model went straight to the Hub."""

    plan: Plan
    report: MergeReport
    output: Path
    scores: Scores | None = None
    published: Published | None = None
    guards: tuple[Guard, ...] = ()


def run(
    recipe: Recipe,
    *,
    locked: Lock | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: ProgressBar = lambda total: nullcontext(),
    processes: Processes | None = None,
    push_anyway: bool = False,
    destination: Destination | None = None,
) -> Run:
    """Carry out a recipe from its sources to the published model.

    Called again after an interruption it goes on where it stopped; what is finished is not
    done again. Under `accelerate launch` all processes merge and score, and the first one does the rest.

    Args:
        recipe: What to do.
        locked: Its lock; made now where it is not given.
        report: Called with a line of text at each step.
        progress: Called with `Plan.progress_bytes`; opens what is called with the bytes of each chunk.
        processes: Which of how many processes this is; found from the launcher by default.
        push_anyway: Push also where a guard regressed.
        destination: Where on the Hub the model goes, and how; by default as the recipe says.

    Raises:
        PublishError: If a guard regressed, after everything was written, in place of pushing.
        LockError: If local data of the evaluation is no longer what was locked; for a finished merge, what
            its own lock says.
    """
    processes, hub = processes or find_processes(), HubSources()
    destination = destination or destination_of(recipe)
    locked = locked or processes.first_decides(lambda: lock(recipe, report=report, hub=hub))
    planned = plan(recipe, locked, hub=hub)
    head = None
    if processes.is_first:
        head = check(planned, destination, num_processes=processes.count)
        load_evaluation_data(recipe, _with_kept_data(locked, recipe.output_path))
    if destination is not None and not recipe.output.keep:
        from hub_magmax.publishing.streaming_push import relay  # loads torch

        report(f"merging {len(planned.jobs)} tensors, straight to {destination.name}")
        with progress(planned.progress_bytes) as advance:
            merged, published = relay(planned, destination, head, write_card, advance, processes, hub)
        return Run(planned, merged, recipe.output_path, published=published)
    output = recipe.output_path
    from hub_magmax.merging.execution import finished, merge  # loads torch

    if finished(PartialFolder(output, planned.digest)) is None:
        report(f"merging {len(planned.jobs)} tensors into {recipe.output.path}")
    with progress(planned.progress_bytes) as advance:
        merged = merge(planned, output, progress=advance, processes=processes, hub=hub)
    scores = _scores(recipe, locked, output, report, processes) if recipe.evaluation else None
    if not processes.is_first:
        return Run(planned, merged, output, scores)
    write_card(recipe, locked, merged, scores, output)
    published = None
    guards = check_guards(recipe.evaluation, scores)
    if destination is not None:
        if not push_anyway:
            _refuse_regression(guards, recipe)
        report(f"pushing to {destination.name}")
        published = push_to(destination, output, head)
    return Run(planned, merged, output, scores, published, guards)


def rehearse(
    recipe: Recipe,
    locked: Lock | None = None,
    destination: Destination | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, tuple[Finding, ...]]:
    """Return what `run` would do, and whether anything would keep it from doing so; changes nothing.

    Args:
        recipe: What would be done.
        locked: Its lock; made now where it is not given.
        destination: Where the model would go; by default as the recipe says.
        report: Called with a line of text at each long step.
    """
    hub = HubSources()
    planned = plan(recipe, locked or lock(recipe, report=report, hub=hub), hub=hub)
    findings = preflight.rehearse(planned, destination or destination_of(recipe))
    if recipe.evaluation is None:
        return planned, findings
    return planned, (*findings, preflight.look("data", lambda: _data_found(recipe, planned.lock)))


def _data_found(recipe: Recipe, locked: Lock) -> str:
    examples = load_evaluation_data(recipe, _with_kept_data(locked, recipe.output_path))
    return f"examples of {', '.join(examples)} are there"


def destination_of(recipe: Recipe, **changes: Any) -> Destination | None:
    """Return where the recipe publishes, None where it does not.

    Args:
        recipe: Its `output` names the repository.
        changes: Other attributes of the destination; None stands for what the recipe says.

    Raises:
        RecipeError: If there are changes, and the recipe names no repository.
    """
    said = {key: value for key, value in changes.items() if value is not None}
    if recipe.output.push_to_hub is None:
        if said:
            raise RecipeError(
                f"{', '.join(said)}: the recipe does not say where to publish",
                where="recipe, output.push_to_hub",
                expected="a repository on the Hub",
            )
        return None
    return Destination(**{"repo_id": recipe.output.push_to_hub, "private": recipe.output.private, **said})


def _refuse_regression(guards: tuple[Guard, ...], recipe: Recipe) -> None:
    fallen = [f"{guard.name} by {-guard.difference.mean:.4g}" for guard in regressed(guards)]
    if fallen and recipe.evaluation:
        raise PublishError(
            f"the merged model falls behind the base model on {', '.join(fallen)}, so it was not pushed",
            where=recipe.output.path,
            expected=f"at most {recipe.evaluation.margin:g}, as evaluation.margin says",
            hint="The model and its card are written. Change the method or the preference, or push all the "
            "same: hub-magmax run RECIPE --push-anyway",
        )


def lock(
    recipe: Recipe,
    *,
    hash_files: bool = False,
    report: Callable[[str], None] = lambda line: None,
    hub: HubSources | None = None,
) -> Lock:
    """Return what `recipe` stands for now: commits, hashes, weights, method.

    Reads headers alone, unless a preference is estimated, held-out examples check it, or `auto` leaves
    a choice to a comparison; models are then run, and merged in memory.

    Args:
        recipe: What to pin.
        hash_files: Read the weight files of folders whole, and lock their sha256 too.
        report: Called with a line of text at each long step.
        hub: Repositories that stay open for what comes after.

    Raises:
        SourceError: If a checkpoint cannot be reached.
        CheckpointError: If a checkpoint is malformed.
        RecipeError, EvaluationError: If preference or method cannot be formed.
    """
    return locking.lock(recipe, tuner=MemoryTuner(report), hash_files=hash_files, hub=hub)


def _scores(
    recipe: Recipe, locked: Lock, output: Path, report: Callable[[str], None], processes: Processes
) -> Scores:
    stored = processes.first_decides(lambda: _stored_scores(recipe, output))
    if stored is not None:
        return stored
    return evaluate(recipe, _with_kept_data(locked, output), output, processes=processes, report=report)


def _with_kept_data(locked: Lock, output: Path) -> Lock:
    """Return `locked` with the data of the lock that a finished merge keeps: its scores are of that."""
    with suppress(LockError):
        kept = read_lock(output / LOCK_NAME)
        if kept.digest == locked.digest:
            return replace(
                locked,
                datasets={**locked.datasets, **kept.datasets},
                local_data={**locked.local_data, **kept.local_data},
            )
    return locked


def _stored_scores(recipe: Recipe, output: Path) -> Scores | None:
    """Return the scores of an earlier run of the same evaluation, if they are there."""
    with suppress(EvaluationError):
        stored = read_scores(output)
        if recipe.evaluation and stored.evaluation_digest == recipe.evaluation.digest:
            return stored
    return None


def result_folder(recipe: Recipe) -> Path:
    """Return where to write what was found out: beside the merged model, or else beside the recipe."""
    return recipe.output_path if (recipe.output_path / LOCK_NAME).is_file() else recipe.folder


def _check_adapters(recipe: Recipe, sources: Mapping[str, LockedSource]) -> None:
    """Raise where an adapter stands for what only a whole checkpoint can be."""
    adapters = [name for name, source in sources.items() if source.adapter_config]
    if "base_model" in adapters:
        raise CheckpointError(
            "the base model is an adapter",
            where=sources["base_model"].label,
            expected="the whole model that the adapters were trained on",
        )
    if (name := recipe.output.files_from) in adapters:
        raise RecipeError(
            f"{name} is an adapter, and the merged model needs the config of a whole model",
            where="recipe, output.files_from",
            hint="Leave it out: the base model's files are copied.",
        )
    if recipe.adapters and not adapters:
        raise RecipeError(
            "none of the tasks is an adapter",
            where="recipe, adapters",
            hint="Leave it out, or check the tasks' models.",
        )
    whole = [name for name in sources if name != "base_model" and name not in adapters]
    if recipe.output.is_adapter and whole:
        raise RecipeError(
            f"{', '.join(whole)} {'is a whole checkpoint' if len(whole) == 1 else 'are whole checkpoints'}",
            where="recipe, output.format",
            expected="LoRA adapters only, to write an adapter",
            hint="Write whole weights: output.format: weights.",
        )


def _check_architectures(sources: Mapping[str, LockedSource], *, rules: bool) -> None:
    """Raise MismatchError where two configurations name different kinds of model.

    Models of different types can have tensors of the same names and shapes (llama and mistral, say), and
    so can models of one type with different heads. The latter may be meant where the recipe has rules for
    tensors, which say which head is kept.
    """
    stated: dict[str, dict[str, Any]] = {
        "model_type": {name: source.model_type for name, source in sources.items()},
        "architectures": {} if rules else {name: s.architectures for name, s in sources.items()},
    }
    for key, values in stated.items():
        known = {name: value for name, value in values.items() if value}
        for name, value in known.items():
            first = next(iter(known))
            if value != known[first]:
                raise _different_architectures(
                    key, sources[first].label, known[first], sources[name].label, value
                )


def _different_architectures(key: str, one: str, ones: Any, other: str, others: Any) -> MismatchError:
    shown = [value if isinstance(value, str) else ", ".join(value) for value in (ones, others)]
    return MismatchError(
        f"`{key}` is {shown[1]}, and {shown[0]} in {one}",
        where=f"{other}, config.json",
        expected="checkpoints of one architecture",
        hint="Check that it was fine-tuned from this base model."
        if key == "model_type"
        else "If the models differ in their heads only, say under `tensors` which head to keep.",
    )
