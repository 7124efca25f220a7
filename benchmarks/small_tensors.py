"""Time merges of very many small tensors, such as a model of small experts has.

    python -m benchmarks.small_tensors                  # 30,000 tensors of 4 x 32, three tasks, 20 files
    python -m benchmarks.small_tensors --only ties --repeat 3
    python -m benchmarks.small_tensors --write after    # store it under this label

What counts is the processor time of the whole command on one thread: lock, plan, look, merge.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks import timing

RESULTS = Path(__file__).parent / "results" / "small_tensors.json"
NUM_TENSORS, SHAPE, NUM_TASKS, NUM_FILES = 30_000, (4, 32), 3, 20

METHODS: Mapping[str, Mapping[str, Any]] = {
    "average": {"name": "average"},
    "tunable_magmax, algorithm-1": {"name": "tunable_magmax"},
    "tunable_magmax, top-n": {"name": "tunable_magmax", "selection": "top-n"},
    "ties": {"name": "ties"},
    "dare": {"name": "dare"},
    "random_mix": {"name": "random_mix"},
}


def write_checkpoint(folder: Path, values: torch.Tensor) -> None:
    """Write tensors in equal files with an index."""
    folder.mkdir()
    each, weight_map = NUM_TENSORS // NUM_FILES, {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_FILES:05d}.safetensors"
        part = range(number * each, (number + 1) * each)
        save_file({f"layer.{n}.weight": values[n].clone() for n in part}, folder / file, {"format": "pt"})
        weight_map |= {f"layer.{n}.weight": file for n in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")


def write_family(folder: Path) -> None:
    """Write the base model and its tasks."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(NUM_TENSORS, *SHAPE, generator=generator)
    write_checkpoint(folder / "base", base)
    for task in range(NUM_TASKS):
        moved = base + 0.02 * torch.randn(base.shape, generator=generator)
        write_checkpoint(folder / f"t{task}", moved)


def measure(folder: Path, method: Mapping[str, Any], repeat: int) -> float:
    """Return the processor seconds of a merge, the median of some."""
    tasks = [{"name": f"t{task}", "model": f"./t{task}"} for task in range(NUM_TASKS)]
    recipe = {"schema": 1, "base_model": "./base", "tasks": tasks, "method": dict(method)}
    recipe |= {"preference": {"weights": {"t0": 0.5, "t1": 0.3, "t2": 0.2}}}
    recipe |= {"output": {"path": "merged", "shard_size": "800KB"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def once() -> float:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        command = [sys.executable, "-m", "hub_magmax", "merge", str(folder / "recipe.yaml"), "--json"]
        return timing.run(command, {"OMP_NUM_THREADS": "1"}).processor_seconds

    return statistics.median(once() for _ in range(repeat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*METHODS], choices=METHODS, help="only these methods")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, of which the median counts")
    parser.add_argument("--write", metavar="LABEL", help="store what was measured under this label")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="small-tensors-") as folder:
        write_family(Path(folder))
        for title in options.only:
            found[title] = round(measure(Path(folder), METHODS[title], options.repeat), 2)
            print(f"{title:<30} {found[title]:6.2f} s", flush=True)
    if options.write:
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        facts = {"version": timing.version(timing.ROOT), "machine": timing.machine()}
        stored[options.write] = facts | {"repeat": options.repeat, "processor_seconds": found}
        RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
