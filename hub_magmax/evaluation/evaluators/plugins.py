"""Evaluators of other packages: their errors name them, and what they return is checked before it is used.

Built-in evaluators are tested instead, and pay for none of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import EvaluationError, HubMagmaxError
from hub_magmax.evaluation.evaluators.registry import Columns, Evaluator, Outcome, Sample

if TYPE_CHECKING:
    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Attributes that every evaluator has, with what they are.
_NEEDED: Mapping[str, tuple[type, str]] = {
    "metric": (str, "a text"),
    "is_share": (bool, "True or False"),
    "pipeline_tag": (str, "a text"),
    "model_class": (str, "the name of a class of transformers"),
    "processor_class": (str, "the name of a class of transformers"),
}

_HINT = "Mend it, or choose another evaluator; --debug shows the line."


class PluginEvaluator:
    """A plug-in's evaluator, checked.

    Args:
        inner: As the plug-in makes it.
        label: Name of the plug-in in messages, with its package.

    Raises:
        EvaluationError: If something that every evaluator has is missing or of another kind.
    """

    def __init__(self, inner: Any, label: str) -> None:
        self._inner, self.label = inner, label
        for name, (kind, told) in _NEEDED.items():
            found = getattr(inner, name, None)
            if not isinstance(found, kind):
                raise EvaluationError(
                    f"its {name} is {'missing' if found is None else repr(found)[:80]}",
                    where=label,
                    expected=told,
                    hint="Mend it: the protocol `Evaluator` says what an evaluator has.",
                )
        self.metric: str = inner.metric
        self.is_share: bool = inner.is_share
        self.pipeline_tag: str = inner.pipeline_tag
        self.model_class: str = inner.model_class
        self.processor_class: str = inner.processor_class

    def __getattr__(self, name: str) -> Any:
        """Return what else the plug-in has; its functions are checked for errors."""
        found = getattr(self._inner, name)
        return _failing(found, self.label) if callable(found) else found

    def encode(self, model: LoadedModel, examples: Any, columns: Columns, batch_size: int) -> Iterator[Any]:
        """Yield the plug-in's batches."""
        with failures(self.label):
            yield from self._inner.encode(model, examples, columns, batch_size)

    def outcomes(self, model: LoadedModel, batches: Iterable[Any]) -> list[Outcome]:
        """Return the plug-in's outcomes, if that is what they are."""
        with failures(self.label):
            found = self._inner.outcomes(model, batches)
        if not isinstance(found, list | tuple):
            raise self._refusal(f"a {type(found).__name__}", "a list with one Outcome for each example")
        for index, outcome in enumerate(found):
            if (wrong := _problem(outcome, is_share=self.is_share)) is not None:
                raise self._refusal(f"{wrong[0]} for example {index}", wrong[1])
        return list(found)

    def _refusal(self, told: str, expected: str) -> EvaluationError:
        return EvaluationError(f"it returned {told}", where=self.label, expected=expected, hint=_HINT)


def _failing(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Return a function of a plug-in whose errors name it, and which returns what it has to."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with failures(label):
            found = function(*args, **options)
            return _KINDS.get(getattr(function, "__name__", ""), lambda value: value)(found)

    return call


def _samples(found: Any) -> list[Sample]:
    wrong = next((one for one in found if not isinstance(one, Sample)), None)
    if wrong is not None:
        raise TypeError(f"samples returned {wrong!r:.80}, which is no Sample")
    return list(found)


#: What becomes of the result of each optional function.
_KINDS: Mapping[str, Callable[[Any], Any]] = {
    "describe_inputs": lambda found: {str(key): value for key, value in found.items()},
    "describe_examples": lambda found: {str(key): value for key, value in found.items()},
    "wanted": lambda found: [str(name) for name in found],
    "samples": _samples,
}


@contextmanager
def failures(where: str) -> Iterator[None]:
    """Turn any error of an evaluator into an EvaluationError that says whose it is."""
    try:
        yield
    except (HubMagmaxError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        told = " ".join(str(error).split())[:500]
        raise EvaluationError(
            f"it failed ({type(error).__name__}{': ' if told else ''}{told})", where=where, hint=_HINT
        ) from error


def _problem(outcome: Any, *, is_share: bool) -> tuple[str, str] | None:
    """Return what is wrong with an outcome and what was expected; None where it is right."""
    if not isinstance(outcome, Outcome):
        return f"a {type(outcome).__name__}", "an Outcome"
    share = "a number from 0 to 1"
    if not _is_number(outcome.score, is_share=is_share):
        return f"the score {outcome.score!r:.40}", share if is_share else "a finite number"
    if outcome.probability is not None and not _is_number(outcome.probability, is_share=True):
        return f"the probability {outcome.probability!r:.40}", f"{share}, or None"
    if outcome.margin is not None and not _is_number(outcome.margin, is_share=False):
        return f"the margin {outcome.margin!r:.40}", "a finite number, or None"
    return None


def _is_number(value: Any, *, is_share: bool) -> bool:
    try:
        return math.isfinite(value) and (not is_share or 0 <= value <= 1)
    except (TypeError, ValueError, OverflowError):
        return False


def answers(
    evaluator: Evaluator, model: LoadedModel, batches: Iterable[Any], task: str, num_examples: int | None
) -> list[Outcome]:
    """Return an evaluator's outcomes on the examples of a task; errors of a plug-in name both.

    Args:
        evaluator: Built in, or a plug-in's.
        model: What is scored.
        batches: As `encode` yields them.
        task: Whose examples these are, for messages.
        num_examples: How many there are, None where the evaluator brings them: a plug-in has to give one
            outcome for each.
    """
    with about(evaluator, task):
        found = evaluator.outcomes(model, batches)
        if isinstance(evaluator, PluginEvaluator) and not _is_whole(found, num_examples):
            raise EvaluationError(
                f"it returned {len(found):,} outcomes",
                where=evaluator.label,
                expected=f"{num_examples:,}, one for each example in order"
                if num_examples
                else "at least one",
                hint=_HINT,
            )
        return found


def _is_whole(found: list[Outcome], num_examples: int | None) -> bool:
    return bool(found) if num_examples is None else len(found) == num_examples


@contextmanager
def about(evaluator: Evaluator, task: str) -> Iterator[None]:
    """Name the task in the errors of a plug-in."""
    try:
        yield
    except EvaluationError as error:
        if not isinstance(evaluator, PluginEvaluator) or error.where != evaluator.label:
            raise
        raise EvaluationError(
            error.what, where=f"{error.where}, {task}", expected=error.expected, hint=error.hint
        ) from error.__cause__ or error
