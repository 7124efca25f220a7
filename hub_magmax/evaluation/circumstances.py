"""Digests of what scores depend on besides the models: software, this package's code, the processor."""

from __future__ import annotations

import os
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
def circumstances() -> dict[str, Any]:
    """Return versions of software, a digest of this package's code, and the processor that runs models."""
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
    found["threads"] = torch.get_num_threads()
    return found


def folder_state(folder: Path) -> list[list[Any]]:
    """Return name, size, inode and times of the files at the top of a folder: any change shows in them."""
    with suppress(OSError):
        files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
        states = [(os.path.basename(path), os.stat(path)) for path in files]  # noqa: PTH119, PTH116
        return [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states]
    return []
