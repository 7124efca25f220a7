"""Registry of evaluators: metric, accepted options, and the calls that run them.

An evaluator is one decorated dataclass whose fields are its options. The modules that define the
built-in ones import torch and transformers only inside their functions, so that a recipe is checked
without paying for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hub_magmax.errors import EvaluationError
from hub_magmax.options import Options, options_of
from hub_magmax.recipe.values import Data
from hub_magmax.registry import EVALUATORS

if TYPE_CHECKING:
    from hub_magmax.evaluation.evaluators.loading import LoadedModel


class Outcome(NamedTuple):
    """Result of a model on one example.

    Attributes:
        score: Higher is better; from 0 (wrong) to 1 (right) where the evaluator's scores are shares.
        probability: That the model gave the right answer, where it says so.
        margin: How much more the model favours the right answer than the best of the others, in any unit
            that is the same for all its answers; negative where it is wrong. None where it does not say.
        is_cut: The example was longer than the model's context, so that a part of it was left out.
    """

    score: float
    probability: float | None = None
    margin: float | None = None
    is_cut: bool = False


class Sample(NamedTuple):
    """One example as a model saw it and answered, for people to read.

    Attributes:
        prompt: What the model was given.
        answer: What it answered or chose; None where it only judged the expected text.
        expected: The right answer.
        score: As in `Outcome`.
    """

    prompt: str
    answer: str | None
    expected: str
    score: float


@dataclass(frozen=True)
class Columns:
    """Columns of the inputs and the right answers; without an input column the evaluator's own.

    Attributes:
        input, label: Columns of the input and of the right answer.
        prompt: Column of what comes before a text; None where nothing was named.
        shots: Column that holds the solved examples before it (`prompts.shots_of`); None without any.
    """

    input: str | None = None
    label: str = "label"
    prompt: str | None = None
    shots: str | None = None


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
        has_prompts: `encode` heeds `Columns.prompt` and `Columns.shots`; false, and a recipe that names such
            a column is refused.
        wanted: A method of `Columns` that returns the names of the columns that `encode` reads, so that a
            missing one is told before a merge; they are told when they are read.
        describe_inputs: A method without arguments: how inputs are put together, as values by name for
            plan, card and `scores.json`; none.
        judged: How an answer is judged, in words; where the metric does not say it.
        describe_examples: A method of examples and `Columns`: facts about the examples, as values by name for
            card and `scores.json`; none.
        samples: A method like `outcomes` that returns a list of `Sample`; none.
        log_likelihoods: A method of a model and one batch of a single example: yields answers as pairs of a
            probability and its logarithm as a tensor that can be differentiated, for `fisher`; none.
        losses: A method of a model, one batch, and the share of each target that is spread over all answers:
            the loss of every example, as a tensor to be differentiated. Without it no model is trained.
        encode_unlabelled: A method like `encode` that reads no labels, for statistics of inputs, which takes
            the place of it there; `encode`.
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
    from hub_magmax.evaluation.evaluators.prompts import PROMPT_COLUMN, SHOTS_COLUMN

    prompt = PROMPT_COLUMN if data.template is not None else data.prompt_column
    return Columns(data.input_column, data.label_column, prompt, SHOTS_COLUMN if data.few_shot else None)


def needs_labels(evaluator: Evaluator) -> bool:
    """Say whether examples need their label column."""
    return bool(getattr(evaluator, "labelled", True))


def brings_data(evaluator: Evaluator) -> bool:
    """Say whether the evaluator has examples of its own."""
    return bool(getattr(evaluator, "brings_data", False))


def wanted_columns(evaluator: Evaluator, data: Data) -> list[str]:
    """Return the columns that an evaluator is known to read of a data set; empty where it does not say."""
    wanted = getattr(evaluator, "wanted", None)
    return list(wanted(columns_of(data))) if wanted else []


def encode_unlabelled(evaluator: Evaluator) -> Callable[..., Iterator[Any]] | None:
    """Return what encodes examples whose labels do not count, None where the evaluator needs labels."""
    found: Callable[..., Iterator[Any]] | None = getattr(evaluator, "encode_unlabelled", None)
    return found


def described_inputs(evaluator: Evaluator, data: Data) -> dict[str, Any]:
    """Return how an evaluator puts together what models get, as values by name."""
    describe = getattr(evaluator, "describe_inputs", None)
    found: dict[str, Any] = dict(describe()) if describe else {}
    if judged := getattr(evaluator, "judged", ""):
        found["judged"] = str(judged)
    prompts = {"prompt_column": data.prompt_column, "template": data.template}
    found |= {key: value for key, value in prompts.items() if value is not None}
    if data.few_shot and data.shots:
        shots = data.few_shot
        found["few_shot"] = f"{shots.count} of {data.shots.dataset}, split {shots.split}, seed {shots.seed}"
    return found


def described_examples(evaluator: Evaluator, examples: Any, data: Data) -> dict[str, Any]:
    """Return what an evaluator says of the examples of a task, by name; nothing of those that it brings."""
    describe = getattr(evaluator, "describe_examples", None)
    return dict(describe(examples, columns_of(data))) if describe and not isinstance(examples, str) else {}


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
        EVALUATORS.register(name, make)
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
