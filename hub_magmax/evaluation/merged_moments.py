"""Moments of the inputs that layers have behind merged blocks, block after block (RegMean++)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_magmax.evaluation.collecting import FileNames, Moments, Statistics, linear_layers
from hub_magmax.kernels.lazy_imports import Tensor, torch
from hub_magmax.methods.data_statistics import TensorStatistics
from hub_magmax.methods.inputs import least_squares
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.recipe.blocks import block_of


@dataclass(frozen=True)
class TaskRun:
    """A task's own model, in memory, and its examples.

    Attributes:
        network: Changed from its own weights to the merged ones.
        names: What the base model's files call its parameters.
        run: Runs the network on all examples.
        weight: Of the task in the preference.
    """

    network: Any
    names: FileNames
    run: Callable[[], object]
    weight: float


def merged_moments(tasks: Mapping[str, TaskRun], off_diagonal: float, ridge: float) -> dict[str, Statistics]:
    """Return the moments of all linear layers, by task.

    What is in no block is averaged first. Then block after block: the layers of each task's own block count
    their inputs, and the block is merged. At last come linear layers outside of blocks, such as a head.

    Args:
        tasks: In order.
        off_diagonal, ridge: As `regmean_plusplus` has them.
    """
    first = next(iter(tasks.values())).network
    linear = {f"{name}.weight": is_transposed for name, _, is_transposed in linear_layers(first)}
    found = {task: Moments(one.network, one.names) for task, one in tasks.items()}
    before, *groups = _groups(first, linear)
    merging = _Merging([*tasks.values()], linear, off_diagonal, ridge)
    with torch.no_grad():
        merging.average(before)
        for group in groups:
            seen = []
            for task, one in tasks.items():
                with Moments(one.network, one.names, only=frozenset(group)) as moments:
                    one.run()
                found[task].include(moments)
                seen.append(moments)
            merging.merge(group, seen)
    return {task: moments.result(task) for task, moments in found.items()}


def _groups(network: Any, linear: Mapping[str, bool]) -> list[list[str]]:
    """Return parameters merged together: outside of blocks, of each block in order, and layers outside."""
    outside: list[str] = []
    last: list[str] = []
    blocks: dict[tuple[str, int], list[str]] = {}
    for name, _ in network.named_parameters():
        if (block := block_of(name)) is not None:
            blocks.setdefault((block.stack, block.number), []).append(name)
        else:
            (last if name in linear else outside).append(name)
    return [outside, *blocks.values(), last]


@dataclass(frozen=True)
class _Merging:
    """Merges parameters of all tasks' networks in place.

    Attributes:
        tasks: In order; their weights sum to 1.
        linear: Weights of linear layers, by whether the inputs are their rows.
        off_diagonal, ridge: As `regmean_plusplus` has them.
    """

    tasks: Sequence[TaskRun]
    linear: Mapping[str, bool]
    off_diagonal: float
    ridge: float

    def average(self, names: Sequence[str]) -> None:
        for name in names:
            self._set(name, sum(one.weight * self._of(one, name).double() for one in self.tasks))

    def merge(self, names: Sequence[str], seen: Sequence[Moments]) -> None:
        """Merge layers by the moments of their inputs, and average what is none or did not run."""
        for name in names:
            means = [moments.mean(name) for moments in seen] if name in self.linear else [None]
            is_matrix = matrices_in(name, self._of(self.tasks[0], name).shape) is not None
            if is_matrix and all(mean is not None for mean in means):
                self._set(name, self._solved(name, [mean for mean in means if mean is not None]))
            else:
                self.average([name])

    def _solved(self, name: str, means: Sequence[Tensor]) -> Tensor:
        counting = [(one, mean) for one, mean in zip(self.tasks, means, strict=True) if one.weight]
        layers = torch.stack([self._of(one, name).float() for one, _ in counting])
        layers = layers.transpose(1, 2) if self.linear[name] else layers
        known = [_as_statistics(mean) for _, mean in counting]
        weights = [one.weight for one, _ in counting]
        found = least_squares(layers, weights, known, self.off_diagonal, self.ridge)
        return found.T if self.linear[name] else found

    def _of(self, one: TaskRun, name: str) -> Tensor:
        parameter: Tensor = one.network.get_parameter(name)
        return parameter

    def _set(self, name: str, values: Any) -> None:
        for one in self.tasks:
            self._of(one, name).copy_(values)


def _as_statistics(mean: Tensor) -> TensorStatistics:
    flat = mean.reshape(-1).cpu().numpy()
    return TensorStatistics(lambda start, stop: flat[start:stop], len(flat))
