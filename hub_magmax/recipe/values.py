"""Types of a recipe's values: sizes, numbers, names, places, data sets, registered things."""

from __future__ import annotations

import math
import re
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from hub_magmax.kernels.backend import DEVICES
from hub_magmax.recipe.model_names import is_there, relative_path, repository_problem, revision_problem
from hub_magmax.recipe.templates import checked_template

#: Most tasks, and most entries that there is one of per task.
MAX_TASKS = 255

#: Most characters of a path or a name on usual systems.
MAX_PLACE_LENGTH = 4096

#: Written in a recipe where a comparison shall choose.
AUTO = "auto"

#: Ending of the name of whole numbers to which GPTQ rounds.
GPTQ = "-gptq"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip


def parse_size(value: Any) -> Any:
    """Return the bytes that "5GB", "500 MB", "2GiB" or a whole number mean; leave the rest as it is."""
    pattern = r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*"
    match = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if not match:
        if isinstance(value, str):
            raise ValueError(f"{value!r} should be a size, such as 2GB or 500MB")
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


def _language(value: str) -> str:
    if not re.fullmatch("[a-z]{2,3}|multilingual|code", value):
        raise ValueError(f"{value!r} should be an ISO 639 code such as en, or multilingual")
    return value


def _label(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticKnownError("string_type")  # true is no 1: classes are called yes and no
    return value


def _dataset_id(value: str) -> str:
    if problem := repository_problem(value):
        raise ValueError(f"{problem}; name a data set on the Hub")
    return value


def _bits(value: str) -> str:
    if re.fullmatch("int[2-8]", value) is None:
        raise ValueError(f"{value!r} is no number of bits; write int2 to int8")
    return value


def _quantized(value: str) -> str:
    if re.fullmatch(f"int[2-8]({GPTQ})?", value) is None:
        raise ValueError(f"{value!r} is no rounding; write int2 to int8, or int2-gptq to int8-gptq")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(f"({'|'.join(DEVICES)})(:[0-9]{{1,4}})?", value):
        raise ValueError(f"{value!r} should be one of {', '.join(DEVICES)}, or a numbered one such as cuda:1")
    return value


def _repository(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a repository on the Hub, such as org/name; left out, nothing is pushed")
    if isinstance(value, str) and (problem := repository_problem(value)):
        raise ValueError(problem)
    return value


def _revision(value: str) -> str:
    if problem := revision_problem(value):
        raise ValueError(problem)
    return value


def _data_place(value: str, info: ValidationInfo) -> str:
    """Refuse what is no path, is not here, and can be no data set on the Hub."""
    folder = (info.context or {}).get("folder")
    is_path = value.startswith((".", "/", "~")) or "://" in value or PurePath(value).suffix
    if folder is None or is_path or is_there(folder / value) or not (problem := repository_problem(value)):
        return value
    raise ValueError(f"{problem}; and there is no such folder")


def _relative(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    return relative_path(value, folder) if folder else value


#: A path, or a name on the Hub; absolute paths are stored relative to the recipe's folder.
Place = Annotated[str, Field(min_length=1, max_length=MAX_PLACE_LENGTH), AfterValidator(_relative)]

Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]

Scaling = Annotated[
    float | str,
    BeforeValidator(_scaling),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": AUTO}]}),
]

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]

DeviceName = Annotated[str, AfterValidator(_device)]

Language = Annotated[str, AfterValidator(_language)]

#: A class of a data set, by name or number.
Label = Annotated[int | str, BeforeValidator(_label)]

#: A branch, tag, commit or pull request.
Revision = Annotated[str, AfterValidator(_revision)]

#: A data set: a path, or a name on the Hub.
DataPlace = Annotated[Place, AfterValidator(_data_place)]

#: `push_to_hub: no` is no repository of the name "no".
Repository = Annotated[str, BeforeValidator(_repository)]

DatasetId = Annotated[str, AfterValidator(_dataset_id)]

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Spec(BaseModel):
    """Part of a recipe: cannot be changed, and takes no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: A Jinja2 template over the columns of an example.
PromptTemplate = Annotated[str, Field(min_length=1), AfterValidator(checked_template)]


class FewShot(Spec):
    """Solved examples before every prompt: `count` of another split or data set, drawn by `seed`."""

    count: Annotated[int, Field(ge=1, le=100)]
    dataset: DataPlace | None = None
    config: str | None = None
    split: str = "train"
    revision: Revision | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


#: Keys of `Data` that came later: without a value they are no part of its digest.
_PROMPT_KEYS = ("prompt_column", "template", "few_shot")


class Data(Spec):
    """Examples as `datasets` names them: a Hub id, or a local folder or file, and a split.

    A language model is given the column `prompt_column`, or what `template` makes of an example's columns,
    after the examples of `few_shot`.
    """

    dataset: DataPlace
    config: str | None = None
    split: str = "test"
    revision: Revision | None = None
    input_column: str | None = None
    label_column: str = "label"
    prompt_column: str | None = None
    template: PromptTemplate | None = None
    few_shot: FewShot | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Data:
        if self.prompt_column is not None and self.template is not None:
            raise ValueError("prompt_column and template both say what the prompt is; name one of them")
        if self.shots is not None and (self.shots.dataset, self.shots.config, self.shots.split) == (
            self.dataset,
            self.config,
            self.split,
        ):
            raise ValueError("few_shot takes its examples from the data that is scored; name another split")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_prompts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if k not in _PROMPT_KEYS or v is not None}

    @property
    def shots(self) -> Data | None:
        """The data that the few solved examples are drawn from."""
        if self.few_shot is None:
            return None
        own = self.few_shot.dataset is None
        changes: dict[str, Any] = {
            "dataset": self.dataset if own else self.few_shot.dataset,
            "config": self.few_shot.config or (self.config if own else None),
            "split": self.few_shot.split,
            "revision": self.few_shot.revision or (self.revision if own else None),
            "few_shot": None,
        }
        return self.model_copy(update=changes)

    @property
    def parts(self) -> tuple[Data, ...]:
        """Itself, and the data of its few solved examples."""
        return (self,) if self.shots is None else (self, self.shots)

    @property
    def pin_key(self) -> str:
        """Name of its commit in a lock."""
        return f"{self.dataset}@{self.revision or 'main'}"

    @property
    def prompt_keys(self) -> tuple[str, ...]:
        """The keys that were set and that only evaluators with prompts understand."""
        return tuple(key for key in _PROMPT_KEYS if getattr(self, key) is not None)


TaskData = Annotated[dict[TaskName, Data], Field(max_length=MAX_TASKS)]

Share = Annotated[Number, Field(gt=0, lt=1)]

Positive = Annotated[Number, Field(gt=0)]

#: Whole numbers of two to eight bits.
Bits = Annotated[str, AfterValidator(_bits), WithJsonSchema({"type": "string", "pattern": "^int[2-8]$"})]

#: The same, each rounded to the nearest or by GPTQ.
Quantized = Annotated[
    str,
    AfterValidator(_quantized),
    WithJsonSchema({"type": "string", "pattern": f"^int[2-8]({GPTQ})?$"}),
]

#: A number of any sign per task.
Coefficients = Annotated[dict[TaskName, Number], Field(max_length=MAX_TASKS)]

TaskWeights = Annotated[dict[TaskName, Annotated[Number, Field(ge=0)]], Field(max_length=MAX_TASKS)]


def num_bits(kind: str) -> int:
    """Return the number in the name of whole numbers, 3 of `int3` and of `int3-gptq`."""
    return int(kind.removeprefix("int").removesuffix(GPTQ))


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


class EvaluatorChoice(Named):
    """A registered evaluator and its options."""

    name: str = "image-classification"
