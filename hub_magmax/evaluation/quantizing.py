"""Quantised weights: rounded to a few bits per output row, in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn import Module


def round_rows(weight: Float[Tensor, "rows *rest"], bits: int) -> Float[Tensor, "rows *rest"]:
    """Round each row to the nearest of 2^bits − 1 evenly spaced values that lie symmetrically around zero.

    The largest magnitude of a row is kept; ties go to the even number of steps. A row of zeros stays.

    Args:
        weight: One row per output, of any floating dtype, which the result shares.
        bits: At least 2.
    """
    return on_steps(weight.float(), row_steps(weight, bits), bits).to(weight.dtype)


def row_steps(weight: Float[Tensor, "rows *rest"], bits: int) -> Float[Tensor, "rows *ones"]:
    """Return the distance between the values that each row is rounded to, float32."""
    largest = weight.float().abs().reshape(len(weight), -1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
    return torch.where(largest > 0, largest / _most(bits), 1.0)


def on_steps(
    values: Float[Tensor, "rows *rest"], steps: Float[Tensor, "rows *ones"], bits: int
) -> Float[Tensor, "rows *rest"]:
    """Return the nearest of each row's values, float32, where `row_steps` says how far they are apart."""
    return (values / steps).round().clamp(-_most(bits), _most(bits)) * steps


def _most(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def rounded(network: Any, bits: int) -> Any:
    """Return a copy of a network whose linear and convolution layers have weights of `bits` bits.

    Biases, norms and embeddings stay as they are, as in common weight-only formats; an embedding that a
    linear layer shares is rounded with it. Activations are not rounded.
    """
    shrunk = copy.deepcopy(network)
    with torch.no_grad():
        for layer in rounded_layers(shrunk).values():
            round_layer(layer, bits)
    return shrunk


def round_layer(layer: Any, bits: int) -> None:
    """Round the weight of a layer in place, without a gradient."""
    layer.weight.copy_(_round(layer.weight, bits, is_transposed(layer)))


def straight_through(network: Module, bits: int) -> dict[str, Tensor]:
    """Return the weights that `rounded` rounds, rounded, by the names of a network's parameters.

    A gradient with respect to one of them reaches the weight itself unchanged, the straight-through estimator
    of Bengio, Léonard and Courville (arXiv:1308.3432), also where the weight is the largest of its row.
    """
    apply: Callable[..., Tensor] = _StraightThrough.apply
    return {
        f"{name}.weight": apply(layer.weight, bits, is_transposed(layer))
        for name, layer in rounded_layers(network).items()
    }


class _StraightThrough(torch.autograd.Function):
    """Rounding whose derivative is taken to be 1."""

    @staticmethod
    def forward(context: Any, weight: Tensor, bits: int, transposed: bool) -> Tensor:
        return _round(weight, bits, transposed)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def rounded_layers(network: Module) -> dict[str, Any]:
    """Return the layers whose weights are rounded, by name; of those that share a weight, the first."""
    found: dict[int, tuple[str, Module]] = {}
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and _has_rows(module):
            found.setdefault(id(weight), (name, module))
    return dict(found.values())


def _round(weight: Tensor, bits: int, transposed: bool) -> Tensor:
    return round_rows(weight.T, bits).T if transposed else round_rows(weight, bits)


def is_transposed(layer: Module) -> bool:
    """Say whether a layer keeps one output per column, as those of GPT-2."""
    return type(layer).__name__ == "Conv1D"


def _has_rows(module: Module) -> bool:
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, layers) or is_transposed(module)
