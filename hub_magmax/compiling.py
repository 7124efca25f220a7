"""Passes compiled ahead of time, each in a process of its own, and kept for the next merge.

Compiling takes 10 to 20 s and needs a C++ compiler; loading what an earlier merge compiled takes 20 ms.
A package belongs to one text of the code, one version of torch and one kind of processor, and is looked
for under a digest of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hub_magmax.digest import digest
from hub_magmax.passes import Pass

#: What is asked of a pass: everything that is compiled into it.
Request = dict[str, Any]


def cache_folder() -> Path:
    """Return where compiled passes are kept: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hub_magmax" / "passes"


def package_path(request: Request) -> Path:
    """Return where the package for a request is, or will be."""
    name = digest([request, torch.__version__, platform.python_version(), _processor(), _code(request)])
    return cache_folder() / f"{name.removeprefix('sha256:')[:40]}.pt2"


@cache
def _processor() -> str:
    """Return what decides which instructions may be compiled in."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass  # not Linux
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"


def _code(request: Request) -> str:
    """Return the digest of the modules that a pass is made of."""
    names = ("hub_magmax.kernels", "hub_magmax.passes", "hub_magmax.randomness", request["module"])
    hasher = hashlib.sha256()
    for name in names:
        hasher.update(Path(str(import_module(name).__file__)).read_bytes())
    return hasher.hexdigest()


def request_for(combine: Callable[..., Tensor], facts: dict[str, Any], arguments: Any) -> Request | None:
    """Return what to ask for, or None where `combine` cannot be found again by its name.

    Args:
        combine: A function of a module.
        facts: What else decides the pass, as plain values.
        arguments: Nested tuples of tensors: examples of the pass's inputs.
    """
    module, name = combine.__module__, combine.__qualname__
    found = getattr(sys.modules.get(module), name, None)
    if found is not combine or module == "__main__":
        return None
    return {"module": module, "name": name, **facts, "arguments": _shapes(arguments)}


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return [_shapes(item) for item in value]


def _examples(shapes: Any) -> Any:
    if isinstance(shapes, dict):
        return torch.zeros(shapes["shape"], dtype=getattr(torch, shapes["dtype"]))
    return tuple(_examples(item) for item in shapes)


def load(path: Path) -> Callable[..., Sequence[Tensor]] | None:
    """Return a compiled pass; None where there is none, or it is not this user's own.

    The returned function gives other threads their turn while it computes.
    """
    try:
        facts = path.stat()
    except OSError:
        return None
    if hasattr(os, "getuid") and (facts.st_uid != os.getuid() or facts.st_mode & 0o022):
        return None  # somebody else could have put code there
    try:
        package: Callable[..., Sequence[Tensor]] = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # torch raises many kinds for a package of another machine
        logging.getLogger(__name__).info("a compiled pass cannot be loaded: %s", error)
        return None
    return package


def start(request: Request, path: Path) -> int:
    """Start compiling in a process of its own, which puts the package at `path` or fails; return its id.

    It may outlive this one: nobody waits for it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "hub_magmax.compiling", json.dumps(request), str(path)]
    silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)]
    return os.posix_spawn(sys.executable, command, environment, file_actions=silent)


def has_ended(process: int) -> bool:
    """Say whether a process that `start` started has come to its end."""
    return os.waitpid(process, os.WNOHANG)[0] != 0


def compile_package(request: Request, path: Path) -> None:
    """Compile the pass that `request` describes and put the package at `path`, complete or not at all."""
    torch.set_num_threads(1)
    combine = getattr(import_module(request["module"]), request["name"])
    step = Pass(combine, request["selects"], getattr(torch, request["dtype"]))

    class Module(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return step(*arguments)

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        package = Path(folder) / "pass.pt2"
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(Module(), _examples(request["arguments"]))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        package.chmod(0o600)
        package.replace(path)


def main() -> None:
    """Compile what `start` asked for."""
    compile_package(json.loads(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
