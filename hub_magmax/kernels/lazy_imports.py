"""torch and NumPy, imported when something of them is first used, and torch's settings for merging threads.

A merge by compiled loops uses nothing of torch, and is often over before it would be imported: that takes 1.6
seconds, measured on two cores, as long as averaging six checkpoints of 0.25B parameters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Array", "Rows", "Tensor", "inference", "is_imported", "np", "num_threads", "one_thread", "torch"]

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Float32
    from torch import Tensor

    #: Arrays that compiled loops and torch take alike.
    Array = Tensor | np.ndarray
else:
    Array = Tensor = Any

    class _Lazily:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._module), name)

    np, torch = _Lazily("numpy"), _Lazily("torch")


def is_imported() -> bool:
    """Say whether torch was imported, by whomever."""
    return "torch" in sys.modules


if TYPE_CHECKING or is_imported():
    from jaxtyping import Float32

    #: One task vector per task: a list of rows, or a tensor with the tasks along its first axis.
    Rows = Sequence[Float32[torch.Tensor, "*shape"]] | Float32[torch.Tensor, " tasks *shape"]
else:  # nothing checks the annotation then, so torch need not be imported for it
    Rows = Any


def inference() -> AbstractContextManager[object]:
    """Return torch's mode without gradients, for this thread; nothing where torch is not imported."""
    return torch.inference_mode() if is_imported() else nullcontext()


def num_threads() -> int:
    """Return the number of threads to work with: torch's own, or its default where it is not imported."""
    if is_imported():
        return torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdecimal() and int(limit):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread: tensors are shared between threads already."""
    if not is_imported():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
