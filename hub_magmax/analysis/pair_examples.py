"""Activations and gradients of pairs of tasks' models, on a few examples of both tasks.

Each example runs alone, so that no padding takes part. Of a pair, both models run on the examples of both
tasks; gradients of each on its own task's alone, as published, are told beside. One model is held at a time,
and four gradients of its size; each is loaded once for every other task.

Source: arXiv:2601.22285. Its gradients are sums of the batches' mean losses over the number of examples,
which is less by the size of a batch; here they are those of the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.collecting import linear_layers
from hub_magmax.evaluation.data_keys import about_data
from hub_magmax.evaluation.evaluators import Evaluator, brings_data, columns_of, evaluator_of
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.models import Loading, model_places
from hub_magmax.evaluation.scoring import load_evaluation_data
from hub_magmax.kernels.lazy_imports import one_thread
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.reporting.pair_metrics import Gram, Part

#: Examples of each task, as published.
NUM_EXAMPLES = 10


class Examined(NamedTuple):
    """Squared lengths and inner products of activations and gradients, and the examples of each task."""

    parts: Mapping[Part, Gram]
    num_examples: int


NOTHING = Examined({}, 0)


def why_not(recipe: Recipe, lock: Lock) -> str:
    """Say why models cannot run on examples of every task; nothing where they can."""
    if recipe.evaluation is None:
        return "the recipe has no evaluation"
    evaluator = evaluator_of(recipe.evaluation)
    if brings_data(evaluator) or not hasattr(evaluator, "losses"):
        return f"the evaluator {recipe.evaluation.evaluator.name} tells no losses"
    missing = [task for task in lock.tasks if task not in recipe.evaluation.tasks]
    return f"evaluation.tasks has no examples of {missing[0]}" if missing else ""


def examine_pairs(
    recipe: Recipe,
    lock: Lock,
    *,
    num_examples: int = NUM_EXAMPLES,
    progress: Callable[[int], None] = lambda num_pairs: None,
) -> Examined:
    """Run every pair of tasks' models on examples of both.

    Args:
        recipe: Its evaluation names the examples, of which some are taken, evenly spread.
        lock: Pins models and data.
        num_examples: Of each task.
        progress: Called with 1 after each pair.

    Raises:
        EvaluationError: If a model cannot be loaded or run.
    """
    if reason := why_not(recipe, lock):
        hint = "Leave examples out: --examples 0."
        raise EvaluationError(f"activations and gradients cannot be measured: {reason}", hint=hint)
    assert recipe.evaluation is not None
    evaluator, tasks = evaluator_of(recipe.evaluation), list(lock.tasks)
    data = load_evaluation_data(recipe, lock)
    examples = {task: _some(data[task], num_examples) for task in tasks}
    loading, places = Loading(recipe, lock, evaluator), model_places(recipe, lock)

    def run(model: LoadedModel, task: str) -> Run:
        spec = recipe.evaluation.tasks[task]  # type: ignore[union-attr]  # looked at above
        with about_data(recipe, spec):
            return run_model(evaluator, model, evaluator.encode(model, examples[task], columns_of(spec), 1))

    def runs_of(name: str, pair: Sequence[str]) -> list[Run]:
        model = loading.load(name, places[name])  # let go at the return, before the next one is loaded
        return [run(model, task) for task in pair]

    sums = _Products(len(tasks))
    with one_thread():
        for one, other in combinations(range(len(tasks)), 2):
            pair = [tasks[one], tasks[other]]
            sums.add(one, other, *(runs_of(name, pair) for name in pair))
            progress(1)
    return Examined(sums.grams(), max(len(some) for some in examples.values()))


def _some(examples: Any, count: int) -> Any:
    size = len(examples)
    count = min(count, size)
    return examples.select([place * size // count for place in range(count)])


class Run(NamedTuple):
    """What a model made of some examples: means over them, and gradients of inputs one after the other."""

    activation: Tensor
    gradient: Tensor
    inputs: Tensor


def run_model(evaluator: Evaluator, model: LoadedModel, batches: Iterator[Any]) -> Run:
    """Run a model on batches of one example each.

    The activation is the mean over places of the last block's output; of a model without blocks, of the
    input of its last linear layer. The gradient is that of all parameters but the last linear layer's;
    embeddings count where a head is tied to them, and their gradient has the head's part too. What no
    gradient reaches has one of zeros.
    """
    losses: Callable[..., Tensor] = evaluator.losses  # type: ignore[attr-defined]  # optional, looked at before
    every = dict(model.network.named_parameters())
    activations, inputs, total = list[Tensor](), list[Tensor](), torch.zeros(())
    with torch.enable_grad(), _Seen(model.network) as seen:
        for parameter in every.values():
            parameter.requires_grad_(True)
        for batch in batches:
            loss = losses(model, batch, 0.0).sum()
            below = [value for name, value in every.items() if not name.startswith(f"{seen.head}.")]
            gradient, of_inputs = _gradients(loss, below, seen.inputs)
            total = total + gradient
            inputs.append(of_inputs)
            activations.append(seen.activation)
    return Run(torch.stack(activations).mean(0), total / len(activations), torch.cat(inputs))


def _gradients(loss: Tensor, *groups: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of each group one after the other, float32, on the CPU."""
    every = [value for group in groups for value in group]
    found = iter(torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True))
    flat = [[next(found).flatten().float().cpu() for _ in group] for group in groups]
    return [torch.cat(parts or [torch.zeros(0)]) for parts in flat]


class _Seen:
    """What hooks see of one example: inputs that have gradients, the last linear layer, the activation."""

    def __init__(self, network: Any) -> None:
        self.inputs: list[Tensor] = []
        self.head = ""
        self.activation = torch.zeros(0)
        self._network, self._block, self._stack = network, _last_block(network), ExitStack()

    def __enter__(self) -> _Seen:
        network, keep = self._network, self._stack.callback
        keep(network.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        if (embeddings := _embeddings(network)) is not None:
            keep(embeddings.register_forward_hook(self._embed).remove)
        for name, layer, _ in linear_layers(network):
            keep(layer.register_forward_pre_hook(partial(self._linear, name)).remove)
        if self._block is not None:
            keep(self._block.register_forward_hook(self._leave).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _enter(self, module: Any, inputs: Any, options: Mapping[str, Any]) -> None:
        floating = (value for value in options.values() if isinstance(value, Tensor))
        self.inputs = [value.requires_grad_(True) for value in floating if value.is_floating_point()]

    def _embed(self, module: Any, inputs: Any, output: Tensor) -> None:
        if not self.inputs:
            self.inputs.append(output)

    def _linear(self, name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.head = name
        if self._block is None:
            self.activation = _over_places(inputs[0])

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self.activation = _over_places(output if isinstance(output, Tensor) else output[0])


def _embeddings(network: Any) -> torch.nn.Embedding | None:
    """Return the layer that embeds tokens; None of a model that reads none."""
    try:
        found = network.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # of convolutions, transformers knows none
        return None
    return found if isinstance(found, torch.nn.Embedding) else None


def _last_block(network: Any) -> Any:
    """Return the last module of the longest list that is in no other, the later of equal ones."""
    lists: dict[str, Any] = {}
    for name, module in network.named_modules():
        is_within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and len(module) and not is_within:
            lists[name] = module
    return max(reversed(lists.values()), key=len)[-1] if lists else None


def _over_places(values: Tensor) -> Tensor:
    """Return the mean over places of one example: of a sequence, or of an image with channels first."""
    values = values.detach().double().cpu()
    if values.dim() == 4:
        return values.mean((0, 2, 3))
    return values.reshape(-1, values.shape[-1]).mean(0)


class _Products:
    """Squared lengths and inner products by part and pair of tasks."""

    _SHARED: Sequence[Part] = ("activations", "gradients", "input gradients")
    _OWN: Sequence[Part] = ("gradients on own examples", "input gradients on own examples")

    def __init__(self, num_tasks: int) -> None:
        self._shape = (3, num_tasks, num_tasks)
        self._found: dict[Part, np.ndarray] = {}
        self._missing: set[Part] = set()

    def add(self, one: int, other: int, runs: Sequence[Run], other_runs: Sequence[Run]) -> None:
        """Add a pair, by the runs of both models on the first task's examples, and on the second's."""
        first, second = _on_both(runs), _on_both(other_runs)
        own, others_own = runs[0], other_runs[1]
        vectors = (*zip(first, second, strict=True), (own.gradient, others_own.gradient))
        vectors = (*vectors, (own.inputs, others_own.inputs))
        for part, pair in zip((*self._SHARED, *self._OWN), vectors, strict=True):
            if pair[0].shape != pair[1].shape:  # texts of other lengths
                self._missing.add(part)
                continue
            a, b = (vector.double() for vector in pair)
            place = self._found.setdefault(part, np.zeros(self._shape))
            place[:, one, other] = float(a @ a), float(b @ b), float(a @ b)

    def grams(self) -> dict[Part, Gram]:
        return {part: Gram(*found) for part, found in self._found.items() if part not in self._missing}


def _on_both(runs: Sequence[Run]) -> tuple[Tensor, Tensor, Tensor]:
    """Return means over the examples of two tasks, and gradients of the inputs of both."""
    one, other = runs
    return (
        (one.activation + other.activation) / 2,
        (one.gradient + other.gradient) / 2,
        torch.cat([one.inputs, other.inputs]),
    )
