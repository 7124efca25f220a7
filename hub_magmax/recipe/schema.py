"""A recipe: what to merge, for which preference, and where the result goes.

`load_recipe` reads the YAML that people write; everything that can be wrong in it without
looking at any checkpoint is found here, all at once, each problem with its line and key path.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
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
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from hub_magmax import methods
from hub_magmax.errors import HubMagmaxError, RecipeError
from hub_magmax.evaluation.evaluators import Columns, Evaluator, brings_data, get_evaluator, make_evaluator
from hub_magmax.files import digest
from hub_magmax.recipe.references import HubModel, LocalFolder, parse_reference, relative_path
from hub_magmax.registry import check_options
from hub_magmax.text import holds_token

#: What the recipe of a merged model is called.
RECIPE_NAME = "recipe.yaml"

#: A recipe is written by hand; anything larger is not one.
MAX_RECIPE_BYTES = 1_000_000

#: Levels of lists and mappings; recipes need six.
_MAX_DEPTH = 30

#: Values, keys included. With 255 tasks and data for each it takes some ten thousand, and for the labels of
#: the largest data sets twenty thousand more; every thousand cost a tenth of a second.
_MAX_VALUES = 50_000

#: Tasks, and whatever there is one of for each.
_MAX_TASKS = 255

#: What a comparison tries of a kind.
_MAX_TRIED = 255

#: Characters of a number.
_MAX_NUMBER_LENGTH = 100

#: Characters of a path or a name: what systems take at most.
_MAX_PLACE_LENGTH = 4096

#: A key path, and what is wrong there.
KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]

#: Problems listed in one message; whoever sees more has made one mistake many times.
_SHOWN_PROBLEMS = 20

#: Characters of a problem: some of them quote a name that may be of any length.
_SHOWN_CHARACTERS = 500

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

    def reference(self, written: str) -> LocalFolder | HubModel:
        return parse_reference(written, self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `parse_recipe` turns into an equal recipe."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def updated(self, **changes: Any) -> Recipe:
        """Return a checked copy with top-level keys replaced, e.g. `updated(method="average")`."""
        return parse_recipe(self.to_dict() | changes, folder=self.folder)


def load_recipe(path: str | Path, *, folder: Path | None = None) -> Recipe:
    """Read and check the recipe in the YAML file `path`.

    Args:
        path: A YAML file.
        folder: Where its relative paths start; the file's own folder by default.

    Raises:
        RecipeError: With every problem found, each at its line and key path.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"larger than {MAX_RECIPE_BYTES:,} bytes, which no recipe is", where=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(
            f"the recipe cannot be read ({reason})", where=str(path), hint="Give the path of a YAML recipe."
        ) from error
    values, lines = _read_yaml(text, str(path))
    return parse_recipe(values, folder=folder or path.parent, where=str(path), lines=lines)


def parse_recipe(
    values: Any,
    *,
    folder: Path | None = None,
    where: str = "recipe",
    lines: Mapping[KeyPath, int] | None = None,
) -> Recipe:
    """Check plain values and return the recipe they describe.

    Args:
        values: What YAML or JSON gave.
        folder: Where relative paths start; the current folder by default.
        where: What to call the recipe in messages.
        lines: Line number by key path, where known.

    Raises:
        RecipeError: With every problem found.
    """
    if not isinstance(values, dict):
        raise RecipeError("not a mapping of keys to values", where=where, expected="base_model:, tasks:, ...")
    problems: list[Problem] = []
    recipe = None
    folder = (folder or Path()).absolute()
    try:
        recipe = Recipe.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        problems += _explain(error, Recipe)
        recipe = _without_unknown_keys(values, error)
    problems += _option_problems(values)
    problems += _token_problems(values, ())
    if recipe is not None:
        recipe._folder = folder
        problems += _name_problems(recipe)
    if problems or recipe is None:
        raise _all_problems(problems, where, lines or {})
    return recipe


def _without_unknown_keys(values: dict[str, Any], error: ValidationError) -> Recipe | None:
    """Return the recipe without its unknown keys, so that what else is wrong is found in the same run."""
    rest = copy.deepcopy(values)
    for entry in error.errors():
        if entry["type"] == "extra_forbidden":
            *parents, key = entry["loc"]
            holder: Any = rest
            for part in parents:
                holder = holder[part]
            del holder[key]
    try:
        return Recipe.model_validate(rest)
    except ValidationError:
        return None


def _all_problems(problems: list[Problem], where: str, lines: Mapping[KeyPath, int]) -> RecipeError:
    def place(path: KeyPath) -> str:
        key = ".".join(_shorten(str(part)).strip("'") for part in path) or "(top level)"
        known = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
        return f"line {known}, {key}" if known else key

    texts = [
        text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..." for _, text in problems
    ]
    found = [f"{place(path)}: {text}" for (path, _), text in zip(problems, texts, strict=True)]
    if len(found) == 1:
        return RecipeError(texts[0], where=f"{where}, {place(problems[0][0])}")
    shown = [*found[:_SHOWN_PROBLEMS], f"and {len(found) - _SHOWN_PROBLEMS} more"]
    listed = found if len(found) <= _SHOWN_PROBLEMS + 1 else shown
    return RecipeError(f"{len(found)} problems\n  - " + "\n  - ".join(listed), where=where)


def _explain(error: ValidationError, model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[Problem]:
    for entry in error.errors():
        path = tuple(entry["loc"])
        if entry["type"] == "extra_forbidden":
            known = _known_keys(model, path[:-1])
            nearest = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(known)}"
            yield prefix + path, f"unknown key {_shorten(path[-1])}; {hint}"
        elif entry["type"] == "missing":
            yield prefix + path, f"the key {path[-1]!r} is required"
        else:
            text = entry["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
            yield prefix + path, f"{_shorten(entry['input'])} {text}" if text.startswith("should") else text


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the keys allowed at `path`, following fields to the models they hold."""
    for part in path:
        inner = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        found = next(_models_in(inner.annotation), None) if inner else None
        model = found or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _token_problems(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Return where an access token is written: a recipe is published with its model."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _token_problems(key, path)
            yield from _token_problems(item, (*path, key))
    elif isinstance(value, str) and holds_token(value):
        yield (
            path,
            "this holds an access token or a password, and recipes are published: name the model as "
            "org/model, and give the token by `hf auth login` or HF_TOKEN",
        )


def _option_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """Return what is wrong with the names and options of methods and the evaluator."""
    method = values.get("method", {})
    if method != AUTO and not (isinstance(method, dict) and method.get("name") == AUTO):
        yield from _named_problems(method, ("method",), Method, methods.get_method)
    evaluation, compare = (values.get(key) for key in ("evaluation", "compare"))
    if isinstance(evaluation, dict):
        found = evaluation.get("evaluator", {})
        yield from _named_problems(found, ("evaluation", "evaluator"), EvaluatorChoice, get_evaluator)
    if isinstance(compare, dict) and isinstance(compare.get("methods"), list):
        for index, tried in enumerate(compare["methods"][:_MAX_TRIED]):
            yield from _named_problems(tried, ("compare", "methods", index), Method, methods.get_method)


def _named_problems(
    value: Any,
    prefix: KeyPath,
    model: type[Named],
    get: Callable[[str], Any],
) -> Iterator[Problem]:
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or not isinstance(values.get("name", ""), str):
        return  # already reported by the schema
    try:
        entry = get(values.get("name", model.model_fields["name"].default))
        check_options(entry, {k: v for k, v in values.items() if k not in model.model_fields})
    except RecipeError as error:
        yield (*prefix, "name"), str(error).rstrip(".")
    except ValidationError as error:
        options = [*model.model_fields, *entry.options]
        for path, text in _explain(error, model, prefix):
            nearest = difflib.get_close_matches(str(path[-1]), options, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(options)}"
            unknown = text.startswith("unknown key")
            yield path, f"{entry.name} has no option {_shorten(path[-1])}; {hint}" if unknown else text


def _name_problems(recipe: Recipe) -> Iterator[Problem]:
    names = recipe.task_names
    for index, name in enumerate(names):
        if name in names[:index] or name == "base_model":
            yield (
                ("tasks", index, "name"),
                f"the name {name!r} is used twice"
                if name != "base_model"
                else ("'base_model' is taken; choose another name"),
            )
    references: dict[KeyPath, str] = {("base_model",): recipe.base_model}
    references |= {("tasks", i, "model"): task.model for i, task in enumerate(recipe.tasks)}
    for path, written in references.items():
        try:
            recipe.reference(written)
        except HubMagmaxError as error:
            yield path, str(error).rstrip(".")
    for path, name in _used_names(recipe):
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the tasks are {', '.join(names)}"
            yield path, f"there is no task {_shorten(name)}; {hint}"
    yield from _weight_problems(recipe)
    yield from _comparison_problems(recipe)
    yield from _output_problems(recipe)
    yield from _adapter_problems(recipe)
    yield from _guard_problems(recipe)


def _guard_problems(recipe: Recipe) -> Iterator[Problem]:
    for name in recipe.evaluation.guard if recipe.evaluation else ():
        if name in recipe.task_names:
            yield ("evaluation", "guard", name), "this is the name of a task; choose another one"


def _preferences(recipe: Recipe) -> Iterator[tuple[KeyPath, Preference]]:
    """Yield every preference in the recipe with its key path."""
    if recipe.preference is not None:
        yield ("preference",), recipe.preference
    if recipe.compare is not None:
        for name, preference in recipe.compare.preferences.items():
            yield ("compare", "preferences", name), preference


def _names_in(preference: Preference, path: KeyPath) -> Iterator[Problem]:
    if preference.weights is not None:
        yield from (((*path, "weights", name), name) for name in preference.weights)
    elif preference.is_estimated:
        for key in ("classes", "train", "towards"):
            names = getattr(preference.spec, key, None) or ()
            yield from (((*path, preference.kind, key, name), name) for name in names)


def _used_names(recipe: Recipe) -> Iterator[Problem]:
    for path, preference in _preferences(recipe):
        yield from _names_in(preference, path)
    if recipe.evaluation:
        yield from ((("evaluation", "tasks", name), name) for name in recipe.evaluation.tasks)
    if recipe.output.files_from != "base_model":
        yield ("output", "files_from"), recipe.output.files_from
    for index, rule in enumerate(recipe.tensors):
        if rule.take not in ("base_model", "nothing"):
            yield ("tensors", index, "take"), rule.take


def _weight_problems(recipe: Recipe) -> Iterator[Problem]:
    for prefix, preference in _preferences(recipe):
        written: dict[KeyPath, Mapping[str, float] | None] = {(*prefix, "weights"): preference.weights}
        if preference.is_estimated:
            written[*prefix, preference.kind, "towards"] = preference.spec.towards
        for path, weights in written.items():
            if weights is not None and abs(math.fsum(weights.values()) - 1) > 1e-6:
                yield path, _wrong_sum(weights)
        if isinstance(preference.spec, Comparison):
            missing = [name for name in recipe.task_names if name not in preference.spec.train]
            if missing:
                yield (*prefix, preference.kind, "train"), f"there is no data for {', '.join(missing)}"


def _wrong_sum(weights: Mapping[str, float]) -> str:
    total = math.fsum(weights.values())
    shares = ", ".join(f"{name}: {value / total:.4g}" for name, value in weights.items() if total)
    hint = f"; in the same proportions: {{{shares}}}" if shares else ""
    return f"the weights sum to {total:.6g}, expected 1{hint}"


def _comparison_problems(recipe: Recipe) -> Iterator[Problem]:
    """Return what keeps a comparison from choosing, where the recipe leaves a choice to one."""
    if recipe.method.is_auto and recipe.tuning_data is None:
        key = "name" if recipe.method.name == AUTO else "scaling"
        yield ("method", key), "there is no labelled sample of the target to choose by: compare: {tune: ...}"
    searched = [path for path, preference in _preferences(recipe) if preference.search is not None]
    if searched and recipe.method.name == AUTO:
        yield searched[0], "a search needs a method; name one in place of auto"
    for index, method in enumerate(recipe.compare.methods if recipe.compare else ()):
        if method.is_auto:
            yield ("compare", "methods", index), "auto is no method to try"


def _output_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.output.keep:
        return
    if recipe.output.push_to_hub is None:
        yield ("output", "keep"), "without a folder the model must go to the Hub: name output.push_to_hub"
    if recipe.evaluation is not None:
        hint = "set it to true, or leave `evaluation` out"
        yield ("output", "keep"), f"scoring loads the merged model from its folder, so keep it: {hint}"


def _adapter_problems(recipe: Recipe) -> Iterator[Problem]:
    """Return what cannot be written as an adapter, where the recipe asks for one."""
    if not recipe.output.is_adapter:
        return
    if recipe.token_rows:
        yield ("token_rows",), "an adapter has no rows of tokens: leave this out, or output.format: adapter"
    used: dict[KeyPath, str] = {("method", "name"): recipe.method.name}
    if recipe.compare is not None or recipe.method.name == AUTO:
        tried = (recipe.compare or Compare()).methods
        used |= {("compare", "methods", index): method.name for index, method in enumerate(tried)}
    for path, name in used.items():
        if name != AUTO and not _is_linear(name):
            yield (
                path,
                f"{name} is not linear, so what it gives is no adapter; linear are "
                f"{', '.join(methods.linear_names())}, and output.format: weights takes every method",
            )


def _is_linear(name: str) -> bool:
    try:
        return methods.get_method(name).form == "linear"
    except RecipeError:
        return True  # reported with the name


class _Loader(yaml.SafeLoader):
    """Reads plain values: each part of the text is looked at before anything is made of it, and once."""

    depth = num_values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.num_values += 1
        self.depth += 1  # PyYAML's time grows with the square of the depth
        for too_much, what in (
            (self.depth > _MAX_DEPTH, "nested too deeply"),
            (self.num_values > _MAX_VALUES, f"more than {_MAX_VALUES:,} values, which no recipe has"),
        ):
            if too_much:
                raise RecipeError(what, where=f"line {event.start_mark.line + 1}")
        # Shared nodes can make a small file explode; a tag can make any value another kind.
        for kind, what in (("anchor", "anchors and aliases"), ("tag", "not valid YAML for a recipe: tags")):
            if getattr(event, kind, None):
                raise RecipeError(
                    f"{what} are not allowed",
                    where=f"line {event.start_mark.line + 1}",
                    hint="Write the value out; put text that starts with such a sign in quotes.",
                )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read_yaml(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the values in `text` and the line on which each key path starts."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _note_lines(node, (), lines)
        return None if node is None else loader.construct_document(node), lines
    except RecipeError as error:
        place = f"{where}, {error.where}"
        raise RecipeError(error.what, where=place, expected=error.expected, hint=error.hint) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise RecipeError(
            f"not valid YAML: {problem}", where=place, hint="Check the indentation there."
        ) from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=where) from error
    except ValueError as error:  # a timestamp or an integer that YAML recognises and cannot build
        raise RecipeError(
            f"a value that YAML cannot read: {error}", where=where, hint="Put it in quotes."
        ) from error


def _note_lines(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key that is not a name", where=f"line {line}", expected="key: value")
            _check_scalar(key)
            inner = (*path, key.value)
            if inner in lines:
                raise RecipeError(
                    f"the key {_shorten(key.value)} appears twice, first on line {lines[inner]}",
                    where=f"line {line}",
                    hint="Keep one of them.",
                )
            lines[inner] = line
            _note_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*path, index] = value.start_mark.line + 1
            _note_lines(value, (*path, index), lines)


def _check_scalar(node: yaml.ScalarNode) -> None:
    where = f"line {node.start_mark.line + 1}"
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise RecipeError("text that holds half a character", where=where) from error
    # Hours pass before YAML has built a number of a million digits, and Python does not print one of 5,000.
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_NUMBER_LENGTH:
        raise RecipeError(
            f"a number of {len(node.value):,} characters",
            where=where,
            expected=f"at most {_MAX_NUMBER_LENGTH}",
            hint="Put it in quotes if it is text.",
        )


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return Recipe.model_json_schema(by_alias=True)
