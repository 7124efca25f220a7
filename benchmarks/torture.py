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
import errno
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hostile

RESULTS = Path(__file__).parent / "results" / "torture.json"
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"

#: Said by a child when the attack strikes, to tell an attack that was survived from one that never came.
STRUCK = b"(struck)\n"

#: A reader may grow by so much, over all the cases of its part.
MEMORY_BYTES = 200_000_000

#: For one merge under attack, which takes a second or two.
ATTACK_SECONDS = 120

#: For all parts together; on two cores they took a quarter of it.
LIMIT_MINUTES = 60.0

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove")


#: What a merge report says of one run only.
_DIFFERS: dict[str, Any] = {"seconds": 0, "peak_memory_bytes": 0, "profile": {}}


@dataclass
class Tally:
    """What one part did: attacks by outcome, and each failure in words."""

    attacks: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    memory_growth_bytes: int = 0

    def add(self, outcome: str, failure: str = "") -> None:
        self.attacks += 1
        self.outcomes[outcome] += 1
        if failure:
            self.failures.append(failure)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcomes": dict(sorted(self.outcomes.items()))}


class Victim:
    """A family of checkpoints, a recipe that merges it, and what an undisturbed merge makes of it."""

    def __init__(self, folder: Path, *, rows: int = 64, inside: str = ".") -> None:
        import yaml

        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self.output = folder / inside / "merged"
        for number, name in enumerate(("base", "a", "b", "c")):
            hostile.write_checkpoint(folder / name, seed=number, rows=rows)
        values = {
            "schema": 1,
            "base_model": "./base",
            "tasks": [{"name": name, "model": f"./{name}"} for name in "abc"],
            "preference": {"weights": {"a": 0.6, "b": 0.3, "c": 0.1}},
            # A file for each large tensor.
            "output": {"path": f"{inside}/merged", "shard_size": f"{32 * rows}B"},
        }
        self.recipe_text = yaml.safe_dump(values, sort_keys=False)
        self.recipe.write_text(self.recipe_text)
        self.output.parent.mkdir(exist_ok=True)
        before = set(folder.rglob("*"))
        code, said = merge_in_child(self)
        assert code == 0, said
        self.expected = contents(self.output)
        assert len([name for name in self.expected if name.endswith(".safetensors")]) > 2
        shutil.rmtree(self.output)
        self.at_rest = before
        assert set(folder.rglob("*")) == before

    @property
    def arguments(self) -> list[str]:
        return ["merge", str(self.recipe)]

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    def state(self) -> str:
        """Return `absent` or `complete`, or what is wrong with the output."""
        if not self.output.exists():
            return "absent"
        found = contents(self.output)
        if found.keys() != self.expected.keys():
            return f"files {sorted(found.keys() ^ self.expected.keys())} are missing or surplus"
        changed = [name for name in found if found[name] != self.expected[name]]
        return f"other bytes in {changed}" if changed else "complete"

    def leftovers(self) -> list[str]:
        left = {
            path for path in set(self.folder.rglob("*")) - self.at_rest if self.output not in path.parents
        }
        return sorted(str(path.relative_to(self.folder)) for path in left - {self.output})

    def reset(self) -> None:
        for path in (self.output, self.partial):
            shutil.rmtree(path, ignore_errors=True)


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`; of reports, without times and memory."""
    return {
        str(path.relative_to(folder)): _hash(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _hash(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "merge_report.json":
        with contextlib.suppress(ValueError):
            content = json.dumps(json.loads(content) | _DIFFERS).encode()
    return hashlib.sha256(content).hexdigest()


# A child is forked where every module is loaded already: a merge then takes milliseconds.


def merge_in_child(victim: Victim, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run the merge of `victim` in a child; return its exit code (minus the signal) and what it said."""
    return finish_child(victim, start_child(victim, prepare))


def start_child(
    victim: Victim, prepare: Callable[[], None] = lambda: None, arguments: list[str] | None = None
) -> int:
    """Run hub-magmax on `victim` in a child, after `prepare` there; return the child's id."""
    from hub_magmax.cli import main

    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(_said(victim), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(ATTACK_SECONDS)  # which ends a child that hangs, and counts as a failure
            prepare()
            main(arguments or victim.arguments, standalone_mode=False)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return child


def finish_child(victim: Victim, child: int) -> tuple[int, str]:
    """Wait for a child; return its exit code (minus the signal) and what it said."""
    _, status = os.waitpid(child, 0)
    said = _said(victim).read_text(errors="replace") if _said(victim).exists() else ""
    _said(victim).unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), said


def _said(victim: Victim) -> Path:
    return victim.folder.with_name(victim.folder.name + "-said")


def _watch_changes(folder: Path, strike: Callable[[str], None]) -> None:
    """Call `strike` before each change of the file system below `folder` that this process makes."""
    from hub_magmax.merging.output import shard

    below = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if arguments[2] & _WRITING and os.fspath(arguments[0]).startswith(below):
                strike("open")
        elif event in _CHANGES:
            strike(event)

    original_write, original_sync = shard.ShardFile.write, os.fsync

    def write(self: Any, content: Any, start: int) -> None:
        strike("write")
        original_write(self, content, start)

    def fsync(fd: Any) -> None:
        strike("fsync")
        original_sync(fd)

    shard.ShardFile.write = write  # type: ignore[method-assign]
    os.fsync = fsync
    sys.addaudithook(hook)


def strike_at(number: int, action: Callable[[str], None], kinds: tuple[str, ...] = ()) -> Any:
    seen = [0]

    def strike(kind: str) -> None:
        if not kinds or kind in kinds:
            seen[0] += 1
            if seen[0] == number:
                os.write(2, STRUCK)
                action(kind)

    return strike


def _judge(
    victim: Victim,
    tally: Tally,
    name: str,
    code: int,
    said: str,
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Look at what one attack left, run the same command again after `prepare`, and look again."""
    first = victim.state()
    problems = []
    if first not in ("absent", "complete"):
        problems.append(f"half an output: {first}")
    if code not in (0, 1, -signal.SIGKILL):
        problems.append(f"exit code {code}: {said[-300:]}")
    if code == 1 and not one_paragraph(said):
        problems.append(f"not one paragraph: {said[-300:]}")
    if code == 0 and first != "complete":
        problems.append(f"success without an output: {first}")
    prepare()
    again, said_again = merge_in_child(victim)
    # Killed between the rename and the end, the model is there: the same command may say just that.
    finished = first == "complete" and "already holds a model" in said_again
    if again != 0 and not finished:
        problems.append(f"the same command fails: {said_again[-300:]}")
    last = victim.state()
    if last != "complete":
        problems.append(f"in the end: {last}")
    if victim.leftovers():
        problems.append(f"leftovers: {victim.leftovers()}")
    outcome = "killed" if code < 0 else ("refused" if code else "survived")
    tally.add(f"{outcome}, output {first}, then {last}", "; ".join(f"{name}: {text}" for text in problems))
    victim.reset()


def one_paragraph(said: str) -> bool:
    """Say whether a message is what people get: one paragraph that starts with `Error:`."""
    lines = [line for line in said.strip().split("\n") if not line.startswith("merging ")]
    return len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in said


def _every_step(
    victim: Victim, tally: Tally, prepare: Callable[[int], Callable[[], None]], every: int
) -> None:
    """Attack the first, second, … step until the merge is over before its turn comes."""
    for number in range(1, 10_000, every):
        code, said = merge_in_child(victim, prepare(number))
        if STRUCK.decode() not in said:
            victim.reset()
            return
        _judge(victim, tally, f"step {number}", code, said.replace(STRUCK.decode(), ""))


def crash_points(victim: Victim, *, every: int = 1) -> Tally:
    """Kill the process before each change of the file system: open, write, fsync, rename, mkdir, remove."""
    tally = Tally()

    def prepare(number: int) -> Callable[[], None]:
        kill = strike_at(number, lambda kind: os.kill(os.getpid(), signal.SIGKILL))
        return lambda: _watch_changes(victim.folder, kill)

    _every_step(victim, tally, prepare, every)
    return tally


def full_disk(victim: Victim, *, every: int = 1) -> Tally:
    """Answer `no space left` to the first, second, … call that needs space."""
    tally = Tally()

    def refuse(kind: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def prepare(number: int) -> Callable[[], None]:
        kinds = ("open", "write", "fsync", "os.rename", "os.mkdir")
        return lambda: _watch_changes(victim.folder, strike_at(number, refuse, kinds))

    _every_step(victim, tally, prepare, every)
    return tally


def no_memory(victim: Victim, *, every: int = 1) -> Tally:
    """Let memory run out at the first, second, … call that changes the disk."""
    tally = Tally()

    def refuse(kind: str) -> None:
        raise MemoryError

    def prepare(number: int) -> Callable[[], None]:
        kinds = ("open", "write", "fsync", "os.rename", "os.mkdir")
        return lambda: _watch_changes(victim.folder, strike_at(number, refuse, kinds))

    _every_step(victim, tally, prepare, every)
    return tally


def source_changes(victim: Victim, *, every: int = 1) -> Tally:
    """Change a checkpoint just before the first, second, … read of any.

    The output may be made of the changed file as a whole, where none of it had been read for the merge yet.
    """
    tally, path = Tally(), victim.folder / "b" / "model.safetensors"
    good = path.read_bytes()
    changed = good[:-40] + bytes(8) + good[-32:]  # the last two floating-point numbers; four integers follow
    assert changed != good
    path.write_bytes(changed)
    code, said = merge_in_child(victim)
    assert code == 0, said
    of_changed = contents(victim.output)
    victim.reset()
    path.write_bytes(good)

    def change(kind: str) -> None:
        stamp = path.stat().st_mtime_ns + 10**9  # no tick of the clock may hide it
        with path.open("r+b") as file:
            file.write(changed)
        os.utime(path, ns=(stamp, stamp))

    for number in range(1, 10_000, every):
        code, said = merge_in_child(victim, lambda number=number: _watch_reads(strike_at(number, change)))
        if STRUCK.decode() not in said:
            victim.reset()
            return tally
        if code == 0 and contents(victim.output) == of_changed:
            tally.add("survived, output of the changed file")
            victim.reset()
            path.write_bytes(good)
        else:
            said = said.replace(STRUCK.decode(), "")
            _judge(victim, tally, f"read {number}", code, said, lambda: path.write_bytes(good))
    return tally


def size_limits(victim: Victim, *, limits: tuple[int, ...] = ()) -> Tally:
    """Let the kernel refuse every byte beyond a limit on the size of files, for many limits."""
    tally = Tally()
    largest = max(path.stat().st_size for path in victim.folder.rglob("*") if path.is_file())
    for limit in limits or (0, 1, 30, 70, 71, 100, 150, 200, 250, *range(300, 4 * largest, 100)):
        said = victim.folder.with_name("said")
        # What it says must not meet the limit itself, so it goes into a pipe.
        with _pipe_to(said) as end:

            def prepare(limit: int = limit, end: int = end) -> None:
                os.dup2(end, 1)
                os.dup2(end, 2)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            code, _ = merge_in_child(victim, prepare)
        text = said.read_text(errors="replace")
        said.unlink()
        if code == 0:
            victim.reset()
            break
        _judge(victim, tally, f"limit of {limit} bytes", code, text)
    return tally


@contextlib.contextmanager
def _pipe_to(path: Path) -> Iterator[int]:
    reader, writer = os.pipe()
    try:
        yield writer
    finally:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            path.write_bytes(file.read())


def read_errors(victim: Victim, *, every: int = 1) -> Tally:
    """Let the first, second, … read of a checkpoint fail with an input/output error."""
    tally = Tally()

    def fail(kind: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def prepare(number: int) -> Callable[[], None]:
        return lambda: _watch_reads(strike_at(number, fail))

    _every_step(victim, tally, prepare, every)
    return tally


def _watch_reads(strike: Callable[[str], None]) -> None:
    """Call `strike` before each read of a checkpoint that this process makes."""
    original = os.preadv

    def preadv(*arguments: Any) -> int:
        strike("read")
        return original(*arguments)

    os.preadv = preadv


def kills(victim: Victim, *, count: int = 100, seed: int = 0) -> Tally:
    """Kill real `hub-magmax merge` processes at random moments after they began to write."""
    tally = Tally()
    generator = random.Random(seed)
    for number in range(count):
        process = subprocess.Popen(
            [sys.executable, "-m", "hub_magmax", *victim.arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if victim.partial.exists():
                time.sleep(generator.random() * 0.25)
                break
            time.sleep(0.0005)
        process.kill()
        code = process.wait()
        _judge(victim, tally, f"kill {number}", code, "")
    return tally


def hub_kills(victim: Victim, **options: Any) -> Tally:
    """Kill `hub-magmax run` at random moments, pushing included."""
    from benchmarks import hub_attacks

    return hub_attacks.kills(victim, **options)


def hub_requests(victim: Victim, **options: Any) -> Tally:
    """Kill `hub-magmax run` before and after each request that it sends."""
    from benchmarks import hub_attacks

    return hub_attacks.requests(victim, **options)


def relay_kills(victim: Victim, **options: Any) -> Tally:
    """Kill `hub-magmax run` at random moments while it merges straight to the Hub."""
    from benchmarks import hub_attacks

    return hub_attacks.kills(victim, keep=False, **options)


def relay_requests(victim: Victim, **options: Any) -> Tally:
    """Kill `hub-magmax run` before and after each request of a merge straight to the Hub."""
    from benchmarks import hub_attacks

    return hub_attacks.requests(victim, keep=False, **options)


def small_disk(victim: Victim, *, step_bytes: int = 4096) -> Tally:
    """Merge onto real file systems that are too small, then make them large and merge again.

    Needs a mount of its own, which `in_a_process` gives it where the system allows; else nothing is done.
    """
    tally = Tally()
    room = victim.output.parent
    enlarge = ["mount", "-o", "remount,size=64m", str(room)]
    for size in range(step_bytes, 1 << 24, step_bytes):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(room)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return tally
        try:
            code, said = merge_in_child(victim)
            if code == 0:
                return tally
            _judge(
                victim,
                tally,
                f"{size} bytes",
                code,
                said,
                prepare=lambda: subprocess.run(enlarge, check=True),
            )
        finally:
            subprocess.run(["umount", str(room)], check=True)
    return tally


# Hostile bytes.


class _Hang(BaseException):
    pass


def _alarm(number: int, frame: Any) -> None:
    raise _Hang


def fuzz(
    case: Callable[[random.Random], Callable[[], None]], count: int, seed: int, limit_seconds: int = 10
) -> Tally:
    """Run `count` generated cases; each must succeed or raise a HubMagmaxError, and soon.

    Args:
        case: Makes one case from a generator: what to run, with a text that shows the input.
        count: How many.
        seed: Of the cases, which are the same for the same seed.
        limit_seconds: After which a case counts as a hang.
    """
    from hub_magmax.errors import HubMagmaxError

    hostile.read_good()  # what is imported and built once is no growth
    tally = Tally()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, _alarm)
    try:
        for number in range(count):
            run = case(random.Random(f"{seed}/{number}"))
            started = time.perf_counter()
            signal.alarm(limit_seconds)
            try:
                run()
                tally.add("accepted")
            except HubMagmaxError as error:
                problem = "" if len(str(error)) < 3000 else f"a message of {len(str(error)):,} characters"
                tally.add("refused", f"case {number}: {problem}" if problem else "")
            except _Hang:
                tally.add("hang", f"case {number}: no answer within {limit_seconds} s")
            except Exception as error:
                trace = error.__traceback__
                while trace is not None and trace.tb_next is not None:
                    trace = trace.tb_next
                place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
                tally.add(
                    "traceback", f"case {number}: {type(error).__name__} in {place}: {str(error)[:100]}"
                )
            finally:
                signal.alarm(0)
            tally.slowest_seconds = max(tally.slowest_seconds, time.perf_counter() - started)
    finally:
        signal.signal(signal.SIGALRM, previous)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    tally.memory_growth_bytes = grown * (1 if sys.platform == "darwin" else 1024)
    if tally.memory_growth_bytes > MEMORY_BYTES:
        tally.failures.append(f"grew by {tally.memory_growth_bytes:,} bytes")
    return tally


def headers(count: int = 20_000, seed: int = 0) -> Tally:
    """Read the headers and all tensors of mutated safetensors files."""
    return fuzz(hostile.header_case, count, seed)


def indexes(count: int = 5_000, seed: int = 0) -> Tally:
    """Read checkpoints with mutated model.safetensors.index.json files."""
    return fuzz(hostile.index_case, count, seed)


def recipes(count: int = 5_000, seed: int = 0) -> Tally:
    """Load mutated recipes; those that are accepted must survive a round trip."""
    with tempfile.TemporaryDirectory() as folder:
        return fuzz(lambda generator: hostile.recipe_case(generator, Path(folder)), count, seed)


#: By name: what is attacked, and how many rows the victim's tensors have.
MERGES: dict[str, tuple[Callable[..., Tally], int]] = {
    "kills": (kills, 65_536),
    "hub_kills": (hub_kills, 4096),
    "hub_requests": (hub_requests, 64),
    "relay_kills": (relay_kills, 4096),
    "relay_requests": (relay_requests, 64),
    "crash_points": (crash_points, 64),
    "full_disk": (full_disk, 64),
    "small_disk": (small_disk, 64),
    "size_limits": (size_limits, 64),
    "read_errors": (read_errors, 64),
    "source_changes": (source_changes, 64),
    "no_memory": (no_memory, 64),
}
READERS: dict[str, Callable[..., Tally]] = {"headers": headers, "indexes": indexes, "recipes": recipes}


def run_part(name: str, **options: Any) -> Tally:
    """Carry out one part in a fresh folder."""
    started = time.perf_counter()
    if name in READERS:
        tally = READERS[name](**options)
    else:
        import torch

        import hub_magmax.merging  # noqa: F401  (loaded before children are forked)

        torch.set_num_threads(1)
        attack, rows = MERGES[name]
        with tempfile.TemporaryDirectory() as folder:
            inside = "small" if name == "small_disk" else "."
            victim = Victim(Path(folder) / "victim", rows=options.pop("rows", rows), inside=inside)
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
    RESULTS.parent.mkdir(exist_ok=True)
    deadline = time.monotonic() + limit_seconds
    for name in names:
        stored = {"parts": {}, **(json.loads(RESULTS.read_text()) if RESULTS.is_file() else {})}
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
        RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


def machine() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "safetensors", "huggingface_hub", "pydantic", "PyYAML")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {re.split('[-+]', platform.release())[0]} {platform.machine()}",
        "cores": str(os.cpu_count()),
    } | {name: version(name) for name in packages}


_PARTS = {
    "kills": "SIGKILL of a real `hub-magmax merge` at a random moment of its writing",
    "hub_kills": "SIGKILL of `hub-magmax run`, which merges and pushes to a local Hub, at a random moment",
    "hub_requests": "SIGKILL of `hub-magmax run` before and after each request that it sends",
    "relay_kills": "SIGKILL of a merge straight to the Hub (`output.keep: false`) at a random moment",
    "relay_requests": "SIGKILL of a merge straight to the Hub before and after each request that it sends",
    "crash_points": "SIGKILL before each change on the disk: open, write, fsync, rename, mkdir, remove",
    "full_disk": "`No space left on device` at each call that needs space",
    "small_disk": "A real file system (tmpfs) that is too small, page by page, and then large enough",
    "size_limits": "The kernel's limit on the size of files, from 0 bytes up",
    "read_errors": "`Input/output error` at each read of a checkpoint",
    "source_changes": "A checkpoint that is changed before each read",
    "no_memory": "`MemoryError` at each call that changes the disk",
    "headers": "Mutated safetensors files",
    "indexes": "Mutated `model.safetensors.index.json`",
    "recipes": "Mutated recipes",
}

_INTRO = """# Reliability, measured

Made by `python -m benchmarks.torture --write` from `benchmarks/results/torture.json`; `make torture`
measures again, in an hour at most. An attack succeeds if it leaves half a model, a wrong byte, a file
behind, a traceback, a hang, or a process that grows by more than 200 MB. The count of these is the last
column.

"""

_OUTRO = """
After each attack on a merge the output is looked at (absent or complete, never half), the same command
runs again, and its output is compared byte for byte with that of an undisturbed merge, with nothing left
beside it. After a kill during a push every commit on the Hub is looked at: none may hold a part of a
model, and after the second run exactly one holds it. Where the process was killed after the rename the
model is complete already; `merge` may then refuse, saying that the output holds a model. An attack on a
reader must be answered within ten seconds by success or by one paragraph that says what is wrong; the
table gives the slowest answer and how much the process grew over the whole part.

## What a merge promises

- **Complete or absent.** Shards are written to `NAME.partial`, forced to the disk, read back, and compared
  with the sha256 of what was written. The folder gets its name by one rename, after all of its files and
  names are on the disk. A killed merge goes on with its first unfinished shard; whatever else lies in
  `NAME.partial` is removed first, so that nothing of an earlier attempt comes into the output.
- **One writer.** A second process on the same output is told so and ends.
- **One version of each source.** Every read is compared with the file as it was when first opened: device,
  inode, size, time of the last change. Times are compared for equality only, so a clock that jumps does not
  matter.
- **NaN and infinity** in a tensor that is merged end the merge, with the tensor, its file and the place. In
  one that is only copied they may be meant: it is copied, and report and card name it. A finite value that
  the output's dtype cannot hold is an error in both.
- **Memory that runs out** ends a command as a full disk does: one paragraph, nothing at the output, and the
  same command goes on.
- **Names of files** from a repository that lead elsewhere on some system (separators, Windows' devices,
  control characters) are not copied, and refused for weights. What is copied is at most 500 MB a file.
- **Recipes** are at most 1 MB, with 50,000 values, 30 levels and numbers of 100 characters, so that each is
  answered in seconds. One that holds an access token, or an address with a password, is refused, since
  recipes are published. Errors never repeat a token, nor the one in `HF_TOKEN`.
- **Links.** A link in a checkpoint folder is followed only inside that folder, or from a snapshot of the
  Hub's cache to that cache's blobs. A repository that was cloned can otherwise hold a link to any file of its
  reader's, which would be copied into the output, and published.
- **Quantised checkpoints** (GPTQ, AWQ, bitsandbytes, FP8 or INT8 with scales, compressed-tensors, MXFP4, or
  a `quantization_config`) are refused before anything is read: their numbers are codes.
- **Architectures.** Every `config.json` that states a `model_type` must state the same one, since models of
  two types can have tensors of the same names and shapes. The same holds for `architectures`, unless the
  recipe has rules for `tensors`, which say whose head is kept. An adapter must fit the base model's layers
  by name and shape; one that is more than a product of matrices is refused.
- **Tokenizers** and chat templates that differ are no error: `plan`, the merge report and the card name the
  sources and the files, and whose tokenizer the merged model gets.
- **Headers and indexes** are at most 100 MB, name every tensor once, and may have 64 dimensions. A size is
  believed only where it agrees with the file's, so a header cannot make anything large be allocated.

## What can be checked afterwards

`hub-magmax verify MODEL` compares every file that the merge wrote with the sha256 in `merge_report.json`:
the weights, their index, config, tokenizer, processor, recipe, lock and provenance. A file that loaders
read and that the merge did not write (weights, code, `*.json` and the like) is an error too. The card,
its picture, the scores and a signature may change later and are not compared. Whoever changes a file can
change the report too, so `--rebuild` merges again from the pinned sources and compares every tensor, naming
the first one that differs, and then every file but recipe and lock, which it merges from.

`provenance.json` is an [in-toto statement](https://in-toto.io/Statement/v1) with a [SLSA
provenance](https://slsa.dev/provenance/v1) predicate. Its subjects are the weight files. Its build type
`urn:hub_magmax:merge:1` means: `externalParameters.recipe` is the recipe; `internalParameters` are the
digests of lock and plan, the method with its options, the preference as numbers with the fingerprint of
its data, and the seed; `resolvedDependencies` are the sources (`hf://` names with their commits, or
folders relative to the recipe), their weight files, the files that were copied from one of them, and the
data sets, those on the Hub with their commits, others with a digest of their files. The versions of the
software are the builder's. It names no time and no machine, so a merge that is repeated states the same.

`hub-magmax sign FOLDER --private-key KEY` writes `model.sig` by [OpenSSF
model-signing](https://github.com/sigstore/model-transparency) (`pip install 'hub-magmax[signing]'`),
with a PEM file of an elliptic curve key, and without the network. It covers what `verify` compares and
the merge report itself. `hub-magmax verify FOLDER --public-key KEY` checks it. The card is not covered,
because a push puts the repository's name into it.

What is not promised: that a write survives a disk that lies about having stored it; that a file changed in
place twice within one tick of the file system's clock (a few milliseconds) is noticed; that a merge ends
where the kernel refuses memory to a thread that is just starting, for which Python may then wait for ever (a
merge that is killed then goes on like any other); POSIX systems only.
"""


def page(results: dict[str, Any]) -> str:
    """Return docs/reliability.md."""
    rows = [
        "| attack | times | what happened | slowest | growth | failures |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, title in _PARTS.items():
        if (found := results["parts"].get(name)) is None:
            continue
        outcomes = "; ".join(f"{count:,} {text}" for text, count in found["outcomes"].items())
        reading = name in READERS
        slowest = f"{found['slowest_seconds']:.2f} s" if reading else ""
        growth = f"{found['memory_growth_bytes'] / 1e6:.0f} MB" if reading else ""
        failures = len(found["failures"])
        rows.append(f"| {title} | {found['attacks']:,} | {outcomes} | {slowest} | {growth} | {failures} |")
    text = _INTRO + "\n".join(rows) + "\n" + _OUTRO
    listed = [f"- {title}: {line}" for p, title in _PARTS.items() for line in _failures(results, p)]
    text += "\n## Failures\n\n" + ("\n".join(listed) if listed else "None.") + "\n"
    if missing := results.get("unmeasured"):
        titles = "; ".join(_PARTS[name] for name in missing)
        text += (
            f"\nNot measured in the latest run, whose time was over (a row is of an earlier one): {titles}.\n"
        )
    facts = ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items())
    return text + f"\nMeasured with {facts}.\n"


def _failures(results: dict[str, Any], part: str) -> list[str]:
    found: list[str] = results["parts"].get(part, {}).get("failures", [])
    return found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", choices=_PARTS, action="append", help="measure only this part; may be repeated"
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
        measure(options.part or list(_PARTS), 60 * options.minutes)
    results = json.loads(RESULTS.read_text())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results))
    failed = any(part["failures"] for part in results["parts"].values())
    return 1 if failed or results.get("unmeasured") else 0


if __name__ == "__main__":
    raise SystemExit(main())
