"""Kinds of preference that a recipe can ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from hub_magmax.recipe.values import (
    MAX_TASKS,
    Coefficients,
    Data,
    Label,
    Number,
    Positive,
    Share,
    Spec,
    TaskData,
    TaskName,
    TaskWeights,
)


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
    """Options of every preference that is estimated from a target sample.

    The weights are `(1 - strength) * estimate + strength * prior`, and `towards` names the prior. The
    default strength is 0: the published estimates, and the shares that were counted, stay as they are.
    """

    target: Data
    towards: Prior = None
    strength: Annotated[Number, Field(ge=0, le=1)] = 0.0
    holdout: Holdout | None = None


class Labels(Estimate):
    """Estimate the preference from labelled target examples; `classes` names each task's labels."""

    classes: Annotated[dict[TaskName, tuple[Label, ...]], Field(max_length=MAX_TASKS)]


class DistanceEstimate(Estimate):
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


class Mixture(DistanceEstimate):
    """Compare with all tasks together, or with each alone.

    `fit: mixture` finds the weights whose mixture of training data is nearest to the target sample, in
    features whose scatter within tasks was made equal in all directions unless `whiten` is false.
    `fit: separate` measures the distance to each task alone and weighs by similarity. For `transport` that is
    the released code of Tunable MAGMAX; for `mmd` that code takes the square root, and two bandwidths.
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


class Cosine(DistanceEstimate):
    """Compare the directions of the centroids."""

    temperature: Positive = 0.02


class Search(Estimate):
    """Look for the weights whose merged model does best on the labelled target sample.

    `budget` is how many weights are tried, each of them a merge in memory and an evaluation.
    """

    budget: Annotated[int, Field(ge=2)] = 60


class Greedy(Estimate):
    """Take one task after the other, and keep those with which the merged model does no worse.

    Tasks come in the order of what the model merged from each alone is worth on the labelled target sample,
    the best one first; those that are kept have equal shares. With the method `average` this is the greedy
    soup of arXiv:2203.05482.
    """


_NOT_NEGATIVE = WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": 0}})


class Preference(Spec):
    """How much each task matters: exactly one kind.

    `weights` are shares, which sum to 1; `coefficients` are what each task vector is multiplied by.
    """

    # Weights below zero are refused by a check of the whole recipe, which knows what was meant.
    weights: Annotated[Coefficients | None, _NOT_NEGATIVE] = None
    coefficients: Coefficients | None = None
    geometric: Schedule | None = None
    linear: Schedule | None = None
    power: Power | None = None
    labels: Labels | None = None
    transport: Transport | None = None
    mmd: Mmd | None = None
    cosine: Cosine | None = None
    search: Search | None = None
    greedy: Greedy | None = None

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

    @property
    def is_searched(self) -> bool:
        """Whether models are merged and scored to find the weights, so that they depend on the method."""
        return isinstance(self.spec, Search | Greedy)

    @property
    def data(self) -> list[Data]:
        """The data that the weights are estimated from, in order; none where they are computed."""
        if not self.is_estimated:
            return []
        return [self.spec.target, *getattr(self.spec, "train", {}).values()]
