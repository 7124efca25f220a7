"""The choice of a backend for a merge.

Measured on one thread, 2^18 elements, five bfloat16 checkpoints: 60 to 140 ns per element operation by
operation, because each one moves the chunk through memory; .5 to 1.5 ns by a compiled loop. Compiling takes
six to fifteen seconds, once per environment.
"""

from __future__ import annotations

from importlib import import_module

from hub_magmax.kernels.backend import DEVICES, Backend
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.reference import Reference
from hub_magmax.text import step

#: Merging more elements takes longer operation by operation than compiling does ...
COMPILE_ABOVE_ELEMENTS = 2**27
#: ... and more than these longer than loading what was compiled, a twentieth of a second; where only a part
#: of it was, the rest is compiled, once.
LOAD_ABOVE_ELEMENTS = 2**21


def is_fused(num_elements: int, device: str | None = None) -> bool:
    """Say whether merging `num_elements` is left to compiled loops, which do without torch."""
    is_worth_it = num_elements >= COMPILE_ABOVE_ELEMENTS or Compiled.is_kept()
    return device is None and num_elements >= LOAD_ABOVE_ELEMENTS and is_worth_it


def compiles_first(num_elements: int, device: str | None = None) -> bool:
    """Say whether that compiles the loops, once for this processor and this version."""
    return is_fused(num_elements, device) and not Compiled.is_kept()


def choose_backend(num_elements: int, device: str | None = None) -> Backend:
    """Return the fastest backend for merging `num_elements`, compiling and loading included.

    Args:
        num_elements: Of all merged tensors.
        device: Names where to compute instead of choosing, such as `cuda:1`; one of `DEVICES`.

    Raises:
        RecipeError: If this machine has no such device.
    """
    if device is not None:
        found: Backend = import_module(DEVICES[device.partition(":")[0]]).backend_on(device)
        return found
    if is_fused(num_elements):
        return Compiled()
    with step("loading torch"):
        import_module("torch")  # now, by one thread, for its settings to hold from the beginning
    return Reference()
