"""Attack a merge: kills, full disks, broken reads, hostile bytes. Count what came of it.

    python -m benchmarks.torture                 everything, a quarter of an hour on two cores
    python -m benchmarks.torture --part kills    one part
    python -m benchmarks.torture --write         docs/reliability.md, from the stored results

Every attack must end in one of two ways: a complete model, byte for byte the one that an undisturbed
merge makes, or no model and one paragraph that says what to do. Anything else is a failure and listed.

All parts together get an hour (`--minutes`). When it is over, the part in progress is killed and no other
begins; what was not measured is named, here and on the page, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import hub_attacks, merge_attacks, reader_attacks, reliability
from benchmarks.victims import RoundsVictim, SitesVictim, Tally, TrainingVictim, Victim

#: For all parts together; on two cores they took a quarter of it.
LIMIT_MINUTES = 60.0

#: By name: what is attacked, and how many rows the victim's tensors have, or steps its training takes.
MERGES: dict[str, tuple[Callable[..., Tally], int]] = {
    "kills": (merge_attacks.kills, 65_536),
    "site_kills": (merge_attacks.random_kills, 4096),
    "finetune_kills": (partial(merge_attacks.random_kills, count=20), 20),
    "alternate_kills": (partial(merge_attacks.random_kills, count=20), 4),
    "hub_kills": (hub_attacks.kills, 4096),
    "hub_requests": (hub_attacks.requests, 64),
    "relay_kills": (partial(hub_attacks.kills, keep=False), 4096),
    "relay_requests": (partial(hub_attacks.requests, keep=False), 64),
    "crash_points": (merge_attacks.crash_points, 64),
    "full_disk": (merge_attacks.full_disk, 64),
    "small_disk": (merge_attacks.small_disk, 64),
    "size_limits": (merge_attacks.size_limits, 64),
    "read_errors": (merge_attacks.read_errors, 64),
    "source_changes": (merge_attacks.source_changes, 64),
    "no_memory": (merge_attacks.no_memory, 64),
}
#: What is attacked where it is another victim than one merge.
VICTIMS: dict[str, type[Victim]] = {
    "site_kills": SitesVictim,
    "finetune_kills": TrainingVictim,
    "alternate_kills": RoundsVictim,
}
READERS: dict[str, Callable[..., Tally]] = {
    "headers": reader_attacks.headers,
    "indexes": reader_attacks.indexes,
    "recipes": reader_attacks.recipes,
}


def run_part(name: str, **options: Any) -> Tally:
    """Carry out one part in a fresh folder."""
    started = time.perf_counter()
    if name in READERS:
        tally = READERS[name](**options)
    else:
        import torch

        import hub_magmax.merging.execution
        import hub_magmax.pipeline  # noqa: F401  (loaded before children are forked)

        torch.set_num_threads(1)
        attack, rows = MERGES[name]
        with tempfile.TemporaryDirectory() as folder:
            inside = "small" if name == "small_disk" else "."
            victim = VICTIMS.get(name, Victim)(
                Path(folder) / "victim", rows=options.pop("rows", rows), inside=inside
            )
            tally = attack(victim, **options)
    tally.seconds = time.perf_counter() - started
    return tally


def in_a_process(parts: dict[str, dict[str, Any]], limit_seconds: float | None = None) -> dict[str, Any]:
    """Carry out parts, by name with their options, in a process that may fork and whose memory is its own.

    Raises:
        subprocess.TimeoutExpired: After `limit_seconds`, with every process of the parts killed.
    """
    command = [sys.executable, "-m", "benchmarks.torture", "--print", json.dumps(parts)]
    if "small_disk" in parts and may_mount():
        command = ["unshare", "--map-root-user", "--mount", *command]
    root = Path(__file__).parent.parent
    with (
        # For what a part leaves behind that is killed.
        tempfile.TemporaryDirectory(prefix="torture_", ignore_cleanup_errors=True) as temporary,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=os.environ | {"TMPDIR": temporary},
            start_new_session=True,  # a group of its own, which can be killed as a whole
        ) as process,
    ):
        try:
            answer, _ = process.communicate(timeout=limit_seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    found: dict[str, Any] = json.loads(answer)
    return found


def may_mount() -> bool:
    """Say whether this system lets a process mount a file system that nobody else sees."""
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return False


def measure(names: list[str], limit_seconds: float) -> None:
    """Measure the parts `names` anew, and store each as soon as it is done, until the time is over."""
    reliability.RESULTS.parent.mkdir(exist_ok=True)
    deadline = time.monotonic() + limit_seconds
    for name in names:
        stored = {"parts": {}, **reliability.load()}
        unmeasured = [part for part in stored.get("unmeasured", []) if part != name]
        found = None
        if (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                found = in_a_process({name: {}}, left)[name]
        if found is None:
            unmeasured.append(name)
            print(
                f"{name}: {'cut off' if left > 0 else 'not begun'}, {limit_seconds / 60:g} minutes are over"
            )
        else:
            stored = {"parts": stored["parts"] | {name: found}, "machine": machine()}
            print(
                f"{name}: {found['attacks']} attacks, {len(found['failures'])} failures, "
                f"{found['seconds']:.0f} s"
            )
        stored = {key: stored[key] for key in ("parts", "machine") if key in stored}
        stored |= {"unmeasured": unmeasured} if unmeasured else {}
        reliability.RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


def machine() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "safetensors", "huggingface_hub", "pydantic", "PyYAML")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {re.split('[-+]', platform.release())[0]} {platform.machine()}",
        "cores": str(os.cpu_count()),
    } | {name: version(name) for name in packages}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", choices=reliability.PARTS, action="append", help="measure only this part; may be repeated"
    )
    parser.add_argument(
        "--minutes", type=float, default=LIMIT_MINUTES, help="for all parts together; %(default)g"
    )
    parser.add_argument("--write", action="store_true", help="only write the page from the stored results")
    parser.add_argument(
        "--print", metavar="PARTS", help="print the results of parts, a JSON object of options"
    )
    options = parser.parse_args()
    if options.print:
        parts = json.loads(options.print)
        print(json.dumps({name: run_part(name, **parts[name]).to_dict() for name in parts}))
        return 0
    if not options.write:
        measure(options.part or list(reliability.PARTS), 60 * options.minutes)
    results = reliability.load()
    reliability.PAGE.parent.mkdir(exist_ok=True)
    reliability.PAGE.write_text(reliability.page(results))
    failed = any(part["failures"] for part in results["parts"].values())
    return 1 if failed or results.get("unmeasured") else 0


if __name__ == "__main__":
    raise SystemExit(main())
