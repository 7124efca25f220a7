"""Early stop of a training: held-out examples, their loss on the way, and the weights at the lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hub_magmax.errors import NonFiniteError
from hub_magmax.evaluation.evaluators.loading import LoadedModel
from hub_magmax.processes import Processes
from hub_magmax.recipe.training import HeldOut
from hub_magmax.text import Report
from hub_magmax.training.step_examples import StepExamples


def finite(loss: float, step: int, kind: str = "loss") -> float:
    """Return a loss; raise NonFiniteError where it is none."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the {kind} is {loss} in step {step:,}",
            where="training",
            expected="a finite loss",
            hint="Lower training.learning_rate, or clip gradients by training.clip_norm.",
        )
    return loss


def held_out_loss(
    model: LoadedModel, network: nn.Module, step_examples: StepExamples, processes: Processes
) -> float:
    """Return the mean loss of held-out examples without dropout, the same in every process.

    Args:
        model: In training.
        network: Returns the summed loss of some batches, times a factor.
        step_examples: Has the held-out examples.
        processes: Each of which computes a share.
    """
    held = step_examples.held_out
    assert held is not None
    own, size = range(processes.rank, len(held.rows), processes.count), step_examples.mixture.batch_size
    total = 0.0
    network.eval()
    with torch.no_grad():
        for start in range(0, len(own), size):
            rows = held.rows.select(own[start : start + size])
            total += network(step_examples.evaluator.encode(model, rows, held.columns, len(rows)), 1.0).item()
    network.train()
    return sum(processes.gather(total)) / len(held.rows)


def trained_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that training changes, and the buffers that are saved, as they are in memory."""
    saved = network.state_dict().keys()
    weights = {name: value for name, value in network.named_parameters() if value.requires_grad}
    return weights | {name: value for name, value in network.named_buffers() if name in saved}


def set_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network what `trained_weights` returned of one like it."""
    for name, value in trained_weights(network).items():
        value.data.copy_(weights[name])


@dataclass
class Watch:
    """Losses on held-out examples until now, and the weights at the lowest of them.

    accelerate stores it in states, by `state_dict`, and loads it from there.

    Attributes:
        spec: When the loss is measured, and how long it may go without a lower one.
        network: Whose weights are trained.
        loss: Measures the loss of the held-out examples.
        report: Called with a line about each measurement.
        losses: The loss by the number of steps before it.
        best: Weights at the lowest loss; the earliest of equal ones.
    """

    spec: HeldOut
    network: nn.Module
    loss: Callable[[], float]
    report: Report = lambda line: None
    losses: dict[int, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_step(self) -> int:
        return min(self.losses, key=lambda step: self.losses[step])

    def stops(self, done: int, num_steps: int) -> bool:
        """Measure the loss after so many of all steps, if that is due, and say whether training stops."""
        if done % self.spec.every and done != num_steps:
            return False
        self.losses[done] = loss = finite(self.loss(), done, "held-out loss")
        least = self.best_step
        if least == done:
            found = trained_weights(self.network)
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in found.items()}
        about = "the lowest so far" if least == done else f"{self.losses[least]:.4g} after step {least:,}"
        self.report(f"step {done:,} of {num_steps:,}: held-out loss {loss:.4g}, {about}")
        is_over = sum(step > least for step in self.losses) >= self.spec.patience
        if is_over and done < num_steps:
            self.report("stopping early, since the held-out loss no longer falls")
        return is_over

    def restore(self) -> None:
        """Give the network the weights at the lowest loss."""
        set_weights(self.network, self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from here needs."""
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.losses, self.best = state["losses"], state["best"]

    def to_dict(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return {"loss": [[step, loss] for step, loss in self.losses.items()], "best_step": self.best_step}
