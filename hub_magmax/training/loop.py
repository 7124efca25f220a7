"""Loop of one task's training: loss, gradient, step, state, on accelerate's devices and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import get_scheduler

from hub_magmax.errors import RecipeError
from hub_magmax.evaluation.evaluators import Evaluator
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.evaluation.quantizing import straight_through
from hub_magmax.processes import Processes
from hub_magmax.recipe.training import Training
from hub_magmax.recipe.values import num_bits
from hub_magmax.text import Report, nearest
from hub_magmax.training.order import seed_of
from hub_magmax.training.states import TrainingFolder
from hub_magmax.training.step_examples import StepExamples
from hub_magmax.training.stopping import Watch, finite, held_out_loss, set_weights, trained_weights

#: Lines about the loss in one task's training.
NUM_REPORTS = 10

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Course:
    """Losses of one task's training.

    Attributes:
        losses: Of each step.
        held_out: As `Watch.to_dict` returns it, where examples were held out.
    """

    losses: list[float]
    held_out: dict[str, Any] = field(default_factory=dict)


class _Losses(nn.Module):
    """A network inside a module whose output is the loss, so that any network is trained by processes."""

    def __init__(self, model: LoadedModel, evaluator: Evaluator, smoothing: float) -> None:
        super().__init__()
        self.network, self._model, self._smoothing = model.network, model, smoothing
        self._losses: Any = evaluator.losses  # type: ignore[attr-defined]  # optional, and checked before

    def forward(self, batches: list[Any], factor: float) -> Tensor:
        losses = [self._losses(self._model, batch, self._smoothing) for batch in batches]
        total: Tensor = torch.cat(losses).sum() * factor
        return total


class _RoundedLosses(nn.Module):
    """The loss of a network with weights of a few bits; those that are trained are not rounded."""

    def __init__(self, losses: _Losses, bits: int) -> None:
        super().__init__()
        self.losses, self._bits = losses, bits

    def forward(self, *inputs: Any) -> Tensor:
        weights = straight_through(self.losses.network, self._bits)
        named = {f"network.{name}": weight for name, weight in weights.items()}
        total: Tensor = functional_call(self.losses, named, inputs)
        return total


def _network(model: LoadedModel, evaluator: Evaluator, spec: Training, smoothing: float) -> nn.Module:
    """Return what computes the loss."""
    losses, kind = _Losses(model, evaluator, smoothing), spec.quantization_aware
    return losses if kind is None else _RoundedLosses(losses, num_bits(kind))


@dataclass(frozen=True)
class Optimization:
    """AdamW on a schedule of learning rates.

    Attributes:
        num_steps: Of the whole training.
        learning_rate: At its peak.
        weight_decay: AdamW's.
        schedule, warmup, clip_norm: As `training` has them in a recipe.
        on_cpu: Whether it stays on the CPU, where there is a GPU too.
    """

    num_steps: int
    learning_rate: float
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    clip_norm: float | None = 1.0
    on_cpu: bool = False


@dataclass(frozen=True)
class States:
    """States of a training on the disk, from which an interrupted one goes on.

    Attributes:
        folder: Where they are.
        processes: Which of how many processes this is.
        every: Steps after which one is written.
        watch: Part of the state that ends the training early; None where nothing does.
    """

    folder: TrainingFolder
    processes: Processes
    every: int
    watch: Watch | None = None

    def resume(self, accelerator: Accelerator) -> list[float]:
        """Load the latest state, and return the losses until then; none where there is no state."""
        accelerator.register_save_state_pre_hook(self._write_weights)
        accelerator.register_load_state_pre_hook(self._read_weights)
        if self.watch is not None:
            accelerator.register_for_checkpointing(self.watch)
        state = self.processes.first_decides(lambda: self.folder.latest)
        if state is None:
            return []
        with self.folder.readable(state):
            accelerator.load_state(str(state))
            return self.folder.losses(state)

    def ends(self, accelerator: Accelerator, losses: list[float], num_steps: int) -> bool:
        """Say whether the last step ends the training; write the state after it where that is due."""
        done = len(losses)
        is_over = self.watch is not None and self.watch.stops(done, num_steps)
        if is_over or done == num_steps:
            return True
        if done % self.every == 0:
            self._keep(accelerator, losses)
        return False

    def _keep(self, accelerator: Accelerator, losses: list[float]) -> None:
        place = self.processes.first_decides(lambda: self.folder.writing(len(losses)))
        accelerator.save_state(str(place))
        self.processes.wait()
        self.processes.first_decides(lambda: self.folder.keep(place, losses))

    def _write_weights(self, networks: list[nn.Module], all_weights: list[Any], place: str) -> None:
        """Write the weights that are trained, in place of all that accelerate would write."""
        all_weights.clear()
        if self.processes.is_first:
            weights = trained_weights(extract_model_from_parallel(networks[0]))
            save_file({name: value.contiguous() for name, value in weights.items()}, self._weights_of(place))

    def _read_weights(self, networks: list[nn.Module], place: str) -> None:
        set_weights(extract_model_from_parallel(networks[0]), load_file(self._weights_of(place)))
        networks.clear()

    def _weights_of(self, place: str) -> Path:
        return Path(place) / "trained.safetensors"


def train(
    model: LoadedModel,
    step_examples: StepExamples,
    spec: Training,
    num_steps: int,
    folder: TrainingFolder,
    processes: Processes,
    report: Report,
    advance: Callable[[int], None] | None,
) -> Course:
    """Train a model in place, from its latest state if there is one, and return how its losses went.

    Where examples are held out it ends with the weights at their lowest loss.

    Args:
        model: In float32; what the recipe freezes is frozen.
        step_examples: Examples of each step.
        spec: How to train.
        num_steps: Of the whole training.
        folder: Where states are kept.
        processes: Which of how many this is.
        report: Called with lines about the loss.
        advance: Called with the number of steps that were done.

    Raises:
        NonFiniteError: If the loss is not finite.
    """

    def arguments(step: int) -> tuple[list[Any], float]:
        # Dropout depends on the step alone, whatever was drawn before.
        torch.manual_seed(seed_of(step_examples.seed, f"step {step}, process {processes.rank}"))
        return step_examples.encoded(model, step, processes)

    optimization = Optimization(
        num_steps,
        spec.learning_rate,
        weight_decay=spec.weight_decay,
        schedule=spec.schedule,
        warmup=spec.warmup,
        clip_norm=spec.clip_norm,
    )
    watch = _watch(model, step_examples, spec, processes, report)
    losses = fit(
        _network(model, step_examples.evaluator, spec, spec.label_smoothing),
        arguments,
        optimization,
        States(folder, processes, spec.checkpoint_every, watch),
        report=report,
        advance=advance,
    )
    model.network.eval()
    if watch is None:
        return Course(losses)
    watch.restore()
    return Course(losses, watch.to_dict())


def _watch(
    model: LoadedModel, step_examples: StepExamples, spec: Training, processes: Processes, report: Report
) -> Watch | None:
    """Return what measures the loss of held-out examples, without label smoothing; None without them."""
    if spec.held_out is None:
        return None
    network = _network(model, step_examples.evaluator, spec, 0.0)
    loss = partial(held_out_loss, model, network, step_examples, processes)
    return Watch(spec.held_out, model.network, loss, report)


def fit(
    network: nn.Module,
    arguments: Callable[[int], tuple[Any, ...]],
    optimization: Optimization,
    states: States | None = None,
    *,
    report: Report = lambda line: None,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the parameters of a network that are not frozen, in place, and return the loss of each step.

    Args:
        network: Returns the loss.
        arguments: Returns what the network is called with in a step, by its number from 0.
        optimization: Number of steps, and how each changes the parameters.
        states: Where an interrupted call goes on; None begins anew.
        report: Called with lines about the loss.
        advance: Called with the number of steps that were done.

    Raises:
        NonFiniteError: If the loss is not finite.
    """
    accelerator = _accelerator(optimization)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optimization.learning_rate, weight_decay=optimization.weight_decay
    )
    num_steps = optimization.num_steps
    kind, num_rising = _SCHEDULES[optimization.schedule], int(optimization.warmup * num_steps)
    schedule = get_scheduler(kind, optimizer, num_rising, num_steps)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    network.train()
    advance = advance or (lambda count: None)
    losses = states.resume(accelerator) if states else []
    _tell_resumed(losses, num_steps, report, advance)
    for step in range(len(losses), num_steps):
        loss = network(*arguments(step))
        accelerator.backward(loss)
        if optimization.clip_norm is not None:
            accelerator.clip_grad_norm_(trained, optimization.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(finite(accelerator.reduce(loss.detach(), "mean").item(), step + 1))
        advance(1)
        _tell(losses, num_steps, report)
        if states and states.ends(accelerator, losses, num_steps):
            break
    return losses


def _accelerator(optimization: Optimization) -> Accelerator:
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)  # as CLIP's text tower
    if optimization.on_cpu:
        # device_placement=False: tensors stay on the CPU even where accelerate has settled on a GPU.
        return Accelerator(
            cpu=True, device_placement=False, mixed_precision="no", step_scheduler_with_optimizer=False
        )
    return Accelerator(
        cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False, kwargs_handlers=[kwargs]
    )


def _tell_resumed(
    losses: list[float], num_steps: int, report: Report, advance: Callable[[int], None]
) -> None:
    if losses:
        report(f"going on after step {len(losses):,} of {num_steps:,}")
        advance(len(losses))


def _tell(losses: list[float], num_steps: int, report: Report) -> None:
    """Report the mean loss of each tenth of the steps at its end."""
    done = len(losses)
    part = -(-num_steps // NUM_REPORTS)
    if done % part == 0 or done == num_steps:
        last = losses[-(done % part or part) :]
        report(f"step {done:,} of {num_steps:,}: loss {sum(last) / len(last):.4g}")


def frozen_parameters(model: LoadedModel, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters whose names match one of the globs.

    Raises:
        RecipeError: If a glob matches none, or all of them are frozen.
    """
    names = [name for name, _ in model.network.named_parameters()]
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"no parameter of {model.name} matches {pattern!r}",
                key=("training", "frozen", index),
                expected=f"a glob over names such as {names[0]} and {names[-1]}",
                hint=nearest(pattern, names).capitalize(),
            )
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in model.network.parameters()):
        raise RecipeError("every parameter is frozen, so nothing is trained", key=("training", "frozen"))


@contextmanager
def undisturbed(gpus: Sequence[int] | None = None) -> Iterator[None]:
    """Leave the random numbers of the process, and accelerate's idea of its device, as they were.

    Args:
        gpus: Those whose random numbers are used; None is all.
    """
    states = [(kind, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            for kind, state in states:  # an Accelerator would otherwise keep the process on the CPU
                kind._shared_state.clear()
                kind._shared_state.update(state)
