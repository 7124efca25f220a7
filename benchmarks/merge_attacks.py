"""Attacks on a merge into a folder: kills, full disks, broken reads, sources that change.

Each takes a victim and returns its tally. After each attack the output must be absent or complete, and the
same command must then complete it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.victims import (
    STRUCK,
    Tally,
    Victim,
    contents,
    finish_child,
    merge_in_child,
    one_paragraph,
    start_child,
    strike_at,
    watch_changes,
    watch_reads,
)

#: Largest file system that a merge of the victim may find too small.
_ROOM_BYTES = 1 << 20


def crash_points(victim: Victim, *, every: int = 1) -> Tally:
    """Kill the process before each change of the file system: open, write, fsync, rename, mkdir, remove."""

    def prepare(number: int) -> Callable[[], None]:
        kill = strike_at(number, lambda kind: os.kill(os.getpid(), signal.SIGKILL))
        return lambda: watch_changes(victim.folder, kill)

    return _every_step(victim, prepare, every)


def full_disk(victim: Victim, *, every: int = 1) -> Tally:
    """Answer `no space left` to the first, second, … call that needs space."""
    return _refused(victim, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), every)


def no_memory(victim: Victim, *, every: int = 1) -> Tally:
    """Let memory run out at the first, second, … call that changes the disk."""
    return _refused(victim, MemoryError(), every)


def _refused(victim: Victim, error: Exception, every: int) -> Tally:
    """Let the first, second, … call that writes end in an error."""

    def refuse(kind: str) -> None:
        raise error

    def prepare(number: int) -> Callable[[], None]:
        kinds = ("open", "write", "fsync", "os.rename", "os.mkdir")
        return lambda: watch_changes(victim.folder, strike_at(number, refuse, kinds))

    return _every_step(victim, prepare, every)


def _every_step(victim: Victim, prepare: Callable[[int], Callable[[], None]], every: int) -> Tally:
    """Attack the first, second, … step until the merge is over before its turn comes."""
    tally = Tally()
    for number in range(1, 10_000, every):
        code, said = merge_in_child(victim, prepare(number))
        if STRUCK.decode() not in said:
            victim.reset()
            break
        _judge(victim, tally, f"step {number}", code, said.replace(STRUCK.decode(), ""))
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
        code, said = merge_in_child(victim, lambda number=number: watch_reads(strike_at(number, change)))
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


def read_errors(victim: Victim, *, every: int = 1) -> Tally:
    """Let the first, second, … read of a checkpoint fail with an input/output error."""

    def fail(kind: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def prepare(number: int) -> Callable[[], None]:
        return lambda: watch_reads(strike_at(number, fail))

    return _every_step(victim, prepare, every)


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


def small_disk(victim: Victim, *, step_bytes: int = 4096) -> Tally:
    """Merge onto real file systems that are too small, then make them large and merge again.

    The look for room before a merge, which would refuse all of them, is left out: others fill disks too.
    Needs a mount of its own, which `in_a_process` gives it where the system allows; else nothing is done.
    """
    tally = Tally()
    room = victim.output.parent
    enlarge = ["mount", "-o", "remount,size=64m", str(room)]
    for size in range(step_bytes, _ROOM_BYTES, step_bytes):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(room)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return tally
        try:
            code, said = merge_in_child(victim, _without_look_for_room)
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
    tally.add("refused", f"{_ROOM_BYTES} bytes are too few")
    return tally


def _without_look_for_room() -> None:
    from hub_magmax.publishing import preflight

    preflight.check_room = lambda *arguments: 0


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


def random_kills(victim: Victim, *, count: int = 50, seed: int = 0, tries: int = 3) -> Tally:
    """Kill forked commands at random moments, until `count` of them died.

    Moments are drawn from the time that the fastest of some undisturbed ones takes. One that ended before
    its moment came is judged and counted as well.
    """
    tally, generator = Tally(), random.Random(seed)
    seconds = min(_undisturbed_seconds(victim) for _ in range(tries))
    killed = 0
    while killed < count:
        child = start_child(victim)
        time.sleep(generator.random() * seconds)
        os.kill(child, signal.SIGKILL)
        code, said = finish_child(victim, child)
        _judge(victim, tally, f"kill {tally.attacks}", code, said)
        killed += code == -signal.SIGKILL
    return tally


def _undisturbed_seconds(victim: Victim) -> float:
    started = time.monotonic()
    code, said = merge_in_child(victim)
    seconds = time.monotonic() - started
    assert code == 0, said
    victim.reset()
    return seconds


# Complex because it has a condition for each promise that an attack may have broken.
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
