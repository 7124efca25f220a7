"""Evaluators: one class for each way to score a kind of model, found by name through `registry`."""

from hub_magmax.evaluation.evaluators.making import evaluator_of, make_evaluator
from hub_magmax.evaluation.evaluators.registry import (
    Columns,
    Evaluator,
    EvaluatorKind,
    Outcome,
    brings_data,
    check_direction,
    columns_of,
    described_examples,
    described_inputs,
    encode_unlabelled,
    evaluator,
    evaluator_names,
    get_evaluator,
    needs_labels,
    unit_of,
    wanted_columns,
)

__all__ = [
    "Columns",
    "Evaluator",
    "EvaluatorKind",
    "Outcome",
    "brings_data",
    "check_direction",
    "columns_of",
    "described_examples",
    "described_inputs",
    "encode_unlabelled",
    "evaluator",
    "evaluator_names",
    "evaluator_of",
    "get_evaluator",
    "make_evaluator",
    "needs_labels",
    "unit_of",
    "wanted_columns",
]
