"""Cost of a diagnosis against the cost of reading, and the faults that it names.

    python -m benchmarks.diagnoses                     # 0.25B parameters, about two minutes
    python -m benchmarks.diagnoses --size 1b --write   # and store it in benchmarks/results/diagnoses.json
    python -m benchmarks.diagnoses --pairs --write     # metrics of pairs alone, and docs/mergeability.md

Reading is that of every byte of the weight files, plainly, in two threads. A diagnosis is timed twice: its
pass over the files alone, and its whole process, less `python -c "import torch"`. Warm, files are in the
page cache, every number is the median of `--repeat` runs, and memory is the largest of any; cold, they were
dropped from it, and each is measured once. Then one checkpoint at a time is replaced by a faulty one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import timing
from benchmarks.families import make_family
from benchmarks.page_tables import replace_tables
from hub_magmax.analysis import pair_sums
from hub_magmax.pipeline import plan

RESULTS = Path(__file__).parent / "results" / "diagnoses.json"
PAGE = Path(__file__).parents[1] / "docs" / "mergeability.md"
NUM_TASKS = 5

#: Returns a faulty checkpoint's tensor of a name, given its name and a reader of a sound one's.
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


def write_recipe(folder: Path, models: Mapping[str, str]) -> None:
    recipe = {
        "base_model": "./base",
        "tasks": [{"name": name, "model": f"./{model}"} for name, model in models.items()],
        "preference": {"geometric": {"ratio": 0.7}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def diagnose(folder: Path, models: Mapping[str, str]) -> dict[str, Any]:
    """Diagnose in a process of its own, and return what it found."""
    write_recipe(folder, models)
    command = [sys.executable, "-m", "hub_magmax", "diagnose", str(folder / "recipe.yaml"), "--json"]
    done = timing.run(command)
    found: dict[str, Any] = json.loads(done.output)
    return found | {"process_seconds": done.seconds, "peak_memory_bytes": done.peak_memory_bytes}


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


# Complex only by count: its way is straight, with comprehensions over runs and faults.
def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    models = {f"t{n}": f"task-{n}" for n in range(1, NUM_TASKS + 1)}
    timing.read_all(inputs)  # into the page cache
    reading = timing.median_timed(lambda: timing.read_all(inputs), options.repeat)
    starting = timing.start_seconds(sys.executable, options.repeat)
    runs = [diagnose(folder, models) for _ in range(options.repeat)]
    seconds = statistics.median(run["process_seconds"] for run in runs) - starting
    passing = statistics.median(run["seconds"] for run in runs)
    timing.drop(inputs)
    cold_reading = timing.timed(lambda: timing.read_all(inputs))
    timing.drop(inputs)
    cold_seconds = diagnose(folder, models)["process_seconds"] - starting
    return timing.facts("diagnoses", options) | {
        "bytes": sum(path.stat().st_size for path in inputs),
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
    }


def measure_pairs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time metrics of pairs without directions against plain reading, in this process, by processor time."""
    load = os.getloadavg()[0]  # of other work: what is measured adds its own
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    write_recipe(folder, {f"t{n}": f"task-{n}" for n in range(1, NUM_TASKS + 1)})
    planned = plan(folder / "recipe.yaml")
    pair_sums.measure_pairs(planned, rank=0)  # compiles, and reads into the page cache
    reading, passing = [], []
    for _ in range(options.repeat):
        reading.append(_processor_seconds(lambda: timing.read_all(inputs)))
        passing.append(_processor_seconds(lambda: pair_sums.measure_pairs(planned, rank=0)))
    seconds = statistics.median(passing)
    return timing.facts("diagnoses", options, "--pairs") | {
        "tasks": NUM_TASKS,
        "bytes": sum(path.stat().st_size for path in inputs),
        "reading_processor_seconds": statistics.median(reading),
        "pairs_processor_seconds": seconds,
        "pairs_ratio": seconds / statistics.median(reading),
        "load_before": load,
        "cores": os.cpu_count(),
    }


def _processor_seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def render_pairs(found: Mapping[str, Any]) -> None:
    """Write the cost of metrics of pairs into the page, in place of the one that is there."""
    seconds, ratio = found["pairs_processor_seconds"], found["pairs_ratio"]
    told = (
        f"Of {found['tasks']} tasks of {found['parameters'] / 1e9:.2g}B parameters that pass took "
        f"{seconds:.2f} s of a processor,\n{ratio:.1f} times as long as reading their files from the page "
        f"cache (medians of {found['repeat']};\n{found['cores']} cores, with a load average of "
        f"{found['load_before']:.1f} before; `python -m benchmarks.diagnoses --pairs`)."
    )
    replace_tables(PAGE, r"Of \d+ tasks of [^`]* parameters that pass took[^`]*`[^`]*`\)\.", told)


def main() -> None:
    parser = timing.parser(__doc__, repeat=5)
    parser.add_argument("--pairs", action="store_true", help="time metrics of pairs alone")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        found = (measure_pairs if options.pairs else measure)(folder, options)
    print(json.dumps(found, indent=2))
    if options.write:
        stored = json.loads(RESULTS.read_text())
        kept = {"pairs": found} if options.pairs else {"pairs": stored["pairs"]}
        RESULTS.write_text(json.dumps((stored if options.pairs else found) | kept, indent=2) + "\n")
    if options.pairs and options.write:
        render_pairs(found)


if __name__ == "__main__":
    main()
