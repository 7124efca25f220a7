"""Conditions that a merge meets on this machine: packages, memory, disk, Hub, devices; for `doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from hub_magmax.errors import HubMagmaxError
from hub_magmax.files import existing_parent
from hub_magmax.registry import EVALUATORS, LOCATIONS, METHODS
from hub_magmax.text import TOKEN_VARIABLES, format_bytes

#: Seconds to wait for the Hub, and for all that a request needs (name servers have no time-out of their own).
REQUEST_SECONDS, ANSWER_SECONDS = 4.0, 6.0

#: Bytes below which a merge is likely to be stopped: of memory, and on a disk.
_LEAST_MEMORY, _LEAST_DISK = 500_000_000, 100_000_000

_PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "datasets", "accelerate", "numba")

#: Packages of which one tells whether an extra is there, and what it is for.
_EXTRAS = {
    "quickstart": ("scikit-learn", "the small example"),
    "lm-eval": ("lm-eval", "its tasks as evaluation"),
    "signing": ("model-signing", "signatures"),
}


@dataclass(frozen=True)
class Condition:
    """One thing that a merge may need.

    Attributes:
        subject: Its name.
        text: What was found, for people.
        facts: The same for programs.
        problem: What will stop a merge, and what to do; empty where nothing will.
    """

    subject: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def conditions() -> Iterator[Condition]:
    """Look at everything; no look takes longer than some seconds, whatever the network does."""
    yield _packages()
    yield _processor()
    yield _memory()
    yield from _disks()
    yield from _hub()
    yield _devices()
    yield _loops()
    yield _extras()
    yield _plugins()


def _packages() -> Condition:
    found = {name: _version(name) for name in ("hub_magmax", *_PACKAGES)}
    found = {"python": platform.python_version(), **found}
    missing = ", ".join(name for name, number in found.items() if number is None)
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    problem = f"not installed: {missing}; run `pip install hub-magmax` again" if missing else ""
    return Condition("versions", text, found, problem)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> Condition:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores, {platform.machine()}, {platform.system()} {platform.release()}"
    text += f"; OMP_NUM_THREADS={threads}" if threads else ""
    facts = {"cores": cores, "machine": platform.machine(), "omp_num_threads": threads}
    return Condition("processor", text, facts)


def _memory() -> Condition:
    free, total = _available_memory()
    if free is None or total is None:
        return Condition("memory", "unknown", {"free_bytes": None, "total_bytes": None})
    facts = {"free_bytes": free, "total_bytes": total}
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    lack = f"a merge needs about {format_bytes(_LEAST_MEMORY)}; end other programs"
    return Condition("memory", text, facts, lack if free < _LEAST_MEMORY else "")


def _available_memory() -> tuple[int | None, int | None]:
    """Return the bytes that can be had and all that there are, within the limits of a container."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = found["MemAvailable"], found["MemTotal"]
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
            free, total = min(free, max(0, limit - used)), min(total, limit)
        return free, total
    with suppress(OSError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    return None, None


def _disks() -> Iterator[Condition]:
    from huggingface_hub import constants

    yield _disk("output", Path.cwd(), "go to a folder that you may write to, or give --output")
    yield _disk("temporary", Path(tempfile.gettempdir()), "set TMPDIR to another folder")
    yield _disk("Hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder")


def _disk(subject: str, folder: Path, hint: str) -> Condition:
    there = existing_parent(folder)
    facts: dict[str, Any] = {"folder": str(folder), "free_bytes": None}
    try:
        free = facts["free_bytes"] = shutil.disk_usage(there).free
    except OSError as error:
        return Condition(subject, str(folder), facts, f"it cannot be read ({error.strerror}); {hint}")
    if not os.access(there, os.W_OK | os.X_OK):
        problem = f"it cannot be written; {hint}"
    else:
        problem = f"the disk is nearly full; {hint}" if free < _LEAST_DISK else ""
    return Condition(subject, f"{format_bytes(free)} free in {folder}", facts, problem)


def _hub() -> Iterator[Condition]:
    """Look at the token and whether the Hub answers, by one request."""
    from huggingface_hub import constants, get_token

    from hub_magmax.hub import hub_api

    facts: dict[str, Any] = {"endpoint": constants.ENDPOINT, "answers": None, "seconds": None}
    try:
        hub_api()
    except HubMagmaxError as error:
        yield Condition("token", "there, and unusable", {"there": True, "user": None}, str(error))
        yield Condition("Hub", f"{constants.ENDPOINT} was not asked", facts)
        return
    token = get_token()
    if constants.HF_HUB_OFFLINE:
        yield _token(token, None)
        yield Condition("Hub", f"{constants.ENDPOINT} was not asked: HF_HUB_OFFLINE is set", facts)
        return
    started = time.perf_counter()
    answer = _within(ANSWER_SECONDS, lambda: _ask(f"{constants.ENDPOINT}/api/whoami-v2", token))
    yield _token(token, answer)
    if isinstance(answer, tuple):
        facts |= {"answers": True, "seconds": round(time.perf_counter() - started, 3)}
        status, _ = answer
        text = f"{constants.ENDPOINT} answers in {facts['seconds']:.2f} s"
        if status not in (200, 401, 403):
            hint = "try again later" if status >= 500 or status == 429 else "check HF_ENDPOINT and proxies"
            yield Condition("Hub", text, facts, f"the answer has status {status}; {hint}")
            return
        yield Condition("Hub", text, facts)
        return
    facts["answers"] = False
    hint = "check the network, proxies and HF_ENDPOINT; local folders and the cache do with HF_HUB_OFFLINE=1"
    yield Condition("Hub", f"{constants.ENDPOINT} does not answer ({answer})", facts, hint)


def _token(token: str | None, answer: tuple[int, Any] | str | None) -> Condition:
    if token is None:
        text = "none: public models can be read, and nothing can be published"
        return Condition("token", text, {"there": False, "from": None, "user": None})
    names = [name for name in TOKEN_VARIABLES if os.environ.get(name, "").strip()]
    facts = {"there": True, "from": names[0] if names else "hf auth login", "user": None, "role": None}
    text = f"there, from {facts['from']}"
    if not isinstance(answer, tuple):
        return Condition("token", text, facts)
    status, body = answer
    if status == 200 and isinstance(body, dict):
        facts |= {"user": body.get("name"), "role": _role(body)}
        role = f", role {facts['role']}" if facts["role"] else ""
        return Condition("token", f"{text}: {facts['user']}{role}", facts)
    hint = "run `hf auth login` again, or set HF_TOKEN to one that is valid"
    return Condition("token", text, facts, f"the Hub refuses it; {hint}" if status in (401, 403) else "")


def _role(body: Mapping[str, Any]) -> str | None:
    """Return what a token may do, by the Hub's answer."""
    for key in ("auth", "accessToken"):
        body = body.get(key) or {}
    return body.get("role")


def _ask(url: str, token: str | None) -> tuple[int, Any] | str:
    """Return status and values of an answer, or why there is none."""
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        headers = build_hf_headers(token=token or False)
        response = get_session().get(url, headers=headers, timeout=REQUEST_SECONDS)
        return response.status_code, response.json() if response.status_code == 200 else None
    except Exception as error:  # whatever a library raises about an address, a proxy, a certificate
        return type(error).__name__


def _within(seconds: float, ask: Callable[[], tuple[int, Any] | str]) -> tuple[int, Any] | str:
    """Return what `ask` returns, or that there is no answer after `seconds`."""
    found: list[tuple[int, Any] | str] = []
    thread = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer in {seconds:g} s"


def _devices() -> Condition:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Condition("GPU", "unknown", {"devices": []}, f"torch cannot be imported ({error})")
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found.append(
                {"name": f"cuda:{number}", "kind": properties.name, "bytes": properties.total_memory}
            )
    elif torch.backends.mps.is_available():
        found.append({"name": "mps", "kind": platform.processor(), "bytes": None})
    shown = [
        f"{device['name']} {device['kind']}"
        + (f", {format_bytes(device['bytes'])}" if device["bytes"] else "")
        for device in found
    ]
    text = "; ".join(shown) or "none that torch can use; merges need none"
    return Condition("GPU", text, {"devices": found})


def _loops() -> Condition:
    from hub_magmax.kernels.compiled import cache

    try:
        loops = [loop for loop in vars(cache).values() if isinstance(loop, cache.Loop)]
        kept = sum(loop.is_kept() for loop in loops)
    except (ImportError, OSError) as error:
        return Condition("loops", "unknown", {"kept": None}, f"llvmlite cannot be imported ({error})")
    folders = [str(folder) for folder in cache.folders() if _is_writable(folder)]
    facts = {"kept": kept, "all": len(loops), "folder": folders[0] if folders else None}
    text = f"{kept} of {len(loops)} kinds are compiled and kept"
    text += "; others take 2 to 15 s each, when a merge first needs them" if kept < len(loops) else ""
    text += "" if folders else "; no folder can keep them, so every process compiles (set XDG_CACHE_HOME)"
    return Condition("loops", text, facts)


def _is_writable(folder: Path) -> bool:
    there = existing_parent(folder)
    return os.access(there, os.W_OK | os.X_OK)


def _extras() -> Condition:
    facts = {name: _version(package) is not None for name, (package, _) in _EXTRAS.items()}
    found = [name for name, there in facts.items() if there]
    missing = [f"{name} (for {_EXTRAS[name][1]})" for name, there in facts.items() if not there]
    text = ", ".join(found) or "none"
    if missing:
        text += f"; not installed: {', '.join(missing)}: pip install 'hub-magmax[NAME]'"
    return Condition("extras", text, facts)


def _plugins() -> Condition:
    points = [point for kind in (METHODS, EVALUATORS, LOCATIONS) for point in entry_points(group=kind.group)]
    found = sorted({(point.name, point.dist.name if point.dist else "") for point in points})
    text = ", ".join(f"{name} ({package})" for name, package in found) or "none"
    return Condition("plug-ins", text, {"found": [list(pair) for pair in found]})
