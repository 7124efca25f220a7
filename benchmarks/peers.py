"""Time mergekit from an environment of its own on the same files, for the methods that both have.

    python -m benchmarks.peers --python PYTHON                     # 0.25B parameters
    python -m benchmarks.peers --python PYTHON --size 1b --write   # a table of docs/peers.md

Both are treated alike: the same checkpoints in the page cache, weights, densities and size of shards; the
anonymous memory of the process; the whole process; medians of `--repeat` runs after a first one. What takes
mergekit longer than a minute it does once. It computes in the checkpoints' dtype, which is its fastest way
(`linear` adds up in float32); we compute in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from benchmarks import performance, timing
from benchmarks.families import make_family
from benchmarks.run import MERGE, NUM_TASKS, RATIO, merge
from hub_magmax.registry import METHODS

#: Folders of the tasks' checkpoints.
TASKS = tuple(f"task-{number}" for number in range(1, NUM_TASKS + 1))


@dataclass(frozen=True)
class Pair:
    """The same merge in two words.

    Attributes:
        ours: Our options; None: the recipe that an import of mergekit's configuration gives.
        method: mergekit's.
        per_task, shared: Its options for each task, and for all.
        models: Those that are merged, weighted as our preference weighs them.
        base: What mergekit gets as base model, if anything.
    """

    ours: Mapping[str, float] | None
    method: str
    per_task: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    models: tuple[str, ...] = TASKS
    base: str | None = "base"


#: Ours multiplies each preference by the number of tasks, where tasks are added.
_ADDED = {"scaling": 1 / NUM_TASKS}

#: By our method, at its own density. mergekit's `gamma` is what we call `outliers`.
PAIRS: dict[str, Pair] = {
    "average": Pair({}, "linear", base=None),
    "task_arithmetic": Pair(_ADDED, "task_arithmetic"),
    "ties": Pair({"density": 0.2}, "ties", {"density": 0.2}),
    "dare": Pair({"density": 0.8, **_ADDED}, "dare_linear", {"density": 0.8}),
    "dare_ties": Pair({"density": 0.8}, "dare_ties", {"density": 0.8}, {"normalize": True}),
    "breadcrumbs": Pair(
        {"density": 0.15, "outliers": 0.006, **_ADDED}, "breadcrumbs", {"density": 0.15, "gamma": 0.006}
    ),
    "breadcrumbs_ties": Pair(None, "breadcrumbs_ties", {"density": 0.15, "gamma": 0.006}),
    "della": Pair(None, "della", {"density": 0.5, "epsilon": 0.1}),
    "della_linear": Pair(None, "della_linear", {"density": 0.5, "epsilon": 0.1}),
    "sce": Pair(None, "sce", shared={"select_topk": 0.1}),
    "multislerp": Pair(None, "multislerp"),
    "karcher": Pair(None, "karcher", base=None),
    "model_stock": Pair(None, "model_stock"),
    "slerp": Pair(None, "slerp", shared={"t": 0.4}, models=TASKS[:2], base=TASKS[0]),
    "nuslerp": Pair(None, "nuslerp", models=TASKS[:2]),
    "nearswap": Pair(None, "nearswap", shared={"t": 0.001}, models=TASKS[:1]),
    "arcee_fusion": Pair(None, "arcee_fusion", models=TASKS[:1]),
}
#: The fast ones of its options; a card, tokenizer and progress bars would only cost it time.
FLAGS = (
    "--lazy-unpickle --async-write --no-copy-tokenizer --no-write-model-card --quiet --out-shard-size 500M"
)
_SCRIPT = "mergekit.scripts.run_yaml"


#: mergekit's methods without a weight for each model.
UNWEIGHTED = ("karcher", "model_stock", "slerp", "nearswap", "arcee_fusion")


def configuration(pair: Pair, dtype: str) -> dict[str, Any]:
    """Return mergekit's configuration for the family, with its tasks weighted as by our preference."""
    powers = [RATIO**number for number in range(NUM_TASKS)]
    is_weighted = pair.method not in UNWEIGHTED
    models = [
        {
            "model": model,
            "parameters": ({"weight": power / sum(powers)} if is_weighted else {}) | pair.per_task,
        }
        for model, power in zip(pair.models, powers, strict=False)
    ]
    return {
        "merge_method": pair.method,
        **({"base_model": pair.base} if pair.base else {}),
        "dtype": dtype,
        "parameters": dict(pair.shared),
        "models": models,
    }


def merge_imported(folder: Path, config: Mapping[str, Any]) -> timing.Finished:
    """Merge by the recipe that an import of mergekit's configuration gives, which is not timed."""
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(dict(config)))
    recipe = folder / "recipe.yaml"
    recipe.unlink(missing_ok=True)
    timing.run(
        [*MERGE[:-1], "import", str(folder / "mergekit.yaml"), "--from", str(folder), "--out", str(recipe)]
    )
    values = yaml.safe_load(recipe.read_text())
    values["output"] = {**values["output"], "path": "merged", "shard_size": "500MB"}
    recipe.write_text(yaml.safe_dump(values))
    shutil.rmtree(folder / "merged", ignore_errors=True)
    return timing.run([*MERGE, str(recipe), "--json"])


def merge_by_peer(folder: Path, python: str, config: dict[str, Any]) -> timing.Finished:
    """Merge with mergekit into `folder / "peer"`, which is removed before."""
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "peer", ignore_errors=True)
    return timing.run([python, "-m", _SCRIPT, "mergekit.yaml", "peer", *FLAGS.split()], folder=folder)


def tensors(folder: Path) -> dict[str, Any]:
    """Return the slices that a checkpoint's tensors are read by, by name."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


def compare(folder: Path, other: Path) -> dict[str, float]:
    """Return how far two merged models are apart.

    A step is the distance between neighbouring numbers of the dtype, there where the two values are, but at
    least that of float32 at the tensor's largest value: no sum of such numbers is more exact.
    """
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys(), "the merged models have other tensors"
    largest = steps = different = 0.0
    for name, tensor in ours.items():
        one, two = tensor[...], theirs[name][...]
        assert one.dtype == two.dtype, f"{name} has another dtype"
        apart = (one.float() - two.float()).abs()
        largest = max(largest, apart.max().item())
        steps = max(steps, (apart / _step(one, two)).max().item())
        different += apart.count_nonzero().item()
    total = sum(torch.Size(tensor.get_shape()).numel() for tensor in ours.values())
    return {"largest_difference": largest, "most_steps": steps, "different_share": different / total}


def _step(one: Tensor, two: Tensor) -> Tensor:
    size = torch.maximum(one.float().abs(), two.float().abs())
    exponents = torch.frexp(size).exponent - 1
    steps = torch.ldexp(torch.full_like(size, torch.finfo(one.dtype).eps), exponents)
    return steps.clamp(min=torch.finfo(torch.float32).eps * size.max().item())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    inputs = make_family(folder, options.size, num_tasks=NUM_TASKS)
    chosen = ["--methods", *options.methods] if options.methods else []
    facts = timing.facts("peers", options, "--python", "PYTHON", *chosen)
    timing.read_all(inputs)  # into the page cache
    rows, agreement = [], {}
    for name, pair in PAIRS.items():
        if name not in (options.methods or METHODS.built_in):
            continue
        config = configuration(pair, facts["dtype"])
        by_us = (
            partial(merge_imported, folder, config)
            if pair.ours is None
            else partial(merge, folder, {"name": name, **pair.ours})
        )
        ours = timing.runs(by_us, options.repeat)
        by_peer = partial(merge_by_peer, folder, options.python, config)
        theirs = timing.runs(by_peer, options.repeat, may_compile=False)
        seconds = timing.median_seconds(ours)
        peer_seconds = timing.median_seconds(theirs)
        rows.append(
            {
                "method": name,
                "peer_method": pair.method,
                "runs": len(ours),
                "seconds": seconds,
                "peak_memory_bytes": timing.most_memory(ours),
                "peer_runs": len(theirs),
                "peer_seconds": peer_seconds,
                "peer_peak_memory_bytes": timing.most_memory(theirs),
                "peer_ratio": peer_seconds / seconds,
            }
        )
        print(f"{name:<20} {seconds:7.1f} s, mergekit {peer_seconds:7.1f} s", file=sys.stderr)
        if pair.method == "linear":
            agreement = compare(folder / "merged", folder / "peer")
            print(f"average and linear: {json.dumps(agreement)}", file=sys.stderr)
    shutil.rmtree(folder / "merged")
    shutil.rmtree(folder / "peer")
    return facts | {
        "peer": ", ".join(
            f"{name} {package_version(options.python, name)}" for name in ("mergekit", "torch")
        ),
        "peer_command": f"python -m {_SCRIPT} CONFIG FOLDER {FLAGS}",
        "average_and_linear": agreement,
        "rows": rows,
    }


def with_earlier(result: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a call measured, with the rows of other methods that an earlier one stored for the size.

    Rows of another version of mergekit or torch, or of another machine, are left out.
    """
    measured = {row["method"]: row for row in result["rows"]}
    if earlier is None or any(earlier[key] != result[key] for key in ("peer", "machine")):
        return result
    kept = {row["method"]: {"earlier": earlier["command"]} | row for row in earlier["rows"]}
    rows = kept | measured
    return result | {
        "average_and_linear": result["average_and_linear"] or earlier["average_and_linear"],
        "rows": [rows[name] for name in PAIRS if name in rows],
    }


def package_version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = timing.parser(__doc__, repeat=3)
    parser.add_argument("--python", required=True, help="Python of an environment that has mergekit")
    parser.add_argument(
        "--methods", nargs="+", choices=PAIRS, help="only these of ours; mergekit takes minutes"
    )
    options = parser.parse_args()
    options.python = str(Path(options.python).absolute())  # a link, in an environment, that must stay one
    with timing.family_folder(options) as folder:
        earlier = performance.load().get("peers", {}).get(options.size)
        result = with_earlier(measure(folder, options), earlier)
        performance.show("peers", result, write=options.write)


if __name__ == "__main__":
    main()
