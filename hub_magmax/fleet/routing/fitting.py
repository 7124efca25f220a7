"""Fitting of a router: models observed, a verifier fitted, calibrated and measured, files written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_magmax.checkpoints.index import ROUTER_NAME, ROUTER_WEIGHTS_NAME
from hub_magmax.errors import ArgumentError, DistributedError, EvaluationError, HubMagmaxError
from hub_magmax.evaluation.evaluators import evaluator_of
from hub_magmax.evaluation.scores import MERGED
from hub_magmax.evaluation.scoring import Prepared, prepare
from hub_magmax.evaluation.software import software_used
from hub_magmax.files import check_files
from hub_magmax.fleet.predicting import deterministic
from hub_magmax.fleet.routing.measuring import Aim, measure
from hub_magmax.fleet.routing.observing import CLASSIFIERS, Observed, observe
from hub_magmax.fleet.routing.record import RouterRecord, merge_digest, sha256, verifier_bytes, write_router
from hub_magmax.fleet.routing.splitting import Parts, divided, divided_beside
from hub_magmax.fleet.routing.verifier import calibrated, fit
from hub_magmax.fleet.verifying import verify
from hub_magmax.processes import find_processes
from hub_magmax.recipe.arguments import checked
from hub_magmax.recipe.loading import RecipeLike, as_recipe
from hub_magmax.recipe.lockfile import Lock, LockLike, as_lock
from hub_magmax.recipe.result_files import stored_recipe
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import Data
from hub_magmax.reporting.card_file import write_stored_card
from hub_magmax.reporting.figures.routing import draw_routing
from hub_magmax.reporting.router_report import ROUTER_PICTURE_NAME, RouterReport
from hub_magmax.text import ProgressBar, Report, listed, step, unseen


@checked
def route(
    recipe: RecipeLike,
    lock: LockLike,
    *,
    budget: float = 0.3,
    risk: float | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
    report: Report = lambda line: None,
    progress: ProgressBar = unseen,
) -> RouterReport:
    """Fit a router for the merged model in a recipe's output folder, measure it, and write it there.

    The evaluation's examples are divided by their content: four tenths fit a verifier, two calibrate it and
    choose the threshold, and four measure the router. Where the recipe has `routing`, its examples fit and
    calibrate, two to one, and all of the evaluation's measure.

    Args:
        recipe: Its `evaluation` names the examples of each task, and the evaluator: `image-classification` or
            `text-classification`.
        lock: Of the merged model.
        budget: Share of the inputs that is to be escalated, a target: by it the threshold is chosen on some
            examples, and others may exceed it.
        risk: Choose it so that at most this share of the router's answers is wrong, as far as the held-out
            examples support that; else the budget decides, and the report says so.
        confidence: Of the statement about the risk.
        seed: Of the division; the recipe's if None.
        report: Called with a line of text at each step.
        progress: As for `evaluate`.

    Raises:
        ArgumentError: If a number is out of range.
        EvaluationError: If the recipe names no examples, or too few, its evaluator is another one, or a model
            gives values that are not finite.
        OutputError: If there is no merged model, it was changed, or the files cannot be written.
        MissingDependencyError: If scikit-learn is not installed.
    """
    recipe, locked = as_recipe(recipe), as_lock(lock)
    aim = _checked_aim(budget, risk, confidence)
    _check_models(recipe)
    folder = recipe.output_path
    check_files([folder / name for name in (ROUTER_NAME, ROUTER_WEIGHTS_NAME, ROUTER_PICTURE_NAME)])
    merge = merge_digest(verify(str(folder)))
    assert recipe.evaluation is not None
    seed = recipe.seed if seed is None else seed
    prepared: list[Prepared] = []
    if recipe.routing is not None:
        with _about_routing():
            prepared.append(prepare(_on_examples(recipe, recipe.routing.tasks), locked, folder))
    prepared.append(prepare(_on_examples(recipe, recipe.evaluation.tasks), locked, folder))
    observed, parts = _observed(prepared, seed, report, progress)
    fitted, calibrating = observed.at(parts.fit), observed.at(parts.calibrate)
    with step("fitting the verifier", report):
        verifier = calibrated(fit(fitted), calibrating)
    with step("measuring the router", report):
        found = measure(observed, parts, verifier, (MERGED, *recipe.task_names), aim)
    arrays = verifier_bytes(verifier)
    evaluator = prepared[-1].spec.evaluator.name
    *fitting, data = map(_described, prepared)
    record = RouterRecord(
        merge, evaluator, seed, data, fitting[0] if fitting else {}, found, sha256(arrays), software_used()
    )
    write_router(record, arrays, folder)
    draw_routing(found, folder / ROUTER_PICTURE_NAME)
    _write_card(recipe, locked)
    return found


def _checked_aim(budget: float, risk: float | None, confidence: float) -> Aim:
    rules = {
        "budget": (0 <= budget <= 1, budget, "from 0 to 1"),
        "risk": (risk is None or 0 < risk < 1, risk, "above 0 and below 1"),
        "confidence": (0.5 <= confidence < 1, confidence, "from 0.5 to below 1"),
    }
    for name, (is_right, value, expected) in rules.items():
        if not is_right:
            raise ArgumentError(f"{name} is {value}", where="route", expected=f"a number {expected}")
    return Aim(budget, risk, confidence)


def _check_models(recipe: Recipe) -> None:
    """Raise an error where no router can be fitted, before a model is loaded."""
    if find_processes().count > 1:
        raise DistributedError(
            "a router is fitted by one process", where="WORLD_SIZE", hint="Call it without a launcher."
        )
    if recipe.evaluation is None:
        raise EvaluationError(
            "the recipe names no examples that a router could be fitted on",
            key=("evaluation",),
            hint="Name each task's examples under `evaluation`.",
        )
    if not isinstance(evaluator_of(recipe.evaluation), CLASSIFIERS):
        names = ["image-classification", "text-classification"]
        raise EvaluationError(
            f"no router is fitted for models that {recipe.evaluation.evaluator.name!r} runs",
            key=("evaluation", "evaluator"),
            expected=f"one of {listed(names)}",
            hint="Only a classifier with a head tells features and classes of single inputs.",
        )


def _observed(
    prepared: Sequence[Prepared], seed: int, report: Report, progress: ProgressBar
) -> tuple[Observed, Parts]:
    """Return what models say of all examples, and the parts: those that measure come last."""
    *before, last = prepared
    with deterministic():
        with _about_routing():
            found = [observe(examples, report, progress) for examples in before]
        measuring = observe(last, report, progress)
    if not found:
        return measuring, divided(measuring.contents, seed)
    (fitting,) = found
    return fitting.joined(measuring), divided_beside(fitting.contents, measuring.contents, seed)


def _described(prepared: Prepared) -> dict[str, Any]:
    return {task: dict(prepared.described[task]) for task in prepared.spec.tasks}


def _on_examples(recipe: Recipe, tasks: Mapping[str, Data]) -> Recipe:
    """Return a recipe whose evaluation has every checkpoint on these examples, and no guards."""
    assert recipe.evaluation is not None
    changes: dict[str, Any] = {"cells": None, "quantized": (), "guard": {}, "tasks": tasks}
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=changes)})


@contextmanager
def _about_routing() -> Iterator[None]:
    """Give errors meanwhile the keys of `routing`, whose examples stand in the evaluation's place."""
    try:
        yield
    except HubMagmaxError as error:
        error.is_in(("evaluation", "tasks"), ("routing", "tasks"))
        raise


def _write_card(recipe: Recipe, locked: Lock) -> Path:
    """Write the model's card again, by its own recipe; one that somebody edited stays."""
    own = stored_recipe(recipe).model_copy(update={"output": recipe.output})
    return write_stored_card(own, locked, keep_edited=True)
