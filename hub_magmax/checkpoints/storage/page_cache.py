"""Advice to the operating system on which bytes of files are read next (`posix_fadvise`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from threading import Lock

from hub_magmax.checkpoints.index import TensorInfo

#: Bytes per `posix_fadvise` call; many kernels ignore the rest of a larger request.
_ADVICE_BYTES = 2**21

#: Of a file, the byte it begins at, and its length.
_Piece = tuple[str, int, int]


def is_cached(descriptor: int, place: int) -> bool:
    """Say whether a byte is known to be in the page cache, so that advice would cost more than this call."""
    if hasattr(os, "RWF_NOWAIT"):
        with suppress(OSError):
            return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    return False


class PageCacheAdvice:
    """Tensors that are going to be read, brought into the page cache while something else is computed.

    Args:
        lend: Opens a file by its path.
        is_cached: Says whether a byte of a descriptor's file is in the page cache.
    """

    def __init__(
        self,
        lend: Callable[[str], AbstractContextManager[int]],
        is_cached: Callable[[int, int], bool] = is_cached,
    ) -> None:
        self._lend, self._is_cached = lend, is_cached
        self._lock = Lock()
        self._ahead: Iterator[_Piece] = iter(())
        self._free_bytes = self._least_free_bytes = 0
        self._released: Counter[str] = Counter()

    def start(self, infos: list[TensorInfo], budget_bytes: int) -> None:
        """Advise of these tensors, in this order and `budget_bytes` ahead of `release`, and of no others."""
        if not hasattr(os, "posix_fadvise"):
            return
        with self._lock:
            self._ahead = _pieces(infos)
            self._free_bytes = budget_bytes
            # Advice for each chunk takes a tenth of the time of reading it.
            self._least_free_bytes = min(4 * _ADVICE_BYTES, budget_bytes // 2)
            self._released.clear()
        self._advise()

    def release(self, info: TensorInfo, stop: int) -> None:
        """Note that the elements of a tensor before `stop` were read."""
        with self._lock:
            done = stop * info.num_bytes // max(info.num_elements, 1)
            self._free_bytes += max(0, done - self._released[info.name])
            self._released[info.name] = max(done, self._released[info.name])
            is_much = self._free_bytes >= self._least_free_bytes
        if is_much:
            self._advise()

    def _advise(self) -> None:
        """Advise of as much more as the budget allows. A file that cannot be opened fails when it is read."""
        while (piece := self._next_piece()) is not None:
            path, start, length = piece
            with suppress(OSError), self._lend(path) as descriptor:
                if not self._is_cached(descriptor, start + length - 1):
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def _next_piece(self) -> _Piece | None:
        with self._lock:
            piece = next(self._ahead, None) if self._free_bytes > 0 else None
            self._free_bytes -= piece[2] if piece else 0
            return piece


def _pieces(infos: Iterable[TensorInfo]) -> Iterator[_Piece]:
    for info in infos:
        stop = info.start_byte + info.num_bytes
        for start in range(info.start_byte, stop, _ADVICE_BYTES):
            yield info.file, start, min(_ADVICE_BYTES, stop - start)
