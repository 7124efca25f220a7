"""Time reading checkpoints from a Hub with latency against the same bytes by plain parallel ranges.

    python -m benchmarks.hub_throughput            # print
    python -m benchmarks.hub_throughput --write    # and store in benchmarks/results/hub_throughput.json

A local Hub in another process waits before every answer and sends at a limited speed on each
connection, as a distant one does. `ranges` fetches all files by 32 requests of 8 MiB at a time and throws
the bytes away; `read` reads every tensor as a merge does, in its order and chunks; `merge` is `hub_magmax`'s
own merge, from the lock to the finished folder. Every number is the median of `--repeat` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.timing import timed

ROOT = Path(__file__).parents[1]  # where `tests.local_hub` is found from
RESULTS = ROOT / "benchmarks" / "results" / "hub_throughput.json"
_PIECE, _REQUESTS = 8 * 2**20, 32
_SERVER = """
import sys, threading
from pathlib import Path
from tests.local_hub.hub import LocalHub
with LocalHub() as hub:
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        hub.add_repo(f"me/{folder.name}", folder=folder, link=True)
    hub.faults.add("*", "latency", seconds=float(sys.argv[2]))
    hub.faults.add("/_storage/*", "bandwidth", bytes_per_second=float(sys.argv[3]))
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""


def make_checkpoints(folder: Path, num_tasks: int, num_elements: int) -> None:
    """Write a base model and checkpoints in bfloat16, each in four files."""
    import torch

    from tests.families import write_checkpoint

    shapes = {f"layer.{number}.weight": (num_elements // 32 // 1024, 1024) for number in range(32)}
    for number in range(num_tasks + 1):
        generator = torch.Generator().manual_seed(number)
        tensors = {n: torch.randn(s, generator=generator).to(torch.bfloat16) for n, s in shapes.items()}
        write_checkpoint(folder / ("base" if number == 0 else f"task-{number}"), tensors, num_shards=4)


def measure(num_tasks: int, repeat: int) -> dict[str, Any]:
    """Return the medians of all three; a Hub must be running at HF_ENDPOINT."""
    from hub_magmax.checkpoints.opening import open_checkpoints
    from hub_magmax.checkpoints.source_cache import SourceCache
    from hub_magmax.merging.execution import merge
    from hub_magmax.pipeline import lock, plan
    from hub_magmax.planning.budget import CHUNK_ELEMENTS, READ_AHEAD_BYTES
    from hub_magmax.planning.plan import Plan
    from hub_magmax.recipe.loading import parse_recipe

    tasks = [{"name": f"t{n}", "model": f"me/task-{n}"} for n in range(1, num_tasks + 1)]
    values = {"schema": 1, "base_model": "me/base", "tasks": tasks, "method": "average"}
    recipe = parse_recipe(values | {"output": {"path": "out", "shard_size": "100MB"}})
    planned = plan(recipe, lock(recipe))

    def read(planned: Plan) -> None:
        with open_checkpoints(recipe, planned.lock, SourceCache()) as sources:
            for name, names in planned.tensors_read(planned.jobs).items():
                sources[name].expect(names, READ_AHEAD_BYTES // len(sources))
            for job in planned.jobs:
                for start in range(0, job.num_elements, CHUNK_ELEMENTS):
                    stop = min(start + CHUNK_ELEMENTS, job.num_elements)
                    for source in sources.values():
                        source.read(job.name, start, stop)
                        source.release(job.name, stop)

    def whole() -> None:
        cache = SourceCache()
        with tempfile.TemporaryDirectory() as folder:
            merge(plan(recipe, lock(recipe, cache=cache), cache=cache), Path(folder) / "out", cache=cache)

    rounds = [
        {
            "ranges": timed(lambda: fetch_ranges(planned)),
            "read": timed(lambda: read(planned)),
            "merge": timed(whole),
        }
        for _ in range(repeat)
    ]
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return {
        "bytes": planned.bytes_in,
        "seconds": seconds,
        "share_of_plain_ranges": {name: seconds["ranges"] / seconds[name] for name in seconds},
    }


def fetch_ranges(planned: Any) -> None:
    """Fetch all weight files by parallel ranges, each of them resolved once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import get_session

    def locate(file: tuple[str, str, str]) -> str:
        repo_id, path, commit = file
        return get_hf_file_metadata(hf_hub_url(repo_id, path, revision=commit)).location

    def fetch(part: tuple[str, int, int]) -> int:
        url, start, stop = part
        with get_session().stream("GET", url, headers={"Range": f"bytes={start}-{stop - 1}"}) as answer:
            return sum(len(block) for block in answer.iter_raw())

    sources = planned.lock.sources.values()
    files = [(s.repo_id, f.path, s.commit) for s in sources for f in s.files]
    sizes = [file.size_bytes for source in sources for file in source.files]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        urls = list(pool.map(locate, files))
        parts = [
            (url, start, min(start + _PIECE, size))
            for url, size in zip(urls, sizes, strict=True)
            for start in range(0, size, _PIECE)
        ]
        assert sum(pool.map(fetch, parts)) == sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--elements", type=int, default=2**27, help="of each checkpoint")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--bandwidth", type=float, default=5e6, help="bytes a second of each connection")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoints(folder / "models", options.tasks, options.elements)
        arguments = [str(folder / "models"), str(options.latency), str(options.bandwidth)]
        command = [sys.executable, "-c", _SERVER, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True, cwd=ROOT) as server:
            assert server.stdin is not None and server.stdout is not None
            os.environ |= {
                "HF_ENDPOINT": server.stdout.readline().strip(),
                "HF_HOME": str(folder / "home"),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            found = measure(options.tasks, options.repeat)
            server.stdin.close()
    found |= {"options": {k: v for k, v in vars(options).items() if k != "write"}}
    found |= {"machine": {"cores": os.cpu_count(), "python": platform.python_version()}}
    print(json.dumps(found, indent=2))
    if options.write:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
