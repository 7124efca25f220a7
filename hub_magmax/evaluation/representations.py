"""Inputs of a model's head: sums of products of those of a merged model and of a task's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.data_statistics import HEAD
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.collecting import FileNames, Statistics, checked, linear_layers, seeing_inputs
from hub_magmax.methods.corrections import Products
from hub_magmax.recipe.blocks import block_of

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.evaluation.evaluators.loading import LoadedModel


#: Why a head that is one parameter with another tensor is none.
TIED = "its head is tied to {!r}, which would change with it"


@dataclass(frozen=True)
class Head:
    """The last linear layer of a model.

    Attributes:
        layer: Its name in the network.
        tensor: Name of its weight in the base model's files.
    """

    layer: str
    tensor: str


def find_head(model: LoadedModel, names: FileNames, run: Callable[[], object]) -> Head:
    """Return the linear layer that makes a model's logits.

    Args:
        model: Runs.
        names: What the base model's files call its parameters.
        run: Runs it on some examples.

    Raises:
        EvaluationError: If no linear layer does, or its weight is no tensor of its own in the files.
    """
    calls, outputs = _traced(model.network, run)
    if not calls:
        raise no_head(model.name, "it has no linear layer")
    last = calls[-1]
    layer, written = model.network.get_submodule(last), f"{last}.weight"
    if _is_in_a_stack(model.network, written):
        raise no_head(model.name, f"its last linear layer, {last!r}, is in one of its blocks")
    if not _makes_logits(layer, outputs) or calls.count(last) != len(outputs):
        raise no_head(model.name, f"its last linear layer, {last!r}, does not make its logits")
    if other := _beside(model.network, calls):
        raise no_head(model.name, f"it has two heads, {other!r} and {last!r}")
    if other := _tied_to(model.network, written):
        raise no_head(model.name, TIED.format(other))
    if written not in names.names:
        raise no_head(model.name, f"the base model's files have no tensor of their own for {written!r}")
    return Head(last, names.names[written])


def _is_in_a_stack(network: Any, written: str) -> bool:
    """Say whether a parameter is in one of several blocks; one alone is a layer of a small network."""
    own = block_of(written)
    blocks = (block_of(name) for name, _ in network.named_parameters())
    return own is not None and any(
        block is not None and block.stack == own.stack and block.number != own.number for block in blocks
    )


def _traced(network: Any, run: Callable[[], object]) -> tuple[list[str], list[Any]]:
    """Return the linear layers that run, one after the other, and the network's outputs."""
    calls: list[str] = []
    outputs: list[Any] = []
    with ExitStack() as stack:
        for name, module, _ in linear_layers(network):
            hook = module.register_forward_hook(lambda *_, name=name: calls.append(name))
            stack.callback(hook.remove)
        hook = network.register_forward_hook(lambda *called: outputs.append(called[-1]))
        stack.callback(hook.remove)
        run()
    return calls, outputs


def _tied_to(network: Any, written: str) -> str:
    """Return the name of another parameter that is the same one, else nothing."""
    every = dict(network.named_parameters(remove_duplicate=False))
    return next((name for name, own in every.items() if own is every[written] and name != written), "")


def _beside(network: Any, calls: list[str]) -> str:
    """Return the name of another layer outside of blocks as large as the last: a second head; else nothing.

    Distilled classifiers return the mean of two.
    """
    sizes = {name: tuple(network.get_submodule(name).weight.shape) for name in calls}
    last = calls[-1]
    alike = (name for name in sizes if sizes[name] == sizes[last] and block_of(f"{name}.weight") is None)
    return next((name for name in alike if name != last), "")


def _makes_logits(layer: Any, outputs: list[Any]) -> bool:
    """Say whether a layer has one output for each of the network's."""
    from torch import Tensor, nn

    found = [getattr(output, "logits", output) for output in outputs]
    return (
        bool(found)
        and isinstance(layer, nn.Linear)
        and all(isinstance(logits, Tensor) and logits.shape[-1] == layer.out_features for logits in found)
    )


def no_head(model: str, why: str) -> EvaluationError:
    """Return the error of a model without a head that a correction could be folded into."""
    return EvaluationError(
        f"no correction can be folded into this model: {why}",
        where=model,
        key=("correction",),
        expected="one linear layer at its end, with a weight of its own",
        hint="Leave correction out of the recipe.",
    )


def summed_products(
    head: Head, own: LoadedModel, merged: LoadedModel, run: Callable[[LoadedModel], object]
) -> Statistics:
    """Return sums of products of representations, float64, and texts for the header of their file.

    Those of the task's own model are all held, those of the merged model come one batch after the other.

    Args:
        head: Of both models.
        own: The task's own checkpoint.
        merged: The merged model.
        run: Runs a model on all examples of the task.

    Raises:
        EvaluationError: If the models ran on inputs of other shapes, or gave what is not finite.
    """
    held: deque[Tensor] = deque()
    _see(head, own, held.append, run)
    sums = _Sums(held)
    _see(head, merged, partial(sums.add, own.name), run)
    if held or not sums.count:
        raise _other_inputs(own.name)
    found = checked({"cross": sums.cross, "gram": sums.gram}, merged.name)
    return dict(Products(**found)._asdict()), {HEAD: head.tensor, "inputs": str(sums.count)}


def _see(
    head: Head, model: LoadedModel, take: Callable[[Tensor], None], run: Callable[[LoadedModel], object]
) -> None:
    layer = model.network.get_submodule(head.layer)
    with seeing_inputs(model.network, {head.layer: layer}, lambda _, rows: take(rows.cpu())):
        run(model)


class _Sums:
    """Sums of products with the representations of a task's own model, which are taken in order."""

    def __init__(self, held: deque[Tensor]) -> None:
        import torch

        size = held[0].shape[1] if held else 0
        self._held, self.count = held, 0
        self.cross, self.gram = (torch.zeros((size, size), dtype=torch.float64) for _ in range(2))

    def add(self, where: str, rows: Tensor) -> None:
        if not self._held or self._held[0].shape != rows.shape:
            raise _other_inputs(where)
        own, seen = self._held.popleft().double(), rows.double()
        self.cross.addmm_(own.T, seen)
        self.gram.addmm_(seen.T, seen)
        self.count += len(rows)


def _other_inputs(where: str) -> EvaluationError:
    return EvaluationError(
        "it does not run on the same inputs as the merged model, so their representations are no pairs",
        where=where,
        expected="one tokenizer or image processor, and an evaluator that does not generate",
        hint="Leave correction out of the recipe, or choose another statistics.evaluator.",
    )
