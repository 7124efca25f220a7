"""Time the methods that hold whole matrices: on whole checkpoints of eight tasks, and on as many adapters.

    python -m benchmarks.matrices                            # ViT-B/16, in about ten minutes
    python -m benchmarks.matrices --size 1b --rank 16        # adapters of 0.97B parameters, an adapter out
    python -m benchmarks.matrices --only tsv wudi --write    # a table of docs/performance.md

Files are in the page cache. Seconds are of whole processes, run once, after a merge by `average` that may
compile. Beside the memory that a merge took stands what `plan` stated before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks import performance, timing
from benchmarks.families import SIZES, family_recipe, make_family
from benchmarks.run import OF_MATRICES, RATIO

NUM_TASKS = 8
_RUN = (sys.executable, "-m", "hub_magmax")


def write_adapters(folder: Path, size: str, rank: int) -> None:
    """Write `task-1` … of every matrix of the blocks, as PEFT does; products have deviation .002."""
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in SIZES[size].shapes.items()
        if ".layers." in name and len(shape) == 2
    }
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    deviation = (0.002 / rank**0.5) ** 0.5
    for number in range(1, NUM_TASKS + 1):
        generator = torch.Generator().manual_seed(number)
        factors = {}
        for name, (rows, columns) in shapes.items():
            for factor, of_factor in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                values = deviation * torch.randn(of_factor, generator=generator)
                factors[f"base_model.model.{name}.{factor}.weight"] = values
        place = folder / f"task-{number}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(factors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=0 if options.rank else NUM_TASKS)
    if options.rank:
        write_adapters(folder, options.size, options.rank)
    timing.read_all(inputs)  # into the page cache
    _merge(folder, "average", options)
    rows = []
    for method in options.only or OF_MATRICES:
        stated, done = _merge(folder, method, options)
        rows.append(
            {
                "method": method,
                "seconds": done.seconds,
                "processor_seconds": done.processor_seconds,
                "peak_memory_bytes": done.peak_memory_bytes,
                "stated_memory_bytes": stated,
            }
        )
        print(f"{method:<20} {done.seconds:7.1f} s", file=sys.stderr)
    shutil.rmtree(folder / "merged")
    extra = [*(["--only", *options.only] if options.only else []), *_rank_words(options.rank)]
    return timing.facts("matrices", options, *extra) | {
        "rank": options.rank,
        "tasks": NUM_TASKS,
        "rows": rows,
    }


def _rank_words(rank: int | None) -> list[str]:
    return ["--rank", str(rank)] if rank else []


def _merge(folder: Path, method: str, options: argparse.Namespace) -> tuple[int, timing.Finished]:
    """Merge by a command of its own; return the memory that the plan states, too."""
    output: Mapping[str, str] = {"format": "adapter"} if options.rank else {"shard_size": "500MB"}
    recipe = {
        **family_recipe(NUM_TASKS),
        "method": method,
        "preference": {"geometric": {"ratio": RATIO}},
        "output": {"path": "merged", **output},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "merged", ignore_errors=True)
    stated = json.loads(timing.run([*_RUN, "plan", str(path), "--json"]).output)["peak_memory_bytes"]
    return stated, timing.run([*_RUN, "merge", str(path), "--json"])


def main() -> None:
    parser = timing.parser(__doc__, repeat=1)
    parser.set_defaults(size="vit-b16")
    parser.add_argument("--rank", type=int, help="merge adapters of this rank, to an adapter")
    parser.add_argument("--only", nargs="+", choices=OF_MATRICES, help="only these")
    options = parser.parse_args()
    with timing.family_folder(options) as folder:
        performance.show("matrices", measure(folder, options), write=options.write)


if __name__ == "__main__":
    main()
