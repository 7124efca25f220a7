"""Registry of evaluators: metric, accepted options, and the calls that run them.

An evaluator is one decorated dataclass whose fields are its options. The modules that define the
built-in ones import torch and transformers only inside their functions, so that a recipe is checked
without paying for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hub_magmax.errors import EvaluationError
from hub_magmax.recipe.schema import Evaluation
from hub_magmax.recipe.values import Data
from hub_magmax.registry import EVALUATORS, Options, check_options, options_of

if TYPE_CHECKING:
    from hub_magmax.evaluation.evaluators.loading import LoadedModel


class Outcome(NamedTuple):
    """Result of a model on one example.

    Attributes:
        score: Higher is better; from 0 (wrong) to 1 (right) where the evaluator's scores are shares.
        probability: That the model gave the right answer, where it says so.
        margin: How much more the model favours the right answer than the best of the others, in any unit
            that is the same for all its answers; negative where it is wrong. None where it does not say.
    """

    score: float
    probability: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Columns:
    """Columns of the inputs and the right answers; without an input column the evaluator's own."""

    input: str | None = None
    label: str = "label"


class Evaluator(Protocol):
    """Scores one kind of model.

    Attributes:
        metric: What the mean of the scores is called, such as "accuracy".
        is_share: Scores are between 0 and 1, and their mean is shown in per cent.
        pipeline_tag: The Hub's name for the kind of model.
        model_class, processor_class: Classes of transformers with `from_pretrained`.

    More are optional, with a default for each:
        labelled: Examples need their label column; true.
        brings_data: There are no examples to load, because `dataset` is a name that the evaluator itself
            knows; false.
        unit: Of the scores, such as "nats per token"; none.
        higher_is_better: False is refused, since everything that compares models takes more for better:
            return the negative of such a measure.
    """

    @property
    def metric(self) -> str: ...

    @property
    def is_share(self) -> bool: ...

    @property
    def pipeline_tag(self) -> str: ...

    @property
    def model_class(self) -> str: ...

    @property
    def processor_class(self) -> str: ...

    def encode(self, model: LoadedModel, examples: Any, columns: Columns, batch_size: int) -> Iterator[Any]:
        """Yield batches for `outcomes`, `batch_size` examples (of a `Dataset`) at a time, in order.

        Models with the same processor and classes can share the result, whatever their weights.

        Raises:
            EvaluationError: If a column is missing, or an answer is none that the model can give.
        """
        ...

    def outcomes(self, model: LoadedModel, batches: Iterable[Any]) -> list[Outcome]:
        """Return one outcome per example, in order."""
        ...


def columns_of(data: Data) -> Columns:
    """Return the columns of inputs and labels that a recipe names for a data set."""
    return Columns(data.input_column, data.label_column)


def evaluator_of(spec: Evaluation) -> Evaluator:
    """Return the evaluator that a recipe's `evaluation` names, with its options.

    Raises:
        RecipeError: If there is none of that name.
    """
    return make_evaluator(spec.evaluator.name, spec.evaluator.options)


def needs_labels(evaluator: Evaluator) -> bool:
    """Say whether examples need their label column."""
    return bool(getattr(evaluator, "labelled", True))


def brings_data(evaluator: Evaluator) -> bool:
    """Say whether the evaluator has examples of its own."""
    return bool(getattr(evaluator, "brings_data", False))


def unit_of(evaluator: Evaluator) -> str:
    """Return the unit of the scores, empty where the evaluator states none."""
    return str(getattr(evaluator, "unit", ""))


def check_direction(evaluator: Evaluator, name: str) -> None:
    """Raise EvaluationError for an evaluator whose scores are better the lower they are."""
    if not getattr(evaluator, "higher_is_better", True):
        raise EvaluationError(
            f"lower values of {evaluator.metric!r} are better, and models are compared by higher ones",
            where=f"evaluator {name!r}",
            hint="Let the evaluator return the negative of its measure.",
        )


@dataclass(frozen=True)
class EvaluatorKind:
    """A registered evaluator.

    Attributes:
        name: What recipes call it.
        make: Takes the options and returns the evaluator.
        options: As pydantic field definitions, (annotation, default) by name.
        summary: First line of the class's docstring.
    """

    name: str
    make: Callable[..., Evaluator]
    options: Options = field(hash=False)
    summary: str


def evaluator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a class into an evaluator: its keyword-only arguments become recipe options.

    Args:
        name: What recipes call it: lower case, words joined by hyphens.
    """

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        summary = (inspect.getdoc(make) or "").split("\n", 1)[0]
        make.evaluator = EvaluatorKind(name, make, MappingProxyType(options_of(make)), summary)  # type: ignore[attr-defined]
        return make

    return register


def evaluator_names() -> tuple[str, ...]:
    """Return the names of all evaluators, the built-in ones first, then those of other packages."""
    return EVALUATORS.names()


def get_evaluator(name: str) -> EvaluatorKind:
    """Return the evaluator that recipes call `name`.

    Raises:
        RecipeError: If there is none, with the nearest name.
    """
    kind: EvaluatorKind = EVALUATORS.get(name)
    return kind


def make_evaluator(name: str, options: Mapping[str, Any]) -> Evaluator:
    """Return an evaluator with its options checked and defaults filled in.

    Raises:
        RecipeError: If there is none of that name.
        pydantic.ValidationError: If an option is wrong, missing or unknown.
    """
    kind = get_evaluator(name)
    return kind.make(**check_options(kind, options))
