"""Statistics of a task's data, from runs of its checkpoint: moments of inputs, Fisher information."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.data_statistics import SCALE, TRANSPOSED
from hub_magmax.checkpoints.names.conversion_tables import Joint, ModelNames, model_names
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import EvaluationError
from hub_magmax.evaluation.evaluators import encode_unlabelled
from hub_magmax.evaluation.evaluators.plugins import about
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.methods.data_statistics import StatisticsKind
from hub_magmax.text import listed

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.evaluation.evaluators import Columns, Evaluator
    from hub_magmax.evaluation.evaluators.loading import LoadedModel

#: Tensors by the base model's names, and texts for the header of their file.
Statistics = tuple[dict[str, "Tensor"], dict[str, str]]


def collected(
    kind: StatisticsKind,
    evaluator: Evaluator,
    model: LoadedModel,
    examples: Any,
    columns: Columns,
    batch_size: int,
    base: TensorSource,
    changed: Collection[str] | None = None,
) -> Statistics:
    """Return statistics of a kind, float32, from one run over all examples, in order.

    Args:
        kind: Of the statistics.
        evaluator: Runs the model.
        model: The task's own checkpoint.
        examples: Of the task.
        columns: Of the inputs and labels.
        batch_size: Examples at a time; for `fisher` one always.
        base: The base model, whose names of tensors count.
        changed: Names of the tensors that some task changes, the only ones of which statistics are returned;
            None: all.

    Raises:
        EvaluationError: If the evaluator does not say likelihoods, where these are needed, or the model has
            nothing that the statistics could be about.
    """
    own, encode = FileNames.find(model.network, base), encode_unlabelled(evaluator) or evaluator.encode
    changed = base.index.tensors if changed is None else changed
    if kind == "fisher":
        with about(evaluator, "fisher statistics"):
            tensors, told = _fisher(evaluator, model, encode(model, examples, columns, 1), own)
        return {name: tensor for name, tensor in tensors.items() if name in changed}, told
    own = own.only(changed)
    with about(evaluator, "gram statistics"), Moments(model.network, own) as moments:
        evaluator.outcomes(model, encode(model, examples, columns, batch_size))
        return moments.result(model.name)


@dataclass(frozen=True)
class FileNames:
    """What the base model's files call a network's parameters.

    Attributes:
        names: Name in the files, by name in the network, of parameters that are one tensor there.
        beside: Names in the files by name in the network, of parameters that are several tensors there, one
            below the other along the first axis.
        parts: Names in the network by name in the files, of tensors that are several parameters.
        rows: Rows of every tensor of the files.
    """

    names: Mapping[str, str]
    beside: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]

    @classmethod
    def find(cls, network: Any, base: TensorSource) -> FileNames:
        """Return them by transformers' tables, and by the names themselves for what no table knows.

        Names in files can lack the prefix of the network's backbone, or have it where the network has not.
        """
        known = base.index.tensors
        table = model_names(stated_config(base), known) or ModelNames({})
        prefix = f"{getattr(network, 'base_model_prefix', '') or '-'}."
        found = {}
        for name, _ in network.named_parameters():
            written = (table.of_model.get(name), name, name.removeprefix(prefix), f"{prefix}{name}")
            found[name] = next((one for one in written if one in known), "")
        rows = {name: info.shape[0] for name, info in known.items() if info.shape}
        named = {name: file_name for name, file_name in found.items() if file_name}
        return cls(named, _one_below_the_other(table.joined), _one_below_the_other(table.split), rows)

    def only(self, wanted: Collection[str]) -> FileNames:
        """Return those of some tensors of the files."""
        names = {name: found for name, found in self.names.items() if found in wanted}
        beside = {name: found for name, found in self.beside.items() if not {*found}.isdisjoint(wanted)}
        parts = {name: found for name, found in self.parts.items() if name in wanted}
        return FileNames(names, beside, parts, self.rows)

    def has(self, name: str) -> bool:
        """Say whether the files hold a parameter."""
        return name in self.names or name in self.beside or name in {*chain(*self.parts.values())}

    def in_files(self, tensors: Mapping[str, Tensor], *, by_row: bool) -> dict[str, Tensor]:
        """Return tensors by the network's names as those of the files.

        They come in the order of `tensors`, those that are one tensor of the files before all others.

        Args:
            tensors: What is known of parameters.
            by_row: It has a row for each row of the parameter; otherwise it is true of any of its rows.
        """
        found = {self.names[name]: tensor for name, tensor in tensors.items() if name in self.names}
        for name in tensors:
            if name in self.beside:
                found |= self._taken_apart(name, tensors[name], by_row=by_row)
        for whole, names in self.parts.items():
            if tensors.keys() >= {*names}:
                found[whole] = _together([tensors[name] for name in names], by_row=by_row)
        return found

    def _taken_apart(self, whole: str, tensor: Tensor, *, by_row: bool) -> dict[str, Tensor]:
        names = self.beside[whole]
        pieces = tensor.split([self.rows[name] for name in names]) if by_row else [tensor] * len(names)
        return {name: piece.clone() for name, piece in zip(names, pieces, strict=True)}


def _one_below_the_other(joints: Iterable[Joint]) -> dict[str, tuple[str, ...]]:
    """Return the parts of tensors that are several, the rows of one after another, by the whole's name."""
    return {joint.whole: joint.parts[0] for joint in joints if joint.axis == 0 and not joint.is_stacked}


def _together(pieces: list[Tensor], *, by_row: bool) -> Tensor:
    return torch.cat(pieces) if by_row else pieces[0].clone()


class Moments:
    """Mean of x xᵀ over the inputs x of every linear layer, float32, while a network runs.

    Places that an attention mask leaves out, such as padding, do not count. A layer that several places of
    the network share counts the inputs of all.

    Args:
        network: Runs meanwhile.
        names: What files call its parameters.
        only: Weights of the layers that count, by the network's names; None: all.
    """

    def __init__(self, network: Any, names: FileNames, only: Container[str] | None = None) -> None:
        self._network, self._names, self._only, self._stack = network, names, only, ExitStack()
        self._sums: dict[str, Tensor] = {}
        self._counts = Counter[str]()
        self._transposed: list[str] = []

    def __enter__(self) -> Moments:
        counted = {}
        for name, module, is_transposed in linear_layers(self._network):
            weight = f"{name}.weight"
            if self._names.has(weight) and (self._only is None or weight in self._only):
                counted[weight] = module
                self._transposed += [weight] * is_transposed
        self._stack.enter_context(seeing_inputs(self._network, counted, self._count))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _count(self, name: str, rows: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = rows.new_zeros((rows.shape[1], rows.shape[1]))
        self._sums[name].addmm_(rows.T, rows)
        self._counts[name] += len(rows)

    def include(self, other: Moments) -> None:
        """Add what another one counted, of other layers."""
        self._sums |= other._sums
        self._counts += other._counts
        self._transposed += other._transposed

    def mean(self, weight: str) -> Tensor | None:
        """Return the mean of one layer, "inputs inputs" on its device; None where it did not run."""
        return self._sums[weight] / self._counts[weight] if self._counts[weight] else None

    def result(self, where: str) -> Statistics:
        """Return the means on the CPU, and which layers have their inputs as rows of their weights.

        Args:
            where: Names the model in messages.

        Raises:
            EvaluationError: If no layer ran, or a mean is not finite.
        """
        seen = sorted(name for name, count in self._counts.items() if count)
        if not seen:
            raise EvaluationError(
                "no linear layer of the base model's files ran, so there are no gram statistics",
                where=where,
                expected="layers of torch.nn.Linear, or of transformers' Conv1D",
                hint="Choose a method that needs no statistics of this kind.",
            )
        means = {name: (self._sums[name] / self._counts[name]).cpu().contiguous() for name in seen}
        turned = self._names.in_files(
            {name: means[name] for name in self._transposed if name in means}, by_row=False
        )
        told = {TRANSPOSED: json.dumps(sorted(turned)), "inputs": _range(self._counts[name] for name in seen)}
        return checked(self._names.in_files(means, by_row=False), where), told


@contextmanager
def seeing_inputs(
    network: Any, layers: Mapping[str, Any], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Give each input of some layers away while a network runs: the layer's name, and float32 rows.

    There is a row for each place that no attention mask leaves out.
    """
    masks: list[Any] = []  # of the calls that go on, the innermost last; layers' own have other shapes

    def enter(module: Any, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        masks.append(options.get("attention_mask"))

    def leave(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        masks.pop()

    def see(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        found = inputs[0].detach()
        fitting = (mask for mask in reversed(masks) if getattr(mask, "shape", None) == found.shape[:-1])
        if (mask := next(fitting, None)) is not None:
            found = found[mask.to(found.device) != 0]
        take(name, found.reshape(-1, found.shape[-1]).float())

    with ExitStack() as stack:
        for module in network.modules():
            if "attention_mask" in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(see, name)).remove)
        yield


def linear_layers(network: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield the linear layers of a network, their names, and whether inputs are the rows of their weights."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module, isinstance(module, Conv1D)


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _fisher(evaluator: Evaluator, model: LoadedModel, batches: Iterable[Any], names: FileNames) -> Statistics:
    """Return for every element the mean over examples of its expected squared gradient.

    The expectation is over the answers that the evaluator yields, each with its probability.
    """
    answers = likelihoods_of(evaluator)
    named = {name: value for name, value in model.network.named_parameters() if names.has(name)}
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in named.items()}
    count = 0
    with torch.enable_grad():
        for value in named.values():
            value.requires_grad_(True)
        for batch in batches:
            count += 1
            for probability, likelihood in answers(model, batch):
                _add_squares(sums, named, likelihood, probability)
    tensors = names.in_files({name: (total / count).cpu() for name, total in sums.items()}, by_row=True)
    return _with_scale(checked(tensors, model.name), model.name)


def likelihoods_of(evaluator: Evaluator) -> Callable[[LoadedModel, Any], Iterator[tuple[float, Tensor]]]:
    """Return what gives the log-likelihoods of an evaluator's answers.

    Raises:
        EvaluationError: If it tells none.
    """
    if not hasattr(evaluator, "log_likelihoods"):
        raise EvaluationError(
            "this evaluator tells no log-likelihoods that could be differentiated, which fisher needs",
            key=("statistics", "evaluator"),
            expected="image-classification, text-classification or log-likelihood",
            hint="Name one of them: statistics: {evaluator: ..., data: ...}.",
        )
    found: Callable[[LoadedModel, Any], Iterator[tuple[float, Tensor]]] = evaluator.log_likelihoods
    return found


def _add_squares(
    sums: Mapping[str, Tensor], named: Mapping[str, Tensor], likelihood: Tensor, probability: float
) -> None:
    """Add the squared gradient of a log-likelihood, times the probability of its answer."""
    found = torch.autograd.grad(likelihood, [*named.values()], retain_graph=True, allow_unused=True)
    for total, gradient in zip(sums.values(), found, strict=True):
        if gradient is not None:
            total.add_(gradient.float().square(), alpha=probability)


def _with_scale(tensors: dict[str, Tensor], where: str) -> Statistics:
    """Return Fisher information with its root mean square over all elements, without what is zero whole."""
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    scale = (squares / max(1, sum(tensor.numel() for tensor in tensors.values()))) ** 0.5
    if not scale:
        raise EvaluationError(
            "no parameter in the base model's files changes its answers, so there are no fisher statistics",
            where=where,
            hint="Check that the evaluator fits the model.",
        )
    return tensors, {SCALE: repr(scale)}


def checked(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return statistics, if all of them are finite.

    Raises:
        EvaluationError: If one is not.
    """
    if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise EvaluationError(
            f"statistics of {listed(wrong, 2)} are not finite",
            where=where,
            hint="The checkpoint is damaged, or values exceed what its dtype holds; look at the examples.",
        )
    return tensors
