"""Quantised weights: rounded to a few bits per output row, in memory."""

from __future__ import annotations

import copy
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
    steps = 2 ** (bits - 1) - 1
    values = weight.float()
    largest = values.abs().reshape(len(weight), -1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
    scale = torch.where(largest > 0, largest / steps, 1.0)
    return ((values / scale).round().clamp(-steps, steps) * scale).to(weight.dtype)


def rounded(network: Any, bits: int) -> Any:
    """Return a copy of a network whose linear and convolution layers have weights of `bits` bits.

    Biases, norms and embeddings stay as they are, as in common weight-only formats; an embedding that a
    linear layer shares is rounded with it. Activations are not rounded.
    """
    shrunk = copy.deepcopy(network)
    done: set[int] = set()
    with torch.no_grad():
        for module in shrunk.modules():
            weight = getattr(module, "weight", None)
            if not _has_rows(module) or not isinstance(weight, Tensor) or id(weight) in done:
                continue
            done.add(id(weight))
            # What GPT-2 is made of keeps one output per column.
            turned = type(module).__name__ == "Conv1D"
            weight.copy_(round_rows(weight.T, bits).T if turned else round_rows(weight, bits))
    return shrunk


def _has_rows(module: Module) -> bool:
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, layers) or type(module).__name__ == "Conv1D"
