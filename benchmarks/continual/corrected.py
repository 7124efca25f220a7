"""Merged models in memory, with representations corrected towards those of the tasks' own (ReACT)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.evaluation.collecting import FileNames
from hub_magmax.evaluation.evaluators import Evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.representations import find_head, summed_products
from hub_magmax.methods.corrections import Products, correction, times
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Correction, Recipe


class Corrector:
    """What `correction: react` does to a file, for thousands of models: the tasks' own are loaded once.

    Args:
        recipe, lock: Of the checkpoints.
        evaluator: Runs them.
        base: The base model.
        with_weights: Returns the model that has the tensors of a merge.
        examples: Of each task, encoded.
    """

    def __init__(
        self,
        recipe: Recipe,
        lock: Lock,
        evaluator: Evaluator,
        base: LoadedModel,
        with_weights: Callable[[Mapping[str, Tensor]], LoadedModel],
        examples: Mapping[str, Sequence[Any]],
    ) -> None:
        loading, places = Loading(recipe, lock, evaluator, purpose="react"), model_places(recipe, lock)
        self._own = {task: loading.load(task, places[task]) for task in examples}
        self._runs = {
            task: partial(evaluator.outcomes, batches=[*batches]) for task, batches in examples.items()
        }
        self._with_weights = with_weights
        with open_checkpoints(recipe, lock) as opened:
            names = FileNames.find(base.network, opened["base_model"])
        self._head = find_head(base, names, partial(next(iter(self._runs.values())), base))

    def corrected(self, weights: Mapping[str, Tensor], preference: Sequence[float]) -> dict[str, Tensor]:
        """Return the tensors of a merged model with its head multiplied, by the default ridge."""
        merged = self._with_weights(weights)
        products = [
            Products(**summed_products(self._head, own, merged, self._runs[task])[0])
            for task, own in self._own.items()
        ]
        matrix, name = correction(products, preference, Correction().ridge), self._head.tensor
        return {**weights, name: torch.cat([*times(weights[name], matrix)])}
