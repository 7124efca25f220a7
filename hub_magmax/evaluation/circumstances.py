"""Digests of what scores depend on besides the models: software, this package's code, the processor."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Packages whose versions can change a score.
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "pillow", "accelerate", "lm_eval")


@cache
def circumstances() -> dict[str, Any]:
    """Return versions of software, a digest of this package's code, and the processor that runs models."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "code": _code_digest()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    cuda = torch.cuda.is_available()
    found["processor"] = torch.cuda.get_device_name() if cuda else platform.machine()
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = torch.get_num_threads()
    return found


def _code_digest() -> str:
    """Return the sha256 of all Python files of this package: its version alone does not tell every change."""
    folder = Path(__file__).parents[1]
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        hasher.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return hasher.hexdigest()


def folder_state(folder: Path) -> list[list[Any]]:
    """Return name, size, inode and times of the files at the top of a folder: any change shows in them."""
    with suppress(OSError):
        files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
        states = [(os.path.basename(path), os.stat(path)) for path in files]  # noqa: PTH119, PTH116
        return [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states]
    return []
