"""Evaluators: one class for each way to score a kind of model, found by name through `registry`."""

from hub_magmax.evaluators.registry import (
    Columns,
    Evaluator,
    EvaluatorKind,
    Outcome,
    evaluator,
    evaluator_names,
    get_evaluator,
    make_evaluator,
)

__all__ = [
    "Columns",
    "Evaluator",
    "EvaluatorKind",
    "Outcome",
    "evaluator",
    "evaluator_names",
    "get_evaluator",
    "make_evaluator",
]
