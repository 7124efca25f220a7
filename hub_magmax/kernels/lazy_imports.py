"""torch, imported when something of it is first used.

A merge by compiled loops uses nothing of it, and is often over before it would be imported: that takes 1.6
seconds, measured on two cores, as long as averaging six checkpoints of 0.25B parameters.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch as torch  # noqa: PLC0414, so that others may import it from here

    #: What compiled loops take as well as torch does.
    Array = torch.Tensor | np.ndarray
else:
    Array = Any

    class _Lazily:
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("torch"), name)

    torch = _Lazily()


def is_imported() -> bool:
    """Say whether torch was imported, by whomever."""
    return "torch" in sys.modules


def inference() -> AbstractContextManager[object]:
    """Return torch's mode without gradients, for this thread; nothing where torch is not imported."""
    return torch.inference_mode() if is_imported() else nullcontext()
