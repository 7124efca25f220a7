"""Merged models scored without a file: one network is filled again and again with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.tuning import Trial
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Evaluation, Method, Recipe
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset
from hub_magmax.evaluation.evaluators import columns_of, evaluator_of


class Scorer(AbstractContextManager["Scorer"]):
    """A recipe's checkpoints and evaluator, for thousands of merges: what `CandidateScorer` does, faster.

    Args:
        recipe: Its evaluation names the evaluator.
    """

    def __init__(self, recipe: Recipe) -> None:
        spec = recipe.evaluation or Evaluation(tasks={})
        locked: Lock = lock(recipe)
        self._batch_size = spec.batch_size
        self._evaluator = evaluator_of(spec)
        with ExitStack() as stack:
            self._merger = stack.enter_context(InMemoryMerger(recipe, locked))
            kinds = self._evaluator.model_class, self._evaluator.processor_class
            place = location_of(locked.base_model, recipe.folder).model_place
            self._model = RefilledModel(load_model(place, *kinds, spec.evaluator.name))
            self._stack = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def encode(self, examples: Dataset, data: Data) -> list[Any]:
        """Return examples as batches that `trials` takes."""
        return list(self._evaluator.encode(self._model.loaded, examples, columns_of(data), self._batch_size))

    def trials(
        self, method: Method, scalings: Sequence[float], weights: tuple[float, ...], batches: Sequence[Any]
    ) -> Iterator[Trial]:
        """Yield one trial per scaling coefficient; merged once."""
        filled = locked_method(method)
        merged = self._merger.merge(filled, weights)
        for scaling in scalings:
            model = self._model.with_weights(merged.weights(scaling))
            candidate = Candidate(filled | {"scaling": scaling}, "given", weights)
            outcomes: list[Outcome] = self._evaluator.outcomes(model, batches)
            yield Trial(candidate, tuple(outcomes))


class RefilledModel:
    """A model whose weights are replaced in place, which takes a tenth of the time of loading it.

    Args:
        loaded: Is left as it is.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._copy: LoadedModel | None = None
        self._slots: Mapping[str, Tensor] | None = None

    def with_weights(self, weights: Mapping[str, Tensor]) -> LoadedModel:
        """Return the model with the given weights; what an earlier call returned has them as well."""
        if self._copy is None:
            self._copy = self.loaded.with_weights(
                {
                    name: torch.full_like(tensor, number)
                    for number, (name, tensor) in enumerate(weights.items(), 1)
                }
            )
            self._slots = _slots(self._copy, weights)
        if self._slots is None:
            return self.loaded.with_weights(weights)
        with torch.no_grad():
            for name, tensor in weights.items():
                self._slots[name].copy_(tensor)
        return self._copy


def _slots(numbered: LoadedModel, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Return where each tensor of the files went in a model filled with the tensors' numbers.

    Files and modules may use different names. None where a tensor is not simply one of the model's, such as
    one that is split on loading, or where the dtype cannot tell the numbers apart.
    """
    tensors = list(numbered.network.state_dict(keep_vars=True).values())
    found: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(weights.items(), 1):
        same = [own for own in tensors if own.shape == tensor.shape and bool((own == number).all())]
        if len({own.data_ptr() for own in same}) != 1:
            return None
        found[name] = same[0]
    return found
