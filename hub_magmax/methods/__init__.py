"""Merge methods: one function each, found by name through `registry`."""

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
from hub_magmax.registry import METHODS

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


def multiplying_names() -> tuple[str, ...]:
    """Return the names of the built-in methods that take coefficients whatever their options are."""
    return tuple(name for name in METHODS.built_in if get_method(name).multiplies({}))


def factored_names() -> tuple[str, ...]:
    """Return the names of the built-in methods of whole matrices that merge adapters by their factors."""
    return tuple(name for name in METHODS.built_in if get_method(name).takes_factors)
