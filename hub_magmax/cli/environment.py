"""Conditions that a merge meets on this machine: packages, memory, disk, Hub, devices; for `doctor`."""

from __future__ import annotations

import difflib
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hub_magmax.errors import HubMagmaxError
from hub_magmax.evaluation.score_cache import FOLDER_VARIABLE, score_folder
from hub_magmax.files import existing_parent
from hub_magmax.hub import ENDPOINT_HINT, PASSING_STATUSES, endpoint_problem, hub_api
from hub_magmax.registry import EVALUATORS, LOCATIONS, METHODS
from hub_magmax.text import TOKEN_VARIABLES, format_bytes

T = TypeVar("T")

#: Seconds to wait for the Hub, and for all that a request needs (name servers have no time-out of their own).
REQUEST_SECONDS, ANSWER_SECONDS = 4.0, 6.0

#: Bytes below which a merge is likely to be stopped: of memory, and on a disk.
_LEAST_MEMORY, _LEAST_DISK = 500_000_000, 100_000_000

#: The Hub's host where HF_ENDPOINT names no other, and the answer about one that a name server knows.
_USUAL_HOST, _KNOWN = "huggingface.co", "known"

_WITHOUT_HUB = (
    "Merges of folders do without it, and with --from-cache or HF_HUB_OFFLINE=1 those of models in the cache"
)

_PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "datasets", "accelerate", "numba")

#: Packages of which one tells whether an extra is there, and what it is for.
_EXTRAS = {
    "quickstart": ("scikit-learn", "the small example"),
    "lm-eval": ("lm-eval", "its tasks as evaluation"),
    "peft": ("peft", "LoRA adapters that finetune trains"),
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
        warning: What else will not work, and what does; empty where all does.
    """

    subject: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    warning: str = ""


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

    yield _disk("output", Path(), "go to a folder that you may write to, or give --output")
    yield _disk("temporary", _temporary_folder(), "set TMPDIR to another folder")
    cache = _disk("Hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder")
    without = "merges do without it, and models of the Hub are not scored" if cache.problem else ""
    yield replace(cache, problem="", warning="; ".join(filter(None, (cache.problem, without))))
    yield from filter(None, map(_unwritable, _caches()))


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none of those that it knows can be written
        return Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108  (it is named, and not written)


def _caches() -> Iterator[tuple[str, Path | None, str, str]]:
    """Yield further folders that keep what was fetched or made: subject, folder, what it means, advice."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    own = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    yield (
        "data sets",
        own,
        "examples cannot be prepared, so nothing is scored",
        "set HF_HOME or HF_DATASETS_CACHE",
    )
    without = "scores are measured again each time"
    yield "scores", score_folder(), without, f"set {FOLDER_VARIABLE} or XDG_CACHE_HOME"


def _unwritable(cache: tuple[str, Path | None, str, str]) -> Condition | None:
    """Return the condition of a folder that is used and cannot be written; None otherwise."""
    subject, folder, without, hint = cache
    found = _disk(subject, folder, f"{hint} to another folder") if folder is not None else None
    if found is None or not found.problem:
        return None
    return replace(found, problem="", warning=f"{found.problem}; {without}")


def _disk(subject: str, folder: Path, hint: str) -> Condition:
    facts: dict[str, Any] = {"folder": str(folder), "free_bytes": None}
    try:
        folder = folder.absolute()
        facts["folder"] = str(folder)
        there = existing_parent(folder)
        free = facts["free_bytes"] = shutil.disk_usage(there).free
        # Asking the system is not enough: it grants the administrator everything.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"it cannot be written ({error.strerror or type(error).__name__})"
        return Condition(subject, facts["folder"], facts, f"{reason}; {hint}")
    problem = f"the disk is nearly full; {hint}" if free < _LEAST_DISK else ""
    return Condition(subject, f"{format_bytes(free)} free in {folder}", facts, problem)


def _hub() -> Iterator[Condition]:
    """Look at the token and whether the Hub answers, by one request."""
    from huggingface_hub import constants, get_token

    facts: dict[str, Any] = {"endpoint": constants.ENDPOINT, "answers": None, "seconds": None}
    if problem := endpoint_problem():
        yield _token(get_token(), None)
        yield Condition("Hub", f"{constants.ENDPOINT} was not asked", facts, f"{problem} {ENDPOINT_HINT}")
        return
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
    seconds = round(time.perf_counter() - started, 3)
    yield _answered(answer, seconds, facts) if isinstance(answer, tuple) else _silent(answer, facts)


def _answered(answer: tuple[int, Any], seconds: float, facts: Mapping[str, Any]) -> Condition:
    facts, status = {**facts, "answers": True, "seconds": seconds}, answer[0]
    text = f"{facts['endpoint']} answers in {seconds:.2f} s"
    if status in (200, 401, 403):
        return Condition("Hub", text, facts)
    told = f"the answer has status {status}"
    if status in PASSING_STATUSES:
        return Condition("Hub", text, facts, warning=f"{told}; try again later. {_WITHOUT_HUB}")
    return Condition("Hub", text, facts, f"{told}, which is no Hub's; check HF_ENDPOINT and proxies")


def _silent(reason: str, facts: Mapping[str, Any]) -> Condition:
    """Return the condition of a Hub that does not answer: its name is wrong, or this machine is alone."""
    facts = {**facts, "answers": False}
    text, host = f"{facts['endpoint']} does not answer ({reason})", urlsplit(facts["endpoint"]).hostname or ""
    if _is_misspelt(host):
        return Condition("Hub", text, facts, f"no such host as {host}: {ENDPOINT_HINT}")
    return Condition("Hub", text, facts, warning=f"check the network and proxies. {_WITHOUT_HUB}")


def _is_misspelt(host: str) -> bool:
    """Say whether a host is unknown, and looks like the usual one, or that is known."""
    if host == _USUAL_HOST or _within(REQUEST_SECONDS, lambda: _look_up(host)) == _KNOWN:
        return False
    is_like = difflib.SequenceMatcher(None, host, _USUAL_HOST).ratio() > 0.8
    return is_like or _within(REQUEST_SECONDS, lambda: _look_up(_USUAL_HOST)) == _KNOWN


def _look_up(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return str(error)
    return _KNOWN


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


def _within(seconds: float, ask: Callable[[], T | str]) -> T | str:
    """Return what `ask` returns, or that there is no answer after `seconds`."""
    found: list[T | str] = []
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
    if kept < len(loops):
        text += "; others when a merge first needs them: 2 to 60 s each, up to 2 minutes in all"
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
