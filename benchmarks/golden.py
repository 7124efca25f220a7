"""Compare the weights that every method gives on small fixed checkpoints with what is stored.

    python -m benchmarks.golden                       # merge, compare, exit with 1 where anything differs
    python -m benchmarks.golden --only 'ties*' magmax # keys that match a glob or begin so
    python -m benchmarks.golden --record              # store what comes out

A key is such as `tunable_magmax/top-n scope=model source=hub backend=compiled`. Two sha256 are stored.
`weights` is of all tensors by name, dtype and shape, in whatever files; `files` of each output file as it is,
metadata included. That names the commits of sources on the Hub, which have dates, so those merges and merges
in memory have no `files`. What must not matter is checked as well: the backend, where the checkpoints lie,
and the number of files of the output and, but for two methods, of the checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from benchmarks.golden_cases import CHUNK_ELEMENTS, OF_TWO, OUTPUTS, Case, cases
from benchmarks.golden_checkpoints import SOURCES, WITH_STATISTICS, write_statistics

RESULTS = Path(__file__).parent / "results" / "golden.json"

#: Digests of a merge: of its weights, and of its files.
Entry = dict[str, Any]


# Parts that depend on internals of the package: the backend, merging in memory, the local Hub, the compiler.


def backend(name: str) -> Any:
    """Return what computes operation by operation ("eager") or by compiled loops ("compiled")."""
    from hub_magmax.kernels.compiled.backend import Compiled
    from hub_magmax.kernels.reference import Reference

    return Compiled() if name == "compiled" else Reference()


def merge_in_memory(recipe: Any, locked: Any) -> Mapping[str, Tensor]:
    """Return the tensors of the merged model by name, without files."""
    from hub_magmax.merging.in_memory import InMemoryMerger

    with InMemoryMerger(recipe, locked) as merger:
        return merger.merge(locked.method, locked.weights).weights(locked.method["scaling"])


@contextmanager
def local_hub() -> Iterator[Any]:
    """Start a Hub on this machine and point huggingface_hub to it, which must not be imported yet."""
    from tests.local_hub.hub import LocalHub

    assert "huggingface_hub" not in sys.modules
    with tempfile.TemporaryDirectory() as home, LocalHub() as hub:
        os.environ.update({**hub.environment, "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"})
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            os.environ.pop(name, None)
        yield hub


def processor() -> str:
    """Name what decides how matrix products are added up."""
    import llvmlite.binding as llvm
    import torch

    return f"{platform.machine()} {llvm.get_host_cpu_name()} torch {torch.__version__}"


# From here on only the recipe, the public functions and the files that they write are used.


class Merger:
    """Merges cases; writes the checkpoints of a source when they are first asked for.

    Args:
        folder: For checkpoints and merged models.
        hub: The local Hub.
        chunk_elements: Elements in memory at a time.
    """

    def __init__(self, folder: Path, hub: Any, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self._folder, self._hub, self._chunk_elements = folder, hub, chunk_elements
        self._recipes: dict[str, dict[str, Any]] = {}

    def __call__(self, case: Case) -> Entry:
        """Merge, and return the digests."""
        from hub_magmax import lock, merge, parse_recipe, plan

        values = self._recipe(case.source)
        output = {"path": "merged", **values.get("output", {}), **OUTPUTS[case.output]}
        if case.method["name"] in OF_TWO:
            names = [task["name"] for task in values["tasks"]][:2]
            values = values | {"preference": {"weights": dict(zip(names, (0.7, 0.3), strict=False))}}
        recipe = parse_recipe(values | {"method": dict(case.method), "output": output}, folder=self._folder)
        locked = lock(recipe)
        if case.backend == "memory":
            return {"weights": weights_digest(merge_in_memory(recipe, locked))}
        if case.backend == "tensors":
            return {"weights": weights_digest(merge_tensor_by_tensor(recipe, locked))}
        with tempfile.TemporaryDirectory(dir=self._folder) as place:
            merge(
                plan(recipe, locked),
                Path(place) / "merged",
                chunk_elements=self._chunk_elements,
                backend=backend(case.backend),
            )
            files = sorted((Path(place) / "merged").glob("*.safetensors"))
            entry: Entry = {"weights": weights_digest(stored_tensors(files))}
            if case.source != "hub":
                entry["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return entry

    def _recipe(self, source: str) -> dict[str, Any]:
        if source not in self._recipes:
            make = write_statistics if source == WITH_STATISTICS else SOURCES[source]
            values = make(self._folder / source)
            self._recipes[source] = self._uploaded(values) if source == "hub" else values
        return self._recipes[source]

    def _uploaded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe of repositories in place of folders."""

        def upload(reference: str) -> str:
            repo = f"me/golden-{Path(reference).name}"
            self._hub.add_repo(repo, folder=self._folder / reference)
            return repo

        tasks = [{**task, "model": upload(task["model"])} for task in values["tasks"]]
        return values | {"base_model": upload(values["base_model"]), "tasks": tasks}


def merge_tensor_by_tensor(recipe: Any, locked: Any) -> dict[str, Tensor]:
    """Return the tensors of a model merged from folders by `hub_magmax.merge_tensors`."""
    import torch

    from hub_magmax import merge_tensors

    def tensors_of(reference: str) -> dict[str, Tensor]:
        return stored_tensors(sorted((recipe.folder / reference).glob("*.safetensors")))

    options = {key: value for key, value in locked.method.items() if key not in ("name", "scaling")}
    merged, tasks = tensors_of(recipe.base_model), [tensors_of(task.model) for task in recipe.tasks]
    for name, base in merged.items():
        if not base.is_floating_point() or not base.numel():
            continue
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        start = base.to(wide)
        vectors = torch.stack([(task[name].to(wide) - start).float() for task in tasks])
        found = merge_tensors(
            vectors,
            preference=locked.weights,
            method=locked.method["name"],
            seed=locked.seed,
            name=name,
            base=start.float(),
            **options,
        )
        update = found.to(wide) * locked.method["scaling"]
        merged[name] = torch.where(update == 0, start, start + update).to(base.dtype)
    return merged


def stored_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    return found


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors: of name, dtype, shape and bytes of each, in the order of their names."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        found.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return found.hexdigest()


def unequal(found: Mapping[Case, Entry]) -> list[str]:
    """Return a line for every group of cases that should have the same weights and have not."""
    groups: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case, entry in found.items():
        groups[case.group][entry["weights"]].append(case)
    return [
        "not the same weights: " + " / ".join(", ".join(case.key for case in same) for same in group.values())
        for group in groups.values()
        if len(group) > 1
    ]


def differences(
    found: Mapping[Case, Entry], stored: Mapping[str, Any], wanted: Iterable[str] = ()
) -> list[str]:
    """Return a line for every key whose digests differ from the stored ones.

    Args:
        found: Digests of cases.
        stored: What the file of results holds.
        wanted: Keys that should be among those of `found`.
    """
    lines, elsewhere = [], stored["processor"] != processor()
    merges: Mapping[str, Entry] = stored["merges"]
    for case, entry in found.items():
        before = merges.get(case.key)
        if before is None:
            lines.append(f"not stored: {case.key}")
        elif entry == before or (elsewhere and case.is_of_one_machine):
            continue
        elif entry["weights"] != before["weights"]:
            lines.append(f"weights differ: {case.key}")
        else:
            lines.append(f"files differ, weights do not: {case.key}")
    keys = {case.key for case in found}
    return lines + [f"not merged any more: {key}" for key in wanted if key not in keys]


def matches(key: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(key.startswith(pattern) or fnmatchcase(key, pattern) for pattern in patterns)


def load() -> dict[str, Any]:
    """Return what is stored."""
    stored: dict[str, Any] = json.loads(RESULTS.read_text())
    return stored


def store(found: Mapping[Case, Entry], kept: Mapping[str, Entry]) -> None:
    """Write digests to the file of results, one merge per line, sorted; `kept` are of other merges."""
    merges = {**kept, **{case.key: entry for case, entry in found.items()}}
    lines = [f"    {json.dumps(key)}: {json.dumps(merges[key], sort_keys=True)}" for key in sorted(merges)]
    head = f'{{\n  "processor": {json.dumps(processor())},\n  "merges": {{\n'
    RESULTS.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


def run(
    patterns: Sequence[str], merger: Callable[[Case], Entry], report: Callable[[str], None]
) -> dict[Case, Entry]:
    """Merge the cases whose keys match, and return their digests."""
    found = {}
    for case in (case for case in cases() if matches(case.key, patterns)):
        started = time.process_time()
        found[case] = merger(case)
        report(f"{time.process_time() - started:6.2f} s  {case.key}")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true", help="store what comes out")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY", help="globs, or how keys begin")
    parser.add_argument("--chunk-elements", type=int, default=CHUNK_ELEMENTS, help="must not matter")
    parser.add_argument("--verbose", action="store_true", help="print each merge and its processor time")
    return parser.parse_args(arguments)


def compare(found: Mapping[Case, Entry], only: Sequence[str]) -> list[str]:
    """Return the differences of digests from the stored ones, of all cases that `only` matches."""
    stored = load() if RESULTS.exists() else {"processor": "", "merges": {}}
    return differences(found, stored, [key for key in stored["merges"] if matches(key, only)])


def record(found: Mapping[Case, Entry], only: Sequence[str]) -> None:
    """Store digests; where `only` names some cases, those of the others stay.

    Raises:
        SystemExit: If they were recorded on another processor, whose last bits may be others.
    """
    kept = load() if only and RESULTS.exists() else {"processor": processor(), "merges": {}}
    if kept["processor"] != processor():
        raise SystemExit(f"The stored merges are of {kept['processor']}: record them all, without --only.")
    store(found, kept["merges"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or record; return the exit code."""
    options = parse(arguments)
    started = time.perf_counter()
    with ExitStack() as stack:
        hub = stack.enter_context(local_hub())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-")))
        merger = Merger(folder, hub, options.chunk_elements)
        found = run(options.only, merger, print if options.verbose else lambda line: None)
    problems = unequal(found)
    if options.record:
        record(found, options.only)
    else:
        problems += compare(found, options.only)
    print(*problems, sep="\n", end="\n" if problems else "")
    done = "recorded" if options.record else "compared"
    print(f"{len(found)} merges {done} in {time.perf_counter() - started:.0f} s, {len(problems)} problems")
    return 1 if problems or not found else 0


if __name__ == "__main__":
    raise SystemExit(main())
