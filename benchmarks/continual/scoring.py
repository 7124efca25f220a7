"""Merged models scored without a file: one network is filled again and again with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.continual.corrected import Corrector
from benchmarks.continual.frozen import FrozenStart
from hub_magmax.analysis.candidates import Candidate
from hub_magmax.analysis.tuning import Trial
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.evaluation.data import load_examples
from hub_magmax.evaluation.evaluators import Outcome
from hub_magmax.evaluation.evaluators.loading import LoadedModel, load_model
from hub_magmax.merging.in_memory import InMemoryMerger, MergedModel
from hub_magmax.methods import get_method
from hub_magmax.methods.data_statistics import OF_THE_MERGE
from hub_magmax.pipeline import lock
from hub_magmax.recipe.examples import Evaluation
from hub_magmax.recipe.loading import updated
from hub_magmax.recipe.matching import locked_method
from hub_magmax.recipe.schema import Method, Recipe
from hub_magmax.recipe.values import Data

if TYPE_CHECKING:
    from datasets import Dataset
from hub_magmax.evaluation.evaluators import columns_of, evaluator_of


class Scorer(AbstractContextManager["Scorer"]):
    """A recipe's checkpoints and evaluator, for thousands of merges: what `CandidateScorer` does, faster.

    Args:
        recipe: Its evaluation names the evaluator.
        examples: Of each task, for methods that need statistics of the tasks' data.
    """

    def __init__(self, recipe: Recipe, examples: Mapping[str, Data] | None = None) -> None:
        spec = recipe.evaluation or Evaluation(tasks={})
        self._recipe, self._examples = recipe, examples or {}
        locked = self._locked = lock(recipe)
        self._batch_size = spec.batch_size
        self._evaluator = evaluator_of(spec)
        with ExitStack() as stack:
            self._merger = stack.enter_context(InMemoryMerger(recipe, locked))
            kinds = self._evaluator.model_class, self._evaluator.processor_class
            place = location_of(locked.base_model, recipe.folder).model_place
            unchanged = _unchanged(self._merger)
            self._model = RefilledModel(load_model(place, *kinds, spec.evaluator.name), unchanged)
            self._with_statistics: dict[tuple[str, tuple[float, ...] | None], InMemoryMerger] = {}
            self._stack = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def encode(self, examples: Dataset, data: Data) -> list[Any]:
        """Return examples as batches that `trials` takes."""
        return list(self._evaluator.encode(self._model.loaded, examples, columns_of(data), self._batch_size))

    def trials(
        self,
        method: Method,
        scalings: Sequence[float],
        weights: tuple[float, ...],
        batches: Sequence[Any],
        *,
        corrected: bool = False,
    ) -> Iterator[Trial]:
        """Yield one trial per scaling coefficient; merged once, corrected for each where that is wanted."""
        filled = locked_method(method)
        merged = self._merged(method, weights)
        for scaling in scalings:
            tensors = merged.weights(scaling)
            if corrected:
                tensors = self._corrector.corrected(tensors, weights)
            model = self._model.with_weights(tensors)
            candidate = Candidate(filled | {"scaling": scaling}, "given", weights)
            outcomes: list[Outcome] = self._evaluator.outcomes(model, batches)
            yield Trial(candidate, tuple(outcomes))

    def outcomes_of(self, checkpoint: Path, batches: Sequence[Any]) -> list[Outcome]:
        """Return the outcomes of a checkpoint that is none of the recipe's, but has the same tensors."""
        tensors = {
            name: tensor
            for path in checkpoint.glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        found: list[Outcome] = self._evaluator.outcomes(self._model.with_weights(tensors), batches)
        return found

    @cached_property
    def _corrector(self) -> Corrector:
        loaded = {task: load_examples(data, self._recipe.folder) for task, data in self._examples.items()}
        batches = {task: self.encode(rows, self._examples[task]) for task, rows in loaded.items()}
        return Corrector(
            self._recipe, self._locked, self._evaluator, self._model.loaded, self._model.with_weights, batches
        )

    def _merged(self, method: Method, weights: tuple[float, ...]) -> MergedModel:
        """Merge by one method under one preference; what statistics it needs are made first.

        Statistics of a merge are of the scaling coefficient 1, whichever scales its task vector afterwards.
        """
        kind = get_method(method.name).statistics
        if kind is None:
            return self._merger.merge(locked_method(method), weights)
        known = kind, weights if kind == OF_THE_MERGE else None
        if known not in self._with_statistics:
            folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="hub_magmax_")))
            recipe = _with_statistics(self._recipe, method, weights, self._examples, folder)
            self._with_statistics[known] = self._stack.enter_context(InMemoryMerger(recipe, lock(recipe)))
        merger = self._with_statistics[known]
        own = merger.plan.lock.weights if kind == OF_THE_MERGE else weights  # rounded as the lock has them
        return merger.merge(locked_method(method), own)


def _unchanged(merger: InMemoryMerger) -> dict[str, Tensor]:
    """Return the tensors that are the same in the base model and every task's checkpoint, by name."""
    tasks = range(len(merger.plan.recipe.tasks))
    single = locked_method(Method(name="single_task"))

    def own(task: int, scaling: float) -> dict[str, Tensor]:
        weights = tuple(float(one == task) for one in tasks)
        return merger.merge(single, weights).weights(scaling)

    found = own(0, 0.0)
    for task in tasks:
        of_task = own(task, 1.0)
        found = {name: tensor for name, tensor in found.items() if torch.equal(tensor, of_task[name])}
    return found


def _with_statistics(
    recipe: Recipe, method: Method, weights: tuple[float, ...], examples: Mapping[str, Data], folder: Path
) -> Recipe:
    """Return the recipe with a method, a preference, and statistics that are made in a folder.

    Statistics of a merge are of one without rules: tensors that no task changed are merged, too.
    """
    values = recipe.to_dict()
    of_the_merge = get_method(method.name).statistics == OF_THE_MERGE
    tasks = [task | {"statistics": str(folder / task["name"])} for task in values["tasks"]]
    return updated(
        recipe,
        {
            "tasks": tasks,
            "method": method.model_dump(exclude_defaults=True),
            "tensors": [] if of_the_merge else values.get("tensors", []),
            "preference": {"weights": dict(zip(recipe.task_names, weights, strict=True))},
            "statistics": {
                "data": {task: data.model_dump(exclude_none=True) for task, data in examples.items()}
            },
        },
    )


class RefilledModel:
    """A model whose weights are replaced in place, which takes a tenth of the time of loading it.

    Args:
        loaded: Is left as it is.
        unchanged: Tensors of its files that are the same in nearly all weights that it will get; blocks at
            its start that have no others run once for each batch of texts.
    """

    def __init__(self, loaded: LoadedModel, unchanged: Mapping[str, Tensor] | None = None) -> None:
        self.loaded, self._unchanged = loaded, unchanged or {}
        self._start: FrozenStart | None = None
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
        if self._start is None:
            self._start = FrozenStart(self._copy.network, self._slots, self._unchanged)
        self._start.check(weights)
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
