"""Methods of mergekit: the parameters that each reads, where, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

#: In place of a default: the parameter has to be written.
REQUIRED: Final = object()

Base = Literal["required", "optional", "like the others"]


@dataclass(frozen=True)
class MergekitMethod:
    """A method and its parameters.

    Attributes:
        base: How it uses the base model. Where it is like the others, its own parameters are read.
        each: Parameters of each model, with their defaults.
        shared: Parameters of all models together; under one model they are not read.
        num_models: Least and most models beside the base model.
        is_random: Whether it draws.
        ranks: Whether it ranks magnitudes or elects signs, so that equal numbers are a matter of order.
    """

    base: Base
    each: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    num_models: tuple[int, int] = (1, 10_000)
    is_random: bool = False
    ranks: bool = False

    @property
    def adds(self) -> bool:
        """Whether it adds task vectors to the base model, one by one."""
        return "lambda" in self.shared


def _added(*, normalize: bool = False, rescale: bool = False, is_random: bool = False, **more: Any) -> Any:
    """Return a method that adds task vectors, with the defaults in which they differ."""
    shared = {"lambda": 1.0, "normalize": normalize, "rescale": rescale, "int8_mask": False}
    each = {"weight": REQUIRED, **more}
    return MergekitMethod("required", each, shared, (0, 10_000), is_random, bool(more))


MERGEKIT_METHODS: Mapping[str, MergekitMethod] = {
    "linear": MergekitMethod("like the others", {"weight": REQUIRED}, {"normalize": True}),
    "slerp": MergekitMethod("required", {}, {"t": REQUIRED}, (1, 1)),
    "nuslerp": MergekitMethod(
        "optional",
        {"weight": REQUIRED},
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        (2, 2),
    ),
    "multislerp": MergekitMethod(
        "optional", {"weight": REQUIRED}, {"normalize_weights": True, "eps": 1e-8}
    ),
    "karcher": MergekitMethod("like the others", {}, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": MergekitMethod("required", {}, {"filter_wise": False}, (2, 10_000)),
    "arcee_fusion": MergekitMethod("required", {}, {}, (1, 1)),
    "nearswap": MergekitMethod("required", {}, {"t": REQUIRED}, (1, 1)),
    "sce": MergekitMethod("required", {}, {"select_topk": 1.0, "int8_mask": False}, ranks=True),
    "ram": MergekitMethod("required", {}, {"epsilon": 1e-5}),
    "ramplus_tl": MergekitMethod("required", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "passthrough": MergekitMethod("like the others", {"scale": None}, {}, (1, 1)),
    "task_arithmetic": _added(),
    "ties": _added(normalize=True, density=1.0),
    "dare_linear": _added(rescale=True, is_random=True, density=1.0),
    "dare_ties": _added(rescale=True, is_random=True, density=1.0),
    "breadcrumbs": _added(density=1.0, gamma=0.01),
    "breadcrumbs_ties": _added(density=1.0, gamma=0.01),
    "della": _added(normalize=True, rescale=True, is_random=True, density=1.0, epsilon=0.15),
    "della_linear": _added(rescale=True, is_random=True, density=1.0, epsilon=0.15),
}  # fmt: skip

#: Parameters that are true or false.
SWITCHES = (
    "normalize", "rescale", "int8_mask", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights",
    "filter_wise",
)  # fmt: skip

#: Every parameter of any method.
PARAMETERS: tuple[str, ...] = tuple(
    dict.fromkeys(name for how in MERGEKIT_METHODS.values() for name in (*how.each, *how.shared))
)


def readers(parameter: str) -> list[str]:
    """Return the methods that read a parameter."""
    return [name for name, how in MERGEKIT_METHODS.items() if parameter in {*how.each, *how.shared}]
