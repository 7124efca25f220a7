"""Compare the memory that plans state with what merges take, for every method.

    python -m benchmarks.memory                      # every method on every family, in a few minutes
    python -m benchmarks.memory --only 'ties*' --families large
    python -m benchmarks.memory --write              # store the table in benchmarks/results/memory.json

A merge runs as a command of its own on one thread. Its peak is that of the merge report, the estimate that of
`plan`: the process's own memory, which `output.memory` limits, and the resident set, with mapped files. Both
count Python and all packages that are imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks import timing
from benchmarks.run import METHODS, OF_MATRICES

RESULTS = Path(__file__).parent / "results" / "memory.json"

#: Tensors, their shape, dtype, and tasks, by name.
FAMILIES: Mapping[str, tuple[int, tuple[int, ...], torch.dtype, int]] = {
    "tiny": (20, (64, 64), torch.float32, 3),
    "layers": (7, (1024, 1024), torch.float32, 7),
    "large": (1, (24, 2**20), torch.float32, 3),
    "bfloat16": (2, (16, 2**20), torch.bfloat16, 3),
    "one task": (3, (4, 2**20), torch.float32, 1),
    "two tasks": (3, (4, 2**20), torch.float32, 2),
    "matrices": (3, (768, 1024), torch.float32, 3),
}

#: Methods that take one task or two, or whole matrices, by the family that they merge.
OF_FAMILY = {"one task": ("slerp", "arcee_fusion"), "two tasks": ("nuslerp",), "matrices": OF_MATRICES}


def write_family(folder: Path, name: str) -> None:
    """Write a base model and its tasks, unless they are there."""
    number, shape, dtype, tasks = FAMILIES[name]
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(shape, generator=generator) for _ in range(number)]
    for task in range(tasks + 1):
        place = folder / ("base" if task == 0 else f"t{task}")
        if (place / "config.json").exists():
            continue
        place.mkdir(parents=True)
        moved = [value + 0.02 * torch.randn(shape, generator=generator) if task else value for value in base]
        tensors = {f"layer.{n}.weight": value.to(dtype) for n, value in enumerate(moved)}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text("{}")


def measure(
    folder: Path, family: str, method: Mapping[str, Any], *options: str, **output: str
) -> dict[str, int]:
    """Return the bytes that a plan states for a merge, and those that it takes."""
    tasks = [{"name": f"t{n}", "model": f"./t{n}"} for n in range(1, FAMILIES[family][3] + 1)]
    recipe = {"base_model": "./base", "tasks": tasks, "method": dict(method)}
    recipe |= {"preference": {"geometric": {"ratio": 0.7}}, "output": {"path": "merged", **output}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "merged", ignore_errors=True)

    def call(verb: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hub_magmax", verb, "recipe.yaml", "--json", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    stated, taken = call("plan"), call("merge")
    return {
        "stated": stated["peak_memory_bytes"],
        "taken": taken["peak_memory_bytes"],
        "stated_resident": stated["peak_resident_bytes"],
        "taken_resident": taken["peak_resident_bytes"],
    }


def rows(only: list[str], families: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what was measured, family by family."""
    for family in families:
        with tempfile.TemporaryDirectory(prefix="memory-") as place:
            write_family(Path(place), family)
            own = {name: {"name": name} for name in OF_FAMILY.get(family, ())}
            every = own if family in ("two tasks", "matrices") else {**METHODS, **own}
            for title, method in every.items():
                if any(fnmatchcase(title, pattern) for pattern in only or ["*"]):
                    yield {"family": family, "method": title, **measure(Path(place), family, method)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="METHOD", help="globs over titles of methods"
    )
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=FAMILIES, help="only these")
    parser.add_argument("--write", action="store_true", help="store the table")
    options = parser.parse_args()
    found = []
    for row in rows(options.only, options.families):
        found.append(row)
        share = row["stated"] / row["taken"]
        print(
            f"{row['family']:<9} {row['method']:<42} stated {row['stated'] / 1e6:7.1f} MB, "
            f"taken {row['taken'] / 1e6:7.1f} MB, {share:5.2f}{'' if 0.8 <= share <= 1.25 else '  !'}; "
            f"with files {row['stated_resident'] / 1e6:7.1f}, {row['taken_resident'] / 1e6:7.1f} MB",
            flush=True,
        )
    if options.write:
        facts = {"machine": timing.machine(), "command": "python -m benchmarks.memory --write", "rows": found}
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
