"""Evaluators made by their names, with their options; those of other packages are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub_magmax.evaluation.evaluators.plugins import PluginEvaluator, failures
from hub_magmax.evaluation.evaluators.registry import Evaluator, get_evaluator
from hub_magmax.options import check_options
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.registry import EVALUATORS


def evaluator_of(spec: Evaluation) -> Evaluator:
    """Return the evaluator that a recipe's `evaluation` names, with its options.

    Raises:
        RecipeError: If there is none of that name.
    """
    return make_evaluator(spec.evaluator.name, spec.evaluator.options)


def make_evaluator(name: str, options: Mapping[str, Any]) -> Evaluator:
    """Return an evaluator with its options checked and defaults filled in.

    Raises:
        RecipeError: If there is none of that name.
        pydantic.ValidationError: If an option is wrong, missing or unknown.
        EvaluationError: If a plug-in fails, or makes no evaluator.
    """
    kind = get_evaluator(name)
    plugin, checked = EVALUATORS.plugin(name), check_options(kind, options)
    if plugin is None:
        return kind.make(**checked)
    label = f"evaluator {name} ({plugin})"
    with failures(label):
        return PluginEvaluator(kind.make(**checked), label)
