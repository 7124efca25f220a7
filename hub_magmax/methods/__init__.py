"""Merge methods: one function each, found by name through `registry`."""

from hub_magmax.methods.names import factored_names, multiplying_names
from hub_magmax.methods.registry import (
    ADDING,
    MergeMethod,
    Paper,
    get_method,
    linear_names,
    merge_method,
    method_names,
    surveys_model,
)
from hub_magmax.methods.rules import Rule
from hub_magmax.options import check_options

__all__ = [
    "ADDING",
    "MergeMethod",
    "Paper",
    "Rule",
    "check_options",
    "factored_names",
    "get_method",
    "linear_names",
    "merge_method",
    "method_names",
    "multiplying_names",
    "surveys_model",
]
