"""Shared parts of the benchmarks of merges: running and timing commands, and describing the machine."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.families import SIZES

ROOT = Path(__file__).resolve().parents[1]

#: A command that takes longer is measured once.
SLOW_SECONDS = 60
_BLOCK = 2**20

#: Runs a command, and says at its end how long it took, how long processors worked, and what it and its
#: descendants held together at most: anonymous memory, looked at every hundredth of a second.
_WATCHER = r"""
import json, os, sys, threading, time

def held(pid):
    try:
        with open(f"/proc/{pid}/status") as status:
            own = sum(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                own += sum(map(held, children.read().split()))
        return own
    except OSError:
        return 0

def look():
    global most
    while True:
        most = max(most, held(child))
        time.sleep(0.01)

most = 0
started = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
threading.Thread(target=look, daemon=True).start()
_, status, used = os.wait4(child, 0)
facts = {
    "seconds": time.perf_counter() - started,
    "peak_memory_bytes": most,
    "processor_seconds": used.ru_utime + used.ru_stime,
}
sys.stderr.write("\n" + json.dumps(facts))
sys.stderr.flush()
os._exit(os.waitstatus_to_exitcode(status) and 1)
"""


@dataclass(frozen=True)
class Finished:
    """Output, duration and memory of a command.

    Attributes:
        output: Its standard output.
        seconds: By the clock on the wall.
        peak_memory_bytes: The most anonymous memory of its processes together.
        processor_seconds: User and system time of its processes together.
    """

    output: str
    seconds: float
    peak_memory_bytes: int
    processor_seconds: float


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, folder: Path | None = None
) -> Finished:
    """Run a command that begins with the path of a program; a failure ends the benchmark with its stderr."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WATCHER, *command],
        env={**os.environ, **(environment or {})},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    said, _, facts = done.stderr.rpartition("\n")
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{said}")
    return Finished(done.stdout, **json.loads(facts))


def runs(call: Callable[[], Finished], repeat: int, *, may_compile: bool = True) -> tuple[Finished, ...]:
    """Return what counts: `repeat` runs after a first one, or one where the first took long.

    Args:
        call: Runs a command once.
        repeat: How many runs count of a command that is not slow.
        may_compile: The first run of a slow command does not count either.
    """
    first = call()
    if first.seconds <= SLOW_SECONDS:
        return tuple(call() for _ in range(repeat))
    return (call(),) if may_compile else (first,)


def median_seconds(finished: Iterable[Finished]) -> float:
    return statistics.median(one.seconds for one in finished)


def most_memory(finished: Iterable[Finished]) -> int:
    return max(one.peak_memory_bytes for one in finished)


def start_seconds(python: str, repeat: int) -> float:
    """Return how long a Python takes for nothing but `import torch`."""
    return median_seconds(run([python, "-c", "import torch"]) for _ in range(repeat))


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_timed(call: Callable[[], Any], repeat: int) -> float:
    return statistics.median(timed(call) for _ in range(repeat))


def read_all(paths: Iterable[Path]) -> None:
    """Read every byte plainly, in two threads, and throw it away."""

    def read(path: Path) -> None:
        buffer = mmap.mmap(-1, _BLOCK)  # begins at a page: some processors copy slowly to other places
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, paths))


def drop(paths: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_plain(path: Path, num_bytes: int) -> None:
    block = mmap.mmap(-1, _BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // _BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    path.unlink()


def parser(doc: str | None, *, repeat: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark of merges has."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--size", choices=SIZES, default="250m")
    made.add_argument("--repeat", type=int, default=repeat)
    made.add_argument("--folder", type=Path, help="where to make the checkpoints, and keep them")
    made.add_argument("--write", action="store_true", help="store the numbers, and write their page")
    return made


@contextmanager
def family_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Give the folder for the checkpoints: the one that was named, or one that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="hub_magmax_bench_") as temporary:
        yield options.folder or Path(temporary)


def version(checkout: Path) -> str:
    """Return the last commit that changed the package of a checkout, with a `+` where files have changed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words, "--", "hub_magmax"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h", "--abbrev=12") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def model_facts(size: str) -> dict[str, Any]:
    """Return what the checkpoints are that were merged."""
    model = SIZES[size]
    return {
        "size": size,
        "model": model.title,
        "parameters": model.num_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def facts(module: str, options: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """Return what was measured, by which command, on which machine."""
    words = [
        "python",
        "-m",
        f"benchmarks.{module}",
        *extra,
        "--size",
        options.size,
        "--repeat",
        options.repeat,
    ]
    return model_facts(options.size) | {
        "repeat": options.repeat,
        "machine": machine(),
        "command": " ".join(map(str, words)),
    }
