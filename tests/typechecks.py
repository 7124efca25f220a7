"""Checks of annotations in tests, by beartype, compiled once for each function.

jaxtyping decorates a function that is defined in another one at each call of the outer one. Compiling its
checks again took most of the time of tests that select the winners of small tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

Function = Callable[..., Any]

_CHECKED: dict[object, Function] = {}


def checked(function: Function) -> Function:
    """Return a function with its annotations checked, the same for the same code and annotations.

    Args:
        function: Stands for the one that is checked: it has its parameters, and no closure.
    """
    # By their text: `Float[Tensor, "rows"]` is another type each time that it is evaluated.
    hints = [(name, repr(hint)) for name, hint in function.__annotations__.items()]
    defaults = len(function.__defaults__ or ()), tuple(function.__kwdefaults__ or ())
    key = function.__code__, function.__module__, function.__qualname__, tuple(hints), defaults
    if key not in _CHECKED:
        _CHECKED[key] = beartype(function)
    return _CHECKED[key]
