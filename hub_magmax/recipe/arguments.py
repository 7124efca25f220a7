"""Arguments of public functions, checked by their annotations before anything is done."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hub_magmax.errors import ArgumentError, explained
from hub_magmax.text import ProgressBar, shown

P = ParamSpec("P")
T = TypeVar("T")

#: Functions that make what others take, by the name of its class.
_MADE_BY: Mapping[str, str] = {
    "Plan": "plan(recipe)",
    "Lock": "lock(recipe)",
    "MergeReport": "merge(plan)",
    "Scores": "evaluate(recipe, lock, folder)",
    "Comparison": "compare(recipe)",
    "Surface": "sweep(recipe)",
    "Diagnosis": "diagnose(recipe)",
}

#: Kinds that the functions themselves look at: tensors of any library, and protocols.
LEFT_ALONE = ("Any", "Float", "StateDict")


@dataclass(frozen=True)
class _Kind:
    """One kind of value that a parameter takes.

    Attributes:
        told: What it is, in words.
        accepts: Whether a value is one.
        convert: Makes one of a value that stands for it; None where nothing does.
        stands: Whether a value stands for it.
    """

    told: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] | None = None
    stands: Callable[[Any], bool] = lambda value: False


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that refuses arguments of another kind than its annotations name.

    A text is taken for a path, a path for a text, and one text for a list of one. Classes of this package are
    known by their names, so that none of them is imported. What the system refuses meanwhile, such as a file
    that may not be read, becomes an error of ours.

    Raises:
        ArgumentError: When it is called, with the parameter and what it takes.
    """
    signature = inspect.signature(function)
    kinds = {name: _kinds(str(found.annotation)) for name, found in signature.parameters.items()}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says what is missing or unknown
        for name, value in bound.arguments.items():
            bound.arguments[name] = _accepted(value, kinds[name], f"{function.__name__}, {name}")
        try:
            return function(*bound.args, **bound.kwargs)
        except BrokenPipeError:
            raise  # of who reads what is reported
        except OSError as error:
            raise explained(error) or error from error

    return call


def opened(
    progress: ProgressBar, total: int, doing: str, unit: str
) -> AbstractContextManager[Callable[[int], None] | None]:
    """Return what shows the progress of some work, opened by a caller's function.

    Raises:
        ArgumentError: If the function returns no context manager.
    """
    found = progress(total, doing, unit)
    if not hasattr(found, "__enter__"):
        raise ArgumentError(f"progress returned {shown(found, 60)}", expected="a context manager")
    return found


def check_named(output: Path | str, where: str) -> None:
    """Raise ArgumentError for a folder without a name to create it by: an empty text, a dot, the root."""
    if not Path(output).name:
        raise ArgumentError("the output has no name", where=where, expected="a folder to create")


def _accepted(value: Any, kinds: Sequence[_Kind], where: str) -> Any:
    """Return a value of one of these kinds, or made of what stands for one; without kinds any as it is."""
    if isinstance(value, str | os.PathLike):
        _check_name(value, where)
    if not kinds or any(kind.accepts(value) for kind in kinds):
        return value
    for kind in kinds:
        if kind.convert is not None and kind.stands(value):
            return kind.convert(value)
    name = type(value).__name__
    is_short = isinstance(value, str | int | float | os.PathLike)
    what = f"{shown(value, 60)} is of the kind {name}" if is_short else f"this is a {name}"
    raise ArgumentError(what, where=where, expected=" or ".join(dict.fromkeys(k.told for k in kinds)))


def _check_name(value: Any, where: str) -> None:
    """Raise ArgumentError for a text that no file and no recipe can be called."""
    try:
        is_name = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ArgumentError(
            f"{shown(str(value), 60)} holds characters that no text has", where=where, expected="a text"
        )


def _kinds(annotation: str) -> tuple[_Kind, ...]:
    """Return the kinds that an annotation names; empty where any value may be right."""
    found = [_kind(part) for part in alternatives(annotation)]
    return () if None in found else tuple(kind for kind in found if kind is not None)


def alternatives(annotation: str) -> list[str]:
    """Return the parts between the bars of an annotation that stand in no bracket."""
    parts, depth = [""], 0
    for sign in annotation:
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _kind(part: str) -> _Kind | None:
    """Return the kind that one part of an annotation names; None where any value may be right."""
    name = part.partition("[")[0].rpartition(".")[2]
    if name in LEFT_ALONE or part == "inspect._empty":
        return None
    if name == "Literal":
        values = ast.literal_eval(part[part.index("[") :])
        return _Kind(" or ".join(map(repr, values)), lambda value: value in values)
    if name in KINDS:
        return KINDS[name]
    told = f"a {name}" if name not in _MADE_BY else f"what hub_magmax.{_MADE_BY[name]} returns"
    return _Kind(told, lambda value: name in (kind.__name__ for kind in type(value).__mro__))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_recipe(value: Any) -> bool:
    names = (kind.__name__ for kind in type(value).__mro__)
    return isinstance(value, str | os.PathLike | Mapping) or "Recipe" in names


def _is_lock(value: Any) -> bool:
    names = (kind.__name__ for kind in type(value).__mro__)
    return isinstance(value, str | os.PathLike) or "Lock" in names


def _is_list(value: Any) -> bool:
    is_one = isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0
    return not is_one and isinstance(value, Iterable)


def _takes(value: Any, count: int) -> bool:
    """Say whether this can be called with so many arguments, as far as is known."""
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of some functions written in C nothing is known
        return True
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


_PATH = _Kind("a path", lambda value: isinstance(value, Path), Path, _is_path)
_TEXT = _Kind("a text", _is_text, os.fspath, lambda value: isinstance(value, Path))
_CALLABLE = "a function of one argument, such as print"
_NUMBERED = "a function of a number"
_PROGRESS = "a function of a total, a text and a unit that returns a context manager"

KINDS: Mapping[str, _Kind] = {
    "None": _Kind("None", lambda value: value is None),
    "Path": _PATH,
    "str": _TEXT,
    "bool": _Kind("True or False", _is_truth),
    "int": _Kind("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "float": _Kind("a number", _is_number),
    "Report": _Kind(_CALLABLE, lambda value: _takes(value, 1)),
    "ProgressBar": _Kind(_PROGRESS, lambda value: _takes(value, 3)),
    "Progress": _Kind(_NUMBERED, lambda value: _takes(value, 1)),
    "Callable": _Kind(_NUMBERED, lambda value: _takes(value, 1)),
    "Backend": _Kind("a backend", lambda value: hasattr(value, "task_vectors")),
    "Mapping": _Kind("a mapping, such as {name: value}", lambda value: isinstance(value, Mapping)),
    "Sequence": _Kind("a list", _is_list),
    "Iterable": _Kind("a list of texts", _is_list, lambda value: (value,), _is_text),
    "RecipeLike": _Kind("a recipe, the path of one, or its values as a mapping", _is_recipe),
    "LockLike": _Kind("what hub_magmax.lock(recipe) returns, or the path of a lock", _is_lock),
}
