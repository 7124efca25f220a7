"""GPTQ: weights rounded column after column, whose errors the columns after them make up for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hub_magmax.evaluation.collecting import linear_layers, seeing_inputs
from hub_magmax.evaluation.quantizing import on_steps, round_layer, rounded_layers, row_steps
from hub_magmax.recipe.blocks import block_of

if TYPE_CHECKING:
    from torch.nn import Module

#: Share of the mean of a Hessian's diagonal that is added to it, as in the authors' code.
DAMPING = 0.01

#: Columns whose errors reach the columns behind them in one product.
_WIDTH = 128


def rounded_by_gptq(network: Module, bits: int, run: Callable[[Any], object]) -> Any:
    """Return a copy of a network with weights of `bits` bits, on the values that `rounded` may use.

    Linear layers are rounded by GPTQ, those of a block by the inputs that they have behind blocks that are
    rounded already; linear layers outside of blocks come last. All other layers, and those that do not run,
    are rounded to the nearest.

    Args:
        network: Has the weights.
        bits: At least 2.
        run: Runs a network on the examples for calibration; their labels play no part.

    Source: Frantar, Ashkboos, Hoefler and Alistarh (arXiv:2210.17323), with columns in their own order.
    """
    shrunk = copy.deepcopy(network)
    layers = rounded_layers(shrunk)
    linear = {name: turned for name, _, turned in linear_layers(shrunk) if name in layers}
    with torch.no_grad():
        for name in (name for name in layers if name not in linear):
            round_layer(layers[name], bits)
        for group in _groups(linear):
            sums = _moments(shrunk, {name: layers[name] for name in group}, run)
            for name in group:
                _round(layers[name], sums.get(name), bits, linear[name])
    return shrunk


def _round(layer: Any, moment: Tensor | None, bits: int, transposed: bool) -> None:
    """Round the weight of a linear layer in place, to the nearest if there is no moment of its inputs."""
    if moment is None:
        round_layer(layer, bits)
        return
    found = round_columns(layer.weight.T if transposed else layer.weight, moment, bits)
    layer.weight.copy_(found.T if transposed else found)


def _groups(names: Mapping[str, object]) -> list[list[str]]:
    """Return layers by block, in order; those outside of blocks last."""
    blocks: dict[tuple[str, int] | None, list[str]] = {}
    for name in names:
        block = block_of(f"{name}.weight")
        blocks.setdefault(None if block is None else (block.stack, block.number), []).append(name)
    outside = blocks.pop(None, [])
    return [*blocks.values(), outside] if outside else [*blocks.values()]


def _moments(
    network: Module, layers: Mapping[str, Module], run: Callable[[Any], object]
) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """Return the sum of x xᵀ over all inputs x of each layer that runs; half the Hessian of its objective."""
    sums: dict[str, Tensor] = {}

    def count(name: str, rows: Tensor) -> None:
        start = sums.setdefault(name, torch.zeros(2 * rows.shape[1:], device=rows.device))
        start.addmm_(rows.T, rows)

    with seeing_inputs(network, layers, count):
        run(network)
    return sums


def round_columns(
    weight: Float[Tensor, "rows inputs"],
    moment: Float[Tensor, "inputs inputs"],
    bits: int,
    damping: float = DAMPING,
) -> Float[Tensor, "rows inputs"]:
    """Round a layer's weights so that its outputs change little: small tr(Δ M Δᵀ), with Δ the change.

    Columns are rounded in order, each to the values that `round_rows` has for its row. The columns behind it
    then move to where the objective is least.

    Args:
        weight: One row per output.
        moment: M, the sum or mean of x xᵀ over the inputs x.
        bits: At least 2.
        damping: Share of the mean of M's diagonal that is added to the diagonal.
    """
    steps, size = row_steps(weight, bits), moment.diagonal().double().mean()
    if not size > 0:
        return on_steps(weight.float(), steps, bits).to(weight.dtype)
    added = damping * size * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    # Row i of this factor, over its first element, is what an error of column i asks of the later ones.
    factor = torch.linalg.cholesky(torch.linalg.inv(moment.double() + added), upper=True)
    left, done = weight.double(), torch.empty_like(weight, dtype=torch.float32)
    to_grid = partial(on_steps, steps=steps, bits=bits)
    for start in range(0, len(moment), _WIDTH):
        end = min(start + _WIDTH, len(moment))
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            done[:, column : column + 1] = to_grid(left[:, column : column + 1].float())
            error = (left[:, column] - done[:, column]) / factor[column, column]
            left[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return done.to(weight.dtype)
