"""Schema of a recipe: models, method, preference, evaluation, output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from hub_magmax import methods
from hub_magmax.errors import KeyPath
from hub_magmax.files import digest
from hub_magmax.recipe.blocks import MAX_BLOCKS
from hub_magmax.recipe.examples import Evaluation, Routing, Statistics
from hub_magmax.recipe.layers import LayerSlice
from hub_magmax.recipe.lockfile import own_base_name
from hub_magmax.recipe.model_names import expanded
from hub_magmax.recipe.norms import Norms
from hub_magmax.recipe.preferences import Preference
from hub_magmax.recipe.tensor_rules import TensorRule
from hub_magmax.recipe.tokenizer import Tokenizer
from hub_magmax.recipe.training import Training
from hub_magmax.recipe.values import (
    AUTO,
    MAX_TASKS,
    Bits,
    Data,
    DatasetId,
    DeviceName,
    Language,
    Named,
    Number,
    Place,
    Positive,
    Repository,
    Scaling,
    Size,
    Spec,
    TaskName,
    num_bits,
)
from hub_magmax.registry import METHODS

#: File name of the recipe of a merged model.
RECIPE_NAME = "recipe.yaml"


#: Scaling coefficients that a comparison tries where it lists none.
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)

#: Most methods, scaling coefficients or preferences of a comparison.
MAX_TRIED = 255


class Task(Spec):
    """One task: `model` is the checkpoint fine-tuned on it, and `base` what that was fine-tuned from.

    Without `base` it is the recipe's base model. `statistics` is a folder of statistics of the task's data,
    for the methods that need them; what is missing there is made of the recipe's `statistics`.
    """

    name: TaskName
    model: Place
    base: Place | None = None
    statistics: Place | None = None


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


class Correction(Spec):
    """Linear map of the merged model's representation towards the tasks' own, folded into its head.

    `ridge` draws the map of each task towards a rotation. A bare name has the default.
    """

    name: Literal["react"] = "react"
    ridge: Positive = 0.1

    @model_validator(mode="before")
    @classmethod
    def _allow_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _tried() -> tuple[Method, ...]:
    """Return the built-in methods that a comparison tries by default, each with its options for that."""
    return tuple(
        Method.model_validate({"name": name, **options})
        for name in METHODS.built_in
        for options in methods.get_method(name).in_comparison
    )


def _once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("the same seed twice is one draw; write each seed once")
    return seeds


#: Seeds that a comparison or a sweep averages over, for methods that draw; none: the recipe's own.
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(max_length=100), AfterValidator(_once)
]


class Compare(Spec):
    """Candidates of a comparison, the examples that choose, and the examples that are reported.

    `tune` is a labelled sample of the target, by default the one that the preference is estimated from;
    `report` is other examples of the target, which no choice has seen. Every method is tried with every
    scaling coefficient, under the recipe's preference, a uniform one, and those of `preferences`. Without
    `methods` they are all built-in ones; without `scaling` the coefficients are eight, and each method's own.
    `quantized` scores all models on weights rounded to so few bits.
    """

    tune: Data | None = None
    report: Data | None = None
    methods: Annotated[tuple[Method, ...], Field(min_length=1, max_length=MAX_TRIED)] | None = None
    scaling: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MAX_TRIED)] | None = None
    preferences: dict[TaskName, Preference] = Field(default_factory=dict, max_length=MAX_TRIED)
    seeds: Seeds | None = None
    quantized: Bits | None = None

    @property
    def bits(self) -> int | None:
        """Bits of the weights that are scored; None where they are not rounded."""
        return None if self.quantized is None else num_bits(self.quantized)

    @property
    def tried_methods(self) -> tuple[Method, ...]:
        """The methods that are listed, or every built-in one with its options for comparisons."""
        return _tried() if self.methods is None else self.methods

    @property
    def tried_scaling(self) -> tuple[float, ...]:
        """The scaling coefficients that are listed, or the usual ones."""
        return SCALINGS if self.scaling is None else self.scaling


class Sweep(Spec):
    """Preferences that `hub-magmax sweep` tries.

    `adaptive` looks for the front, `grid` is the finest lattice of at most `budget` points, and `schedule`
    goes from the first task to the last by geometric weights.
    """

    walk: Literal["adaptive", "grid", "schedule"] = "adaptive"
    budget: Annotated[int, Field(ge=2, le=10_000)] = 60
    seeds: Seeds | None = None

    def least_budget(self, num_tasks: int) -> int:
        """Return the least budget that tells so many tasks apart: each alone, and for `adaptive` one more."""
        return {"adaptive": num_tasks + 1, "grid": num_tasks, "schedule": 2}[self.walk]


class Output(Spec):
    """Destination and form of the merged model.

    `format: adapter` writes LoRA adapters merged by a linear method, or one of whole matrices, as one, and
    `selection` which task each element is from. `rank` is the most that an adapter's layers have, by default
    the sum of the tasks'. `memory` is what a process may take at most, `device` where torch merges. Without
    `keep` the model goes to the Hub, and no folder stays. `files_from` is `base_model` or the task whose
    config, tokenizer and processor are copied. `license`, `language` and `datasets` are for the card.
    """

    path: Place = "merged"
    format: Literal["weights", "adapter", "selection"] | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["auto", "float64", "float32", "float16", "bfloat16"] = "auto"
    shard_size: Size = 5 * 10**9
    memory: Size | None = None
    device: DeviceName | None = None
    files_from: str = "base_model"
    push_to_hub: Repository | None = None
    keep: bool = True
    private: bool = False
    license: str | None = None
    language: tuple[Language, ...] | None = None
    datasets: tuple[DatasetId, ...] | None = None

    @property
    def is_adapter(self) -> bool:
        return self.format == "adapter"

    @property
    def is_selection(self) -> bool:
        return self.format == "selection"


class Site(Spec):
    """Values for one site in place of the recipe's; `recipe/sites.py` makes a recipe of them."""

    preference: Any = None
    method: Any = None
    evaluation: Any = None
    output: dict[str, Any] | None = None


class Recipe(Spec):
    """A checked recipe. `folder` is where its relative paths start.

    `norms` scales the task vectors, of the model or of each tensor, to their mean length, or clips them.
    `correction` maps the merged model's representation towards those of the tasks' own models.
    `adapters` says what a LoRA adapter is added to: the base model (`each`, the default), or the checkpoint
    of the task before it (`sequence`). `layers` says of which blocks of which sources the output's blocks are
    made; by default they are the base model's. `token_rows` are globs over the tensors with a row per token,
    which are matched by token where the vocabularies of the checkpoints differ; `tokenizer` says whose
    vocabulary the merged model has. `training` says how `hub-magmax finetune` makes the tasks' checkpoints;
    a merge depends on their bytes alone. `trusted_links` are folders
    that links of checkpoints may lead to, such as the cache of DVC. `sites` are merged from one read of the
    checkpoints, each with the values that it has in place of the recipe's.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    base_model: Place
    tasks: Annotated[tuple[Task, ...], Field(max_length=MAX_TASKS)] = ()
    method: Method = Method()
    preference: Preference | None = None
    norms: Norms | None = None
    correction: Correction | None = None
    tensors: tuple[TensorRule, ...] = ()
    adapters: Literal["each", "sequence"] | None = None
    layers: Annotated[tuple[LayerSlice, ...], Field(min_length=1, max_length=MAX_BLOCKS)] | None = None
    token_rows: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    tokenizer: Tokenizer | None = None
    trusted_links: tuple[Place, ...] | None = None
    statistics: Statistics | None = None
    training: Training | None = None
    evaluation: Evaluation | None = None
    routing: Routing | None = None
    compare: Compare | None = None
    sweep: Sweep | None = None
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sites: Annotated[dict[TaskName, Site], Field(min_length=1, max_length=1000)] | None = None

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="before")
    @classmethod
    def _order_values_by_task(cls, values: Any) -> Any:
        return in_task_order(values) if isinstance(values, dict) else values

    @property
    def needs_folder(self) -> bool:
        """Whether the merged model has to be whole on this machine: it is kept there, or scored."""
        return self.output.keep or self.evaluation is not None

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def matches_tokens(self) -> bool:
        """Whether rows of tokens are matched between the checkpoints."""
        return bool(self.token_rows) or (self.tokenizer is not None and self.tokenizer.is_of_tokens)

    @property
    def models(self) -> dict[KeyPath, str]:
        """All models that the recipe names, by their keys; bases of tasks come last."""
        found: dict[KeyPath, str] = {("base_model",): self.base_model}
        for key in ("model", "base"):
            named = ((number, getattr(task, key)) for number, task in enumerate(self.tasks))
            found |= {("tasks", number, key): model for number, model in named if model is not None}
        return found

    @property
    def places(self) -> dict[KeyPath, str]:
        """All that the recipe reads but data: the models, and folders of statistics."""
        named = ((number, task.statistics) for number, task in enumerate(self.tasks))
        return self.models | {("tasks", number, "statistics"): place for number, place in named if place}

    @property
    def written_sources(self) -> dict[str, str]:
        """All models that the recipe names, by their names in a lock; bases of tasks come last."""
        bases = {own_base_name(task.name): task.base for task in self.tasks if task.base is not None}
        return {"base_model": self.base_model, **{task.name: task.model for task in self.tasks}, **bases}

    @property
    def output_path(self) -> Path:
        return Path(os.path.normpath(self.folder / self.output.path))

    @property
    def trusted_roots(self) -> tuple[Path, ...]:
        """The folders that links of checkpoints may lead to, absolute."""
        return tuple((self.folder / expanded(root)).resolve() for root in self.trusted_links or ())

    @property
    def digest(self) -> str:
        return digest(self.to_dict())

    @property
    def tuning_data(self) -> Data | None:
        """The labelled sample of the target by which a comparison chooses."""
        if self.compare is not None and self.compare.tune is not None:
            return self.compare.tune
        return self.preference.spec.target if self.preference and self.preference.is_estimated else None

    @property
    def is_measured(self) -> bool:
        """Whether models are merged and scored to find the preference or the method."""
        return self.method.is_auto or bool(self.preference and self.preference.is_estimated)

    @property
    def portable(self) -> Recipe:
        """The recipe as it lies beside a merged model: without device and links, which are a machine's."""
        output = self.output.model_copy(update={"device": None})
        return self.model_copy(update={"output": output, "trusted_links": None})

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return plain values that `parse_recipe` turns into an equal recipe, with defaults or without."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=not defaults)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


#: Parts of a recipe that hold options of methods: keys and, for a list, 0.
_PLACES: Sequence[KeyPath] = (("method",), ("compare", "methods", 0), ("tensors", 0, "options"))


def in_task_order(values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values of a recipe whose options by task are in the order of its tasks.

    So the values of such an option, in a lock too, are those of the tasks in order.
    """
    tasks = values.get("tasks")
    names = [task.get("name") for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    for place in _PLACES:
        values = _changed(values, place, names)
    return values


def _changed(value: Any, place: KeyPath, names: Sequence[Any]) -> Any:
    """Return a value in which the options at a place are ordered."""
    if isinstance(value, list) and place and place[0] == 0:
        return [_changed(item, place[1:], names) for item in value]
    if not isinstance(value, dict):
        return value
    if not place:
        return {key: _ordered(option, names) for key, option in value.items()}
    if place[0] not in value:
        return value
    return {**value, place[0]: _changed(value[place[0]], place[1:], names)}


def _ordered(option: Any, names: Sequence[Any]) -> Any:
    """Return an option, if it has a value for each task in the order of these."""
    if not isinstance(option, dict) or {*option} != {*names}:
        return option
    return {name: option[name] for name in names}
