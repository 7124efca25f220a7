"""Quantised copies of the models of an evaluation: which there are, and how each is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.columns import examples_for
from hub_magmax.evaluation.data import check_local_data
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import (
    Evaluator,
    brings_data,
    columns_of,
    encode_unlabelled,
    evaluator_of,
)
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.scores import MERGED, quantized_name
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.values import GPTQ, num_bits
from hub_magmax.text import step

if TYPE_CHECKING:
    from datasets import Dataset


def quantized_cells(name: str, spec: Evaluation) -> list[tuple[str, str]]:
    """Return the quantised copies of a model, each with the tasks that it is scored on."""
    if name != MERGED and spec.quantized_models != "all":
        return []
    kinds, tasks = dict.fromkeys(spec.quantized), [*spec.tasks]
    own = tasks if name in ("base_model", MERGED) else [task for task in tasks if task == name]
    return [(quantized_name(kind, name), task) for kind in kinds for task in own]


def rounded_model(loaded: LoadedModel, bits: int) -> LoadedModel:
    """Return a model with weights of so few bits, each rounded to the nearest."""
    from hub_magmax.evaluation.quantizing import rounded

    return replace(loaded, network=rounded(loaded.network, bits))


@dataclass(frozen=True)
class Rounding:
    """Makes the quantised copies of models.

    Attributes:
        recipe: Its evaluation asks for them.
        calibration: Examples for GPTQ; None where it is not asked for.
    """

    recipe: Recipe
    calibration: Dataset | None

    @classmethod
    def find(cls, recipe: Recipe, lock: Lock, evaluator: Evaluator) -> Rounding:
        """Load the examples for GPTQ, if it is asked for; called before a merge too.

        Raises:
            RecipeError: If the evaluator brings its own examples.
            EvaluationError, LockError: As for other examples.
        """
        spec = recipe.evaluation
        data = spec.calibration if spec is not None and spec.needs_calibration else None
        if data is None:
            return cls(recipe, None)
        if brings_data(evaluator):
            raise RecipeError(
                "this evaluator brings its own examples, and GPTQ needs those of evaluation.calibration",
                key=("evaluation", "quantized"),
                hint="Round to the nearest, such as int4, or name another evaluator.",
            )
        check_local_data([data], recipe, lock.local_data)
        labelled = encode_unlabelled(evaluator) is None
        return cls(recipe, examples_for(evaluator, data, recipe, lock.datasets, labelled=labelled))

    def copy(self, loaded: LoadedModel, label: str) -> LoadedModel:
        """Return the quantised copy of a model that has this label."""
        kind = label.rpartition(":")[2]
        if not kind.endswith(GPTQ):
            return rounded_model(loaded, num_bits(kind))
        with step(f"rounding to {kind}"):
            return self._calibrated(loaded, num_bits(kind))

    def _calibrated(self, loaded: LoadedModel, bits: int) -> LoadedModel:
        from hub_magmax.evaluation.gptq import rounded_by_gptq

        spec = self.recipe.evaluation
        assert spec is not None and spec.calibration is not None, "checked with the recipe"
        evaluator = evaluator_of(spec)
        encode = encode_unlabelled(evaluator) or evaluator.encode
        with about_data(self.recipe, spec.calibration):
            columns = columns_of(spec.calibration)
            batches = list(encode(loaded, self.calibration, columns, spec.batch_size))

            def run(network: Any) -> None:
                for _ in evaluator.outcomes(replace(loaded, network=network), batches):
                    pass

            return replace(loaded, network=rounded_by_gptq(loaded.network, bits, run))
