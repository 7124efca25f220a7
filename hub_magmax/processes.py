"""Shards to processes: each output file is made by exactly one of them.

A tensor's bytes do not depend on who makes it, so nothing but finished files is shared.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from hub_magmax.errors import DistributedError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is. `state` is accelerate's, None for a single process."""

    rank: int = 0
    count: int = 1
    state: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process got here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def first_decides(self, decide: Callable[[], T]) -> T:
        """Return what `decide` gives in the first process, the same in all of them."""
        if self.state is None:
            return decide()
        from accelerate.utils import broadcast_object_list

        values: list[T | None] = [decide() if self.is_first else None]
        broadcast_object_list(values)
        return cast(T, values[0])

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, in all of them."""
        if self.state is None:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))


def find_processes() -> Processes:
    """Return the place of this process among those that `accelerate launch` or torchrun started.

    Raises:
        DistributedError: If the launcher and accelerate disagree about the number of processes;
            all of them would then write the same files.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return Processes()  # without the seconds that importing accelerate takes
    import torch
    from accelerate import PartialState

    # Without `cpu=True` a machine without GPU is taken for a single process, whatever WORLD_SIZE says.
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != launched:
        raise DistributedError(
            f"the launcher started {launched} processes, and accelerate sees {state.num_processes}",
            where="WORLD_SIZE",
            hint="Start them with `accelerate launch --multi_gpu --num_processes N -m hub_magmax ...`, "
            "and ACCELERATE_USE_CPU=1 on a machine without GPU.",
        )
    if torch.distributed.get_backend() == "gloo":
        # Its threads free tensors after the interpreter is gone, and 1 exit in 50 ended with SIGABRT.
        atexit.register(state.destroy_process_group)
    return Processes(state.process_index, state.num_processes, state)
