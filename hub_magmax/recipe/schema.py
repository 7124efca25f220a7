"""A recipe: what to merge, for which preference, and where the result goes.

`load_recipe` reads the YAML that people write; everything that can be wrong in it without
looking at any checkpoint is found here, all at once, each problem with its line and key path.
"""

from __future__ import annotations

import math
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from hub_magmax import methods
from hub_magmax.evaluation.evaluators import Columns, Evaluator, brings_data, make_evaluator
from hub_magmax.files import digest
from hub_magmax.recipe.references import relative_path

#: What the recipe of a merged model is called.
RECIPE_NAME = "recipe.yaml"


#: Tasks, and whatever there is one of for each.
_MAX_TASKS = 255

#: What a comparison tries of a kind.
_MAX_TRIED = 255


#: Characters of a path or a name: what systems take at most.
_MAX_PLACE_LENGTH = 4096


#: What a recipe writes where a comparison shall choose.
AUTO = "auto"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip


def parse_size(value: Any) -> Any:
    """Return the bytes that "5GB", "500 MB", "2GiB" or a whole number mean; leave the rest as it is."""
    pattern = r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if not match:
        return value
    if match[2].upper() not in _UNITS:
        raise ValueError(f"unknown unit {match[2]!r}; use KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value  # YAML 1.1 reads 1e-5 as text; pydantic turns it into a number


def _scaling(value: Any) -> float | str:
    if value == AUTO:
        return AUTO
    try:
        number = float(_number(value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("should be a finite number, or auto")
    return number


def _language(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch("[a-z]{2,3}|multilingual|code", value):
        raise ValueError(
            f'{value!r} should be an ISO 639 code such as en, or multilingual (and "no" in quotes)'
        )
    return value


def _dataset_id(value: str) -> str:
    name = "[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
    if not re.fullmatch(f"{name}(/{name})?", value):
        raise ValueError(f"{value!r} should be a data set on the Hub, such as org/name")
    return value


def _relative(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    return relative_path(value, folder) if folder else value


#: A path, or a name on the Hub; absolute paths are stored relative to the recipe's folder.
Place = Annotated[str, Field(min_length=1, max_length=_MAX_PLACE_LENGTH), AfterValidator(_relative)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Scaling = Annotated[
    float | str,
    BeforeValidator(_scaling),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": AUTO}]}),
]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Language = Annotated[str, BeforeValidator(_language)]
DatasetId = Annotated[str, AfterValidator(_dataset_id)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Spec(BaseModel):
    """Part of a recipe: cannot be changed, and takes no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Spec):
    """One task: `model` is the checkpoint fine-tuned on it."""

    name: TaskName
    model: Place


class Named(Spec):
    """Something registered under a name, and its options; a bare name has none."""

    # Options depend on the name: they are checked against what is registered, not by this class.
    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _allow_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Method(Named):
    """A registered method, its scaling coefficient λ and its options.

    Without `scaling` the method's default counts. The name `auto`, or the scaling `auto`, leaves the
    choice to a comparison on labelled examples of the target.
    """

    name: str = "tunable_magmax"
    scaling: Scaling | None = None

    @property
    def is_auto(self) -> bool:
        return AUTO in (self.name, self.scaling)


class EvaluatorChoice(Named):
    """A registered evaluator and its options."""

    name: str = "image-classification"


class Data(Spec):
    """Examples as `datasets` names them: a Hub id, or a local folder or file, and a split."""

    dataset: Place
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    input_column: str | None = None
    label_column: str = "label"

    @property
    def columns(self) -> Columns:
        return Columns(self.input_column, self.label_column)


TaskData = Annotated[dict[TaskName, Data], Field(max_length=_MAX_TASKS)]


class Schedule(Spec):
    """Weights that grow or fall over the order of the tasks; a ratio of 1 is uniform."""

    ratio: Annotated[Number, Field(gt=0)]


class Power(Spec):
    """Weights in proportion to a power of the task's number; an exponent of 0 is uniform."""

    exponent: Number


def _uniform_is_none(value: Any) -> Any:
    if isinstance(value, str) and value != "uniform":
        raise ValueError(f"{value!r} should be uniform, or a weight for every task that should get one")
    return None if value == "uniform" else value


Share = Annotated[Number, Field(gt=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
TaskWeights = Annotated[dict[TaskName, Annotated[Number, Field(ge=0)]], Field(max_length=_MAX_TASKS)]

#: Weights by task; None is what `uniform` means.
Prior = Annotated[
    TaskWeights | None,
    BeforeValidator(_uniform_is_none),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "uniform"},
                {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            ]
        }
    ),
]


class Holdout(Spec):
    """Keep a share of the labelled target sample back, and test on it whether the estimate helps.

    Where the model merged with the estimate scores lower there than the one merged with the prior,
    the prior is used; `if_worse: estimate` keeps the estimate and only reports.
    """

    share: Share = 0.3
    if_worse: Literal["prior", "estimate"] = "prior"

    @model_validator(mode="before")
    @classmethod
    def _allow_bare_share(cls, value: Any) -> Any:
        return value if isinstance(value, (dict, Holdout)) else {"share": value}


class Estimate(Spec):
    """What every preference that is estimated from a target sample can ask for.

    The weights are `(1 - strength) * estimate + strength * prior`, and `towards` names the prior. The
    default strength is 0: the published estimates, and the shares that were counted, stay as they are.
    """

    target: Data
    towards: Prior = None
    strength: Annotated[Number, Field(ge=0, le=1)] = 0.0
    holdout: Holdout | None = None


class Labels(Estimate):
    """Estimate the preference from labelled target examples; `classes` names each task's labels."""

    classes: Annotated[dict[TaskName, tuple[int | str, ...]], Field(max_length=_MAX_TASKS)]


class Comparison(Estimate):
    """Estimate the preference by comparing the target sample with each task's training data.

    `features` says whose: those of each task's own checkpoint, or of the base model alone, which is
    one model to run and not one per task. `samples` is how many examples are drawn from each data set
    at most, and `temperature` what a distance is divided by before it becomes the similarity
    exp(-distance / temperature).
    """

    train: TaskData
    features: Literal["tasks", "base_model"] = "tasks"
    samples: Annotated[int, Field(ge=5)] = 500
    temperature: Positive = 0.01


class Mixture(Comparison):
    """Compare with all tasks together, or with each alone.

    `fit: mixture` finds the weights whose mixture of training data is nearest to the target sample, in
    features whose scatter within tasks was made equal in all directions unless `whiten` is false.
    `fit: separate` measures the distance to each task alone and weighs by similarity, as published.
    """

    fit: Literal["mixture", "separate"] = "mixture"
    whiten: bool = True


class Transport(Mixture):
    """Compare by entropic optimal transport; the cost is the squared distance divided by its maximum."""

    # Below 0.001 the iterations do not converge in any useful time.
    regularisation: Annotated[Number, Field(ge=0.001)] = 0.1


class Mmd(Mixture):
    """Compare by the maximum mean discrepancy; `bandwidth` is in units of the median squared distance."""

    bandwidth: Positive = 1.0


class Cosine(Comparison):
    """Compare the directions of the centroids."""

    temperature: Positive = 0.02


class Search(Estimate):
    """Look for the weights whose merged model does best on the labelled target sample.

    `budget` is how many weights are tried, each of them a merge in memory and an evaluation.
    """

    budget: Annotated[int, Field(ge=2)] = 60


class Preference(Spec):
    """How much each task matters: exactly one kind."""

    weights: TaskWeights | None = None
    geometric: Schedule | None = None
    linear: Schedule | None = None
    power: Power | None = None
    labels: Labels | None = None
    transport: Transport | None = None
    mmd: Mmd | None = None
    cosine: Cosine | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.spec is None:
            raise ValueError(f"should hold exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def spec(self) -> Any:
        return getattr(self, self.kind)

    @property
    def is_estimated(self) -> bool:
        """Whether the weights come from data, so that a lock holds what cannot be computed again."""
        return isinstance(self.spec, Estimate)


class TensorRule(Spec):
    """Tensors whose names match the glob come unchanged from one source, or are left out."""

    match: Annotated[str, Field(min_length=1, max_length=_MAX_PLACE_LENGTH)]
    take: Annotated[str, Field(min_length=1)]

    def covers(self, tensor: str) -> bool:
        return fnmatchcase(tensor, self.match)


#: Every built-in method as it is, and both ways to select.
_TRIED = (
    *(Method(name=name) for name in methods.registry.BUILT_IN),
    Method.model_validate({"name": "tunable_magmax", "selection": "top-n"}),
)


class Compare(Spec):
    """What a comparison tries, what it chooses by, and what it reports on.

    `tune` is a labelled sample of the target, by default the one that the preference is estimated from;
    `report` is other examples of the target, which no choice has seen. Every method is tried with every
    scaling coefficient, under the recipe's preference, a uniform one, and those of `preferences`.
    """

    tune: Data | None = None
    report: Data | None = None
    methods: Annotated[tuple[Method, ...], Field(min_length=1, max_length=_MAX_TRIED)] = _TRIED
    scaling: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=_MAX_TRIED)] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0,
    )  # fmt: skip
    preferences: Annotated[dict[TaskName, Preference], Field(max_length=_MAX_TRIED)] = {}


#: Whole numbers of two to eight bits.
Bits = Annotated[str, Field(pattern=r"^int[2-8]$")]


class Evaluation(Spec):
    """Per task, the examples that the card reports on.

    `quantized` scores the merged model again on weights rounded to so many bits. `guard` names examples on
    which the merged model may score at most `margin` less than the base model.
    """

    evaluator: EvaluatorChoice = EvaluatorChoice()
    tasks: TaskData
    batch_size: Annotated[int, Field(ge=1)] = 64
    quantized: tuple[Bits, ...] = ()
    guard: TaskData = {}
    margin: Annotated[Number, Field(ge=0)] = 0.01

    @property
    def digest(self) -> str:
        """Digest of what decides the scores."""
        return digest(self.model_dump(mode="json", exclude={"margin"}))

    @property
    def data(self) -> dict[str, Data]:
        """Return the examples of tasks and guards by name."""
        return self.tasks | self.guard

    @property
    def brings_data(self) -> bool:
        """Whether the evaluator has examples of its own, and `dataset` is the name it knows them by."""
        return brings_data(self.make_evaluator())

    def make_evaluator(self) -> Evaluator:
        return make_evaluator(self.evaluator.name, self.evaluator.options)


class Sweep(Spec):
    """Which preferences `hub-magmax sweep` tries.

    `adaptive` looks for the front, `grid` is the finest lattice of at most `budget` points, and `schedule`
    goes from the first task to the last by geometric weights.
    """

    walk: Literal["adaptive", "grid", "schedule"] = "adaptive"
    budget: Annotated[int, Field(ge=2, le=10_000)] = 60


class Output(Spec):
    """Where the merged model goes, and in which form.

    `format: adapter` writes LoRA adapters merged by a linear method as one adapter, by default whole weights.
    `memory` is what a process of the merge may take at most; by default as much as is fastest.
    Without `keep` it goes to the Hub file by file while it is merged, and no folder is made. `files_from` is
    `base_model` or the task whose config, tokenizer and processor are copied. `license`, `language` and
    `datasets` (what the sources were trained on) are for the card.
    """

    path: Place = "merged"
    format: Literal["weights", "adapter"] | None = None
    dtype: Literal["auto", "float64", "float32", "float16", "bfloat16"] = "auto"
    shard_size: Size = 5 * 10**9
    memory: Size | None = None
    files_from: str = "base_model"
    push_to_hub: str | None = None
    keep: bool = True
    private: bool = False
    license: str | None = None
    language: tuple[Language, ...] | None = None
    datasets: tuple[DatasetId, ...] | None = None

    @property
    def is_adapter(self) -> bool:
        return self.format == "adapter"


class Recipe(Spec):
    """A checked recipe. `folder` is where its relative paths start.

    `adapters` says what a LoRA adapter is added to: the base model (`each`, the default), or the checkpoint
    of the task before it (`sequence`). `token_rows` are globs over the tensors with a row per token, which
    are matched by token where the vocabularies of the checkpoints differ.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    base_model: Place
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=_MAX_TASKS)]
    method: Method = Method()
    preference: Preference | None = None
    tensors: tuple[TensorRule, ...] = ()
    adapters: Literal["each", "sequence"] | None = None
    token_rows: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    evaluation: Evaluation | None = None
    compare: Compare | None = None
    sweep: Sweep | None = None
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def output_path(self) -> Path:
        return Path(os.path.normpath(self.folder / self.output.path))

    @property
    def digest(self) -> str:
        return digest(self.to_dict())

    @property
    def tuning_data(self) -> Data | None:
        """The labelled sample of the target by which a comparison chooses."""
        if self.compare is not None and self.compare.tune is not None:
            return self.compare.tune
        return self.preference.spec.target if self.preference and self.preference.is_estimated else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `parse_recipe` turns into an equal recipe."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def updated(self, **changes: Any) -> Recipe:
        """Return a checked copy with top-level keys replaced, e.g. `updated(method="average")`."""
        from hub_magmax.recipe.loading import parse_recipe

        return parse_recipe(self.to_dict() | changes, folder=self.folder)
