"""Arrays with a number for each element, in a file where memory should not hold them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

#: An array of more bytes lies in a file.
IN_MEMORY_BYTES = 2**26


@dataclass(frozen=True)
class Scratch:
    """The place of large arrays: memory, or files.

    Attributes:
        folder: Of their files, which have no names, so that nothing is left of them however a process
            ends; None keeps every array in memory.
        in_memory_bytes: An array of more bytes lies in a file.
    """

    folder: Path | None = None
    in_memory_bytes: int = IN_MEMORY_BYTES

    def zeros(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """Return an array of zeros.

        Raises:
            OSError: If there is no room for its file.
        """
        import numpy as np

        num_bytes = count * np.dtype(dtype).itemsize
        if self.folder is None or num_bytes <= self.in_memory_bytes:
            return np.zeros(count, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # Room is taken now: where there is none, writing to the array would end the process.
            getattr(os, "posix_fallocate", _write_zeros)(file.fileno(), 0, num_bytes)
            return np.asarray(np.memmap(file, dtype, mode="r+", shape=(count,)))


IN_MEMORY = Scratch()


def _write_zeros(descriptor: int, start: int, num_bytes: int) -> None:
    """Do what `posix_fallocate` does, where the system lacks it."""
    block = bytes(2**20)
    for position in range(start, start + num_bytes, len(block)):
        os.pwrite(descriptor, block[: start + num_bytes - position], position)
