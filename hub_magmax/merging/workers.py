"""Threads of a merge, and the memory that they use again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from hub_magmax.checkpoints.source import RowMemory
from hub_magmax.merging.chunk_memory import ChunkMemory, SharedChunk
from hub_magmax.planning.budget import Budget


class Workers:
    """Threads, and the memory that they use again, of one merge or of several side by side.

    What is read from the Hub comes in order, so there one thread makes all tensors, and a second one reads
    ahead.

    Attributes:
        budget: How much to work with at a time.
        in_order: Some of what is read comes from the Hub.
        num_sites: Merges side by side, which share the memory that large arrays may take.
        makers: Make tensors.
        reader: Reads ahead, if what is read comes in order.
        memory, merged_memory: For what is read, and for what is merged.
        shared: The last chunk of each thread, where several merges read files and memory is not limited.
        progress_lock: Lets one thread at a time tell of progress.
    """

    def __init__(
        self, budget: Budget, *, in_order: bool, num_sites: int = 1, is_limited: bool = False
    ) -> None:
        self.budget, self.in_order, self.num_sites = budget, in_order, num_sites
        self.makers = ThreadPoolExecutor(budget.num_threads)
        self.reader = ThreadPoolExecutor(1) if in_order else None
        self.memory, self.merged_memory = ChunkMemory(), RowMemory()
        is_shared = num_sites > 1 and not in_order and not is_limited
        self.shared = SharedChunk() if is_shared else None
        self.progress_lock = Lock()

    def close(self) -> None:
        """Return once no thread works any more."""
        self.makers.shutdown(cancel_futures=True)
        if self.reader is not None:
            self.reader.shutdown(cancel_futures=True)
