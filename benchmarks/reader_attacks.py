"""Attacks on readers: mutated headers, indexes and recipes, each answered soon, in little memory."""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import hostile
from benchmarks.victims import Tally

#: A reader may grow by so much, over all the cases of its part.
MEMORY_BYTES = 200_000_000


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


# Complex because it has a branch for each way in which a case may end.
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


class _Hang(BaseException):
    pass


def _alarm(number: int, frame: Any) -> None:
    raise _Hang
