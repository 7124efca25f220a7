"""Time every method against the floor: reading every input byte and writing every output byte.

    python -m benchmarks.run                     # 0.25B parameters, about five minutes
    python -m benchmarks.run --size 1b --write   # the table in docs/performance.md

What counts is the whole process, less `python -c "import torch"` in the same run. Warm: files are in
the page cache. Cold: they were dropped from it before. Every warm number is the median of `--repeat` runs
after one that may compile; what takes longer than a minute, and everything cold, is measured once.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.families import SIZES, make_family

METHODS: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "agreement": {"name": "agreement"},
    "last_task": {"name": "last_task"},
    "magmax": {"name": "magmax"},
    "random_mix": {"name": "random_mix"},
    "ties": {"name": "ties"},
    "tunable_magmax, algorithm-1": {"name": "tunable_magmax", "selection": "algorithm-1"},
    "tunable_magmax, top-n": {"name": "tunable_magmax", "selection": "top-n"},
}
RESULTS = Path(__file__).parent / "results" / "performance.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_BLOCK = 2**20
#: A merge that takes longer is measured once.
_SLOW_SECONDS = 60


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def read_all(paths: list[Path]) -> None:
    def read(path: Path) -> None:
        buffer = mmap.mmap(-1, _BLOCK)  # begins at a page: some processors copy slowly to other places
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, paths))


def drop(paths: list[Path]) -> None:
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


def merge(folder: Path, method: dict[str, Any]) -> dict[str, Any]:
    """Merge in a process of its own; return its report with the seconds of the whole process."""
    recipe = {
        "base_model": "./base",
        "tasks": [{"name": f"t{n}", "model": f"./task-{n}"} for n in range(1, 6)],
        "method": method,
        "preference": {"geometric": {"ratio": 0.7}},
        "output": {"path": "merged", "shard_size": "500MB"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "hub_magmax", "merge", str(folder / "recipe.yaml"), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "merged")
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"process_seconds": seconds}


def measure(folder: Path, size: str, repeat: int) -> dict[str, Any]:
    print(f"making checkpoints of size {size} in {folder}", file=sys.stderr)
    make_family(folder, size)
    inputs = sorted(folder.rglob("*.safetensors"))
    bytes_in = sum(path.stat().st_size for path in inputs)
    bytes_out = bytes_in // 6

    def median(call: Callable[[], float]) -> float:
        return statistics.median(call() for _ in range(repeat))

    read_all(inputs)  # into the page cache
    reading = median(lambda: timed(lambda: read_all(inputs)))
    writing = median(lambda: timed(lambda: write_plain(folder / "plain", bytes_out)))
    starting = median(
        lambda: timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    )
    floor = reading + writing
    drop(inputs)
    cold_floor = timed(lambda: read_all(inputs)) + writing
    rows = []
    for name, method in METHODS.items():
        reports = [merge(folder, method)]  # the first one may compile
        slow = reports[0]["process_seconds"] > _SLOW_SECONDS
        reports = [merge(folder, method) for _ in range(1 if slow else repeat)]
        drop(inputs)
        cold = merge(folder, method)["process_seconds"] - starting
        seconds = statistics.median(report["process_seconds"] for report in reports) - starting
        memory = max(report["peak_memory_bytes"] for report in reports)
        rows.append(
            {
                "method": name,
                "runs": len(reports),
                "seconds": seconds,
                "ratio": seconds / floor,
                "cold_seconds": cold,
                "cold_ratio": cold / cold_floor,
                "peak_memory_bytes": memory,
            }
        )
        print(f"{name:<30} {seconds:7.1f} s  {seconds / floor:5.1f} x floor", file=sys.stderr)
    return {
        "size": size,
        "parameters": bytes_out // 2,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "repeat": repeat,
        "floor_seconds": floor,
        "cold_floor_seconds": cold_floor,
        "import_torch_seconds": starting,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "command": f"python -m benchmarks.run --size {size} --repeat {repeat}",
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Six checkpoints of {result['parameters'] / 1e9:.2f}B parameters in bfloat16, 500 MB shards: "
        f"{result['bytes_in'] / 1e9:.1f} GB in, {result['bytes_out'] / 1e9:.2f} GB out. {result['machine']}. "
        f"Without `import torch` ({result['import_torch_seconds']:.1f} s). `{result['command']}`",
        "",
        f"Floor, reading the inputs and writing the output plainly: {result['floor_seconds']:.1f} s with a "
        f"warm page cache, {result['cold_floor_seconds']:.1f} s with a cold one.",
        "",
        "| method | runs | warm: s | times the floor | cold: s | times the floor | peak memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        warm, cold = (
            f"{row['seconds']:.1f} | {row['ratio']:.1f}",
            f"{row['cold_seconds']:.1f} | {row['cold_ratio']:.1f}",
        )
        memory = row["peak_memory_bytes"] / 1e6
        lines.append(f"| {row['method']} | {row['runs']} | {warm} | {cold} | {memory:.0f} |")
    return "\n".join(lines)


PREFACE = """# Performance

Written by `python -m benchmarks.run --write` from `benchmarks/results/performance.json`.

The aim is to stay near the floor for every method: at most 1.5 times for those that read the files once,
2.5 for quotas and thresholds, with a warm page cache. The table says how far each one is: none is there. The
floor is strict: its reads go into a buffer of 1 MB that stays in the nearest cache, begins at a page, and is
thrown away, so it moves 15 to 20 GB/s, where any use of the values starts with fetching them from memory.
Cold numbers are of one run each, and the disk is not as fast in each: below 1 means no more than that.

Methods of one pass (the first six) take as long as two cores need to read, convert, add and round; the rest
of their time, about a second whatever the size, is Python's: modules, headers, plan. `ties` reads its files
twice, for thresholds first, and so does `tunable_magmax` with `algorithm-1`. `top-n` reads them four times,
and its markets cost most on tensors of a few million elements, where samples are a large part. Peak memory is
the resident set of the one process, with Python and torch in it. The first large merge of an environment
compiles for about ten seconds, which is not in the table. Every merge report says how long threads read,
computed, wrote and hashed (`profile`).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="250m")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--write", action="store_true", help="store the result and write docs/performance.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub_magmax_bench_") as temporary:
        result = measure(options.folder or Path(temporary), options.size, options.repeat)
    print(table(result))
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        PAGE.write_text(PREFACE + table(result) + "\n")


if __name__ == "__main__":
    main()
