"""Names of the built-in methods that can do something."""

from hub_magmax.methods.registry import get_method
from hub_magmax.registry import METHODS


def multiplying_names() -> tuple[str, ...]:
    """Return the names of the built-in methods that take coefficients whatever their options are."""
    return tuple(name for name in METHODS.built_in if get_method(name).multiplies({}))


def factored_names() -> tuple[str, ...]:
    """Return the names of the built-in methods of whole matrices that merge adapters by their factors."""
    return tuple(name for name in METHODS.built_in if get_method(name).takes_factors)
