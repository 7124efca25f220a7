"""Score models on each task's examples, one outcome per example.

An evaluator knows how to run one kind of model; everything else (data, which models, intervals)
is the same for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hub_magmax.data import label_names, load_examples, without_bars
from hub_magmax.digest import digest
from hub_magmax.errors import EvaluationError
from hub_magmax.lockfile import Lock
from hub_magmax.recipe import Data, Evaluation, Recipe
from hub_magmax.references import LocalFolder

if TYPE_CHECKING:
    from datasets import Dataset

SCORES_NAME = "scores.json"

#: What the merged model is called among the models that are scored.
MERGED = "merged"

Report = Callable[[str], None]


@dataclass(frozen=True)
class ModelPlace:
    """What `from_pretrained` takes: a folder or a repository id, and a commit for the latter."""

    name: str
    revision: str | None = None


class Evaluator(Protocol):
    """Runs one kind of model.

    Attributes:
        metric: What the mean of the outcomes is called, such as "accuracy".
        pipeline_tag: The Hub's name for the kind of model.
    """

    @property
    def metric(self) -> str: ...

    @property
    def pipeline_tag(self) -> str: ...

    def load(self, place: ModelPlace) -> Any:
        """Return the model, ready to be given to `outcomes`."""
        ...

    def outcomes(self, model: Any, examples: Dataset, data: Data, batch_size: int) -> list[float]:
        """Return one number from 0 (wrong) to 1 (right) per example, in order."""
        ...


@dataclass(frozen=True)
class Score:
    """One model on one task.

    Attributes:
        model: `base_model`, `merged`, or the name of the task whose own checkpoint it is.
        task: Whose examples these are.
        value: Mean outcome.
        low, high: 95 % interval of the mean (Wilson).
        num_examples: How many examples it is a mean of.
    """

    model: str
    task: str
    value: float
    low: float
    high: float
    num_examples: int


@dataclass(frozen=True)
class Scores:
    """All that was measured.

    Attributes:
        metric: What the values are, such as "accuracy".
        pipeline_tag: The Hub's name for the kind of model.
        scores: Every model on every task that has examples.
        data: By task, the data set, split and revision that were used.
        evaluation_digest: Of the recipe's `evaluation` that asked for them.
    """

    metric: str
    pipeline_tag: str
    scores: tuple[Score, ...]
    data: Mapping[str, Mapping[str, Any]] = field(hash=False)
    evaluation_digest: str = ""

    def get(self, model: str, task: str) -> Score | None:
        return next((s for s in self.scores if (s.model, s.task) == (model, task)), None)

    def table(self) -> str:
        """Return everything that was measured as text."""
        rows: dict[str, dict[str, float]] = {}
        for score in self.scores:
            rows.setdefault(score.model, {})[score.task] = score.value
        return score_table(self.metric, rows, tuple(self.data))

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def to_json(self) -> str:
        return json.dumps({"digest": self.digest, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def score_table(corner: str, rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return scores as text: a row per model, a column per task, a dash where nothing was measured."""
    width = max(len(name) for name in (*rows, corner))
    columns = {task: max(len(task), 5) for task in tasks}
    lines = ["  ".join([f"{corner:<{width}}", *(f"{task:>{c}}" for task, c in columns.items())])]
    for name, values in rows.items():
        cells = (f"{values[task]:>{c}.3f}" if task in values else "-" * c for task, c in columns.items())
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def read_scores(path: Path) -> Scores:
    """Return the scores stored in `path`.

    Raises:
        EvaluationError: If the file is not what `to_json` writes.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("digest")
        values["scores"] = tuple(Score(**score) for score in values["scores"])
        return Scores(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError("not a file of scores", where=str(path), hint="Evaluate again.") from error


def evaluate(
    recipe: Recipe,
    lock: Lock,
    merged: Path | str,
    *,
    models: Mapping[str, ModelPlace] | None = None,
    report: Report | None = None,
) -> Scores:
    """Score the merged model, the base model and every task's own checkpoint on every task.

    Args:
        recipe: Its `evaluation` names the data and the evaluator.
        lock: Pins the checkpoints that are scored.
        merged: Folder (or repository id) of the merged model.
        models: Score these instead, by name.
        report: Called with a line before each model.

    Raises:
        EvaluationError: If the recipe names no data, or a model or data set cannot be used.
    """
    spec = recipe.evaluation
    if spec is None:
        raise EvaluationError(
            "the recipe has no `evaluation`, so there is nothing to measure",
            where="recipe",
            hint="Name an evaluator and each task's examples under `evaluation`.",
        )
    evaluator = EVALUATORS[spec.evaluator]
    examples = load_evaluation_data(recipe)
    places = models or {**model_places(recipe, lock), MERGED: ModelPlace(str(merged))}
    scores: list[Score] = []
    for name, place in places.items():
        if report:
            report(f"scoring {name}")
        scores += _score_model(evaluator, name, place, spec, examples)
    data = {task: _describe(spec.tasks[task], examples[task]) for task in spec.tasks}
    return Scores(evaluator.metric, evaluator.pipeline_tag, tuple(scores), data, spec.digest)


def load_evaluation_data(recipe: Recipe) -> dict[str, Dataset]:
    """Return each task's examples; also called before a merge, so that a wrong name is known early.

    Raises:
        EvaluationError: If they cannot be loaded.
    """
    spec = recipe.evaluation
    return {task: load_examples(data, recipe.folder) for task, data in spec.tasks.items()} if spec else {}


def model_places(recipe: Recipe, lock: Lock) -> dict[str, ModelPlace]:
    """Return where the base model and every task's checkpoint can be loaded from."""
    places = {}
    for name, source in lock.sources.items():
        reference = recipe.reference(source.reference)
        if isinstance(reference, LocalFolder):
            places[name] = ModelPlace(str(reference.path))
        else:
            places[name] = ModelPlace(str(source.repo_id), source.commit)
    return places


def _score_model(
    evaluator: Evaluator, name: str, place: ModelPlace, spec: Evaluation, examples: Mapping[str, Dataset]
) -> list[Score]:
    try:
        with without_bars():
            model = evaluator.load(place)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise EvaluationError(
            f"the model cannot be loaded for {spec.evaluator} ({reason})",
            where=place.name,
            hint="Check the evaluator, and that config and processor files are there.",
        ) from error
    scores = []
    for task, data in spec.tasks.items():
        outcomes = evaluator.outcomes(model, examples[task], data, spec.batch_size)
        low, high = wilson_interval(sum(outcomes), len(outcomes))
        scores.append(Score(name, task, sum(outcomes) / len(outcomes), low, high, len(outcomes)))
    return scores


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, within [0, 1]."""
    from scipy.stats import binomtest

    interval = binomtest(round(successes), trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _describe(data: Data, examples: Dataset) -> dict[str, Any]:
    named = {"dataset": data.dataset, "config": data.config, "split": data.split, "revision": data.revision}
    return {key: value for key, value in named.items() if value is not None} | {"examples": len(examples)}


@dataclass(frozen=True)
class Classification:
    """Inputs to one label each.

    Attributes:
        pipeline_tag: The Hub's name for the kind of model.
        model_class, processor_class: Of transformers.
        input_column: Where the inputs are unless the recipe says otherwise.
        encode: Turns a processor and a list of inputs into what the model takes.
    """

    pipeline_tag: str
    model_class: str
    processor_class: str
    input_column: str
    encode: Callable[[Any, list[Any]], Mapping[str, Any]]
    metric: str = "accuracy"

    def load(self, place: ModelPlace) -> Any:
        import transformers

        model = _from_pretrained(getattr(transformers, self.model_class), place, use_safetensors=True).eval()
        return model, _from_pretrained(getattr(transformers, self.processor_class), place)

    def outcomes(self, model: Any, examples: Dataset, data: Data, batch_size: int) -> list[float]:
        network, processor = model
        column = data.input_column or self.input_column

        def encode(inputs: list[Any]) -> Mapping[str, Any]:
            return self.encode(processor, inputs)

        return _classification_outcomes(network, encode, examples, column, data.label_column, batch_size)


def _encode_images(processor: Any, images: list[Any]) -> Mapping[str, Any]:
    encoded: Mapping[str, Any] = processor(images=images, return_tensors="pt")
    return encoded


def _encode_texts(tokenizer: Any, texts: list[str]) -> Mapping[str, Any]:
    encoded: Mapping[str, Any] = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return encoded


#: By the name that recipes use; the recipe knows the same names.
EVALUATORS: Mapping[str, Evaluator] = {
    "image-classification": Classification(
        "image-classification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        "image",
        _encode_images,
    ),
    "text-classification": Classification(
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "text",
        _encode_texts,
    ),
}


def _from_pretrained(loader: Any, place: ModelPlace, **options: Any) -> Any:
    return loader.from_pretrained(place.name, revision=place.revision, trust_remote_code=False, **options)


def _classification_outcomes(
    network: Any,
    encode: Callable[[list[Any]], Mapping[str, Any]],
    examples: Dataset,
    input_column: str,
    label_column: str,
    batch_size: int,
) -> list[float]:
    import torch

    if input_column not in examples.column_names or label_column not in examples.column_names:
        raise EvaluationError(
            f"columns {input_column!r} and {label_column!r} are needed",
            where=f"data with {', '.join(examples.column_names)}",
            hint="Name them with input_column and label_column.",
        )
    to_class = _label_mapping(network.config, label_names(examples, label_column))
    outcomes: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            predicted = network(**encode(list(batch[input_column]))).logits.argmax(-1).tolist()
            wanted = [to_class(label) for label in batch[label_column]]
            outcomes += [float(p == w) for p, w in zip(predicted, wanted, strict=True)]
    return outcomes


def _label_mapping(config: Any, names: list[str] | None) -> Callable[[int | str], int]:
    """Return how to turn a label of the data into a class of the model: by name where both have names."""
    classes = {str(name): int(number) for name, number in config.label2id.items()}
    # What transformers writes where nobody named the classes: then only the numbers mean anything.
    unnamed = names is None or all(name.startswith("LABEL_") for name in classes)

    def to_class(label: int | str) -> int:
        name = names[label] if names is not None and isinstance(label, int) else str(label)
        if name in classes:
            return classes[name]
        if unnamed and isinstance(label, int) and 0 <= label < config.num_labels:
            return label
        raise EvaluationError(
            f"the model has no class {name!r}",
            where="label column",
            expected=f"one of {', '.join(list(classes)[:20])}",
        )

    return to_class
