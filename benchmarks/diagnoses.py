"""Does a diagnosis cost what reading costs, and does it name what is wrong?

    python -m benchmarks.diagnoses                     # 0.25B parameters, about two minutes
    python -m benchmarks.diagnoses --size 1b --write   # and store it in benchmarks/results/diagnoses.json

Reading is that of every byte of the weight files, plainly, in two threads. A diagnosis is timed twice: its
pass over the files alone, and its whole process, less `python -c "import torch"`. Warm, files are in the
page cache, every number is the median of `--repeat` runs, and memory is the largest of any; cold, they were
dropped from it, and each is measured once. Then one checkpoint at a time is replaced by a faulty one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.families import SIZES, make_family
from benchmarks.run import drop, read_all, timed

RESULTS = Path(__file__).parent / "results" / "diagnoses.json"
NUM_TASKS = 5

#: Runs a command, and says at its end how many KiB it held at most. (What the system tells of children starts
#: from what this process holds.)
_WATCHED = r"""
import atexit, pathlib, re, sys
from hub_magmax.cli import main
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: sys.stderr.write("\n" + re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]))
main()
"""

#: What a faulty checkpoint holds under a name, given what a sound one holds under any name.
Fault = Callable[[str, Callable[[str], Tensor]], Tensor]


def _from_another_base(name: str, read: Callable[[str], Tensor]) -> Tensor:
    sound = read(name)
    return (0.02 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(len(name)))).to(
        sound.dtype
    )


def _swapped(name: str, read: Callable[[str], Tensor]) -> Tensor:
    other = {".layers.3.": ".layers.7.", ".layers.7.": ".layers.3."}
    return read(next((name.replace(one, two) for one, two in other.items() if one in name), name))


#: By the rule that should name it.
FAULTS: Mapping[str, Fault | None] = {
    "other base": _from_another_base,
    "unchanged": None,
    "swapped": _swapped,
    "scaled": lambda name, read: 100 * read(name),
}


def write_faulty(folder: Path, sound: Path, fault: Fault) -> None:
    """Write a copy of a checkpoint with a fault, one file in memory at a time."""
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    places = json.loads((sound / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> Tensor:
        with safe_open(sound / places[name], "pt") as file:
            return file.get_tensor(name)

    for shard in dict.fromkeys(places.values()):
        tensors = {name: fault(name, read).contiguous() for name in places if places[name] == shard}
        save_file(tensors, folder / shard, metadata={"format": "pt"})


def diagnose(folder: Path, models: Mapping[str, str]) -> dict[str, Any]:
    """Diagnose in a process of its own, and return what it found."""
    recipe = {
        "base_model": "./base",
        "tasks": [{"name": name, "model": f"./{model}"} for name, model in models.items()],
        "preference": {"geometric": {"ratio": 0.7}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", _WATCHED, "diagnose", str(folder / "recipe.yaml"), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"peak_memory_bytes": 1024 * int(done.stderr.split()[-1])}


def named(folder: Path, rule: str) -> list[list[str]]:
    """Return rule and task of every fault that is found where one checkpoint has a fault of this kind."""
    faulty, fault = folder / "faulty", FAULTS[rule]
    if fault is None:
        shutil.copytree(folder / "base", faulty)
    else:
        write_faulty(faulty, folder / "task-1", fault)
    models = {"odd": "faulty"} | {f"t{n}": f"task-{n}" for n in range(2, NUM_TASKS + 1)}
    findings = diagnose(folder, models)["findings"]
    shutil.rmtree(faulty)
    return [[finding["rule"], finding["task"]] for finding in findings if finding["is_fault"]]


def measure(folder: Path, size: str, repeat: int) -> dict[str, Any]:
    print(f"making checkpoints of size {size} in {folder}", file=sys.stderr)
    make_family(folder, size, num_tasks=NUM_TASKS)
    inputs = sorted(folder.rglob("*.safetensors"))
    models = {f"t{n}": f"task-{n}" for n in range(1, NUM_TASKS + 1)}

    def median(call: Callable[[], Any]) -> float:
        return statistics.median(timed(call) for _ in range(repeat))

    read_all(inputs)  # into the page cache
    reading = median(lambda: read_all(inputs))
    starting = median(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    runs: list[dict[str, Any]] = []
    seconds = median(lambda: runs.append(diagnose(folder, models))) - starting
    passing = statistics.median(run["seconds"] for run in runs)
    drop(inputs)
    cold_reading = timed(lambda: read_all(inputs))
    drop(inputs)
    cold_seconds = timed(lambda: diagnose(folder, models)) - starting
    return {
        "size": size,
        "bytes": sum(path.stat().st_size for path in inputs),
        "repeat": repeat,
        "reading_seconds": reading,
        "pass_seconds": passing,
        "pass_ratio": passing / reading,
        "process_seconds": seconds,
        "process_ratio": seconds / reading,
        "cold_reading_seconds": cold_reading,
        "cold_process_seconds": cold_seconds,
        "cold_process_ratio": cold_seconds / cold_reading,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "faults_of_sound_family": [f for f in runs[0]["findings"] if f["is_fault"]],
        "faults_named": {rule: named(folder, rule) for rule in FAULTS},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "command": f"python -m benchmarks.diagnoses --size {size} --repeat {repeat}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="250m")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints, and keep them")
    parser.add_argument("--write", action="store_true", help="store the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub_magmax_") as temporary:
        found = measure(options.folder or Path(temporary), options.size, options.repeat)
    print(json.dumps(found, indent=2))
    if options.write:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
