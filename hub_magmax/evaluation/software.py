"""Digests of what scores depend on besides the models: software, this package's code, the processor."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hub_magmax.files import code_digest

#: Packages whose versions can change a score.
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "pillow", "accelerate", "lm_eval")


@cache
def software_used() -> dict[str, Any]:
    """Return versions of software, a digest of this package's code, and the processor that runs models.

    The number of threads is left out: it changes last bits of sums, and torchrun gives each process one.
    """
    import torch

    # The code of this package, whose version alone does not tell every change.
    folder = Path(__file__).parents[1]
    code = code_digest(folder.rglob("*.py"), folder)
    found: dict[str, Any] = {"python": platform.python_version(), "code": code}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    cuda = torch.cuda.is_available()
    found["processor"] = torch.cuda.get_device_name() if cuda else platform.machine()
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found
