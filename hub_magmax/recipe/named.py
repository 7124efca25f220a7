"""Registered things that a recipe names, with their options."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, model_validator

from hub_magmax.recipe.values import Spec


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
