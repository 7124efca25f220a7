"""Shards to processes: each output file is made by exactly one of them.

A tensor's bytes do not depend on who makes it, so nothing but finished files is shared.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from hub_magmax.errors import CheckpointError, DistributedError, HubMagmaxError, SourceError
from hub_magmax.text import Report, step

T = TypeVar("T")

#: Errors about checkpoints, which are those of every merge of the same checkpoints.
OF_ALL = (SourceError, CheckpointError)

#: Starts N processes, on a machine without a GPU too, where `accelerate launch --num_processes N` starts one.
LAUNCH = "torchrun --nproc-per-node N -m hub_magmax ..."


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is. `state` is accelerate's, None for a single process."""

    rank: int = 0
    count: int = 1
    state: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @step("waiting for the other processes")
    def wait(self) -> None:
        """Return once every process got here."""
        if self.state is not None:
            with _ended_peers():
                self.state.wait_for_everyone()

    def first_decides(self, decide: Callable[[], T]) -> T:
        """Return what `decide` gives in the first process, the same in all of them."""
        if self.state is None:
            return decide()
        from accelerate.utils import broadcast_object_list

        values: list[T | None] = [decide() if self.is_first else None]
        with _ended_peers():
            broadcast_object_list(values)
        return cast(T, values[0])

    @step("waiting for the other processes")
    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, in all of them."""
        if self.state is None:
            return [value]
        from accelerate.utils import gather_object

        with _ended_peers():
            return list(gather_object([value]))

    @contextmanager
    def failing(
        self, note: Callable[[HubMagmaxError], None], of_all: tuple[type[HubMagmaxError], ...] = OF_ALL
    ) -> Iterator[None]:
        """Hand an error of one of several merges to `note`, so that the others go on.

        Raises:
            HubMagmaxError: Errors of the types `of_all`; and every one, where other processes would wait.
        """
        try:
            yield
        except of_all:
            raise
        except HubMagmaxError as error:
            if self.count > 1:
                raise
            note(error)


@contextmanager
def _ended_peers() -> Iterator[None]:
    """Turn torch's error about a process that is gone into a message; torch raises RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            "another process of this run ended or cannot be reached",
            where="communication between processes",
            expected="every process to live until the last one is done",
            hint="The first error that a process printed is the cause; without one, it was killed, maybe for "
            "lack of memory. Start all of them again with the same command: finished shards are kept.",
        ) from error


def find_processes(report: Report = lambda line: None) -> Processes:
    """Return the place of this process among those that `accelerate launch` or torchrun started.

    Args:
        report: Called with a line if the launcher was asked for several processes and started only this one.

    Raises:
        DistributedError: If the launcher and accelerate disagree about the number of processes;
            all of them would then write the same files.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        if _is_alone_among_several():
            report(
                "note: accelerate launch was asked for several processes and started this one alone, as it "
                f"does without a GPU; start N with `{LAUNCH}`"
            )
        return Processes()  # without the seconds that importing accelerate takes
    import torch
    from accelerate import PartialState

    # Without `cpu=True` a machine without GPU is taken for a single process, whatever WORLD_SIZE says.
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != launched:
        raise DistributedError(
            f"the launcher started {launched} processes, and accelerate sees {state.num_processes}",
            where="WORLD_SIZE",
            hint=f"Start them with `{LAUNCH}`.",
        )
    if torch.distributed.get_backend() == "gloo":
        # Its threads free tensors after the interpreter is gone, and 1 exit in 50 ended with SIGABRT.
        atexit.register(state.destroy_process_group)
    return Processes(state.process_index, state.num_processes, state)


def refuse_several(work: str) -> None:
    """Raise DistributedError in each of several processes, for work that one process does."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1":
        raise DistributedError(
            f"{work} runs in one process",
            where=f"WORLD_SIZE={launched}",
            hint="Start the command without torchrun or accelerate launch.",
        )


def _is_alone_among_several() -> bool:
    """Say whether `accelerate launch` was asked for more than one process, and started one.

    Its launcher of a single process then tells that process an address at which several would meet
    (`accelerate.utils.launch.prepare_simple_launcher_cmd_env`), and no rank.
    """
    return (
        "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    )
