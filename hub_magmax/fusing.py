"""One pass from stored bytes to merged bytes, as one compiled loop where that pays.

Measured on one thread, 2^18 elements, five bfloat16 checkpoints (benchmarks/kernels.py): run
operation by operation the pass costs 60 to 140 ns per element, because every operation moves
the chunk through memory; compiled by torch.compile it costs 1.2 to 3 ns. Compiling takes up to
20 s the first time and 3 s from its cache afterwards, so it happens in the background while
the merge goes on operation by operation. Both give the same bits: each operation is rounded
alone, and torch's compiler is told not to contract a product and a sum.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hub_magmax import kernels
from hub_magmax.planning import CHUNK_ELEMENTS

#: Elements per task in memory at a time: small enough for the caches, operation by operation ...
EAGER_CHUNK_ELEMENTS = 2**16
#: ... and large enough that calling a compiled pass (50 µs) costs little.
FUSED_CHUNK_ELEMENTS = CHUNK_ELEMENTS

#: Merges of fewer elements end before a first compilation would.
FUSE_ABOVE_ELEMENTS = 2**27

#: What a pass returns: merged values in the output's dtype, elements per task (float32, exact
#: below 2^24; empty unless tasks are selected), and a sum that is finite only if all task vectors and
#: all merged values are.
Merged = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """What is done with every chunk of a tensor.

    Attributes:
        combine: Takes one row per task (float32, elements) and the rule's inputs; returns the
            merged task vector, or the winners (uint8) if `selects`.
        selects: What `combine` returns.
        dtype: Of the output.
    """

    combine: Callable[..., Tensor]
    selects: bool
    dtype: torch.dtype

    def __call__(
        self,
        base: Tensor,
        checkpoints: Sequence[Tensor],
        per_element: Sequence[Tensor],
        per_task: Sequence[Tensor],
        scaling: Tensor,
        num_valid: Tensor,
    ) -> Merged:
        """Merge one chunk.

        Args:
            base, checkpoints: Values as stored, all of the same length.
            per_element, per_task: What the tensor's rule gives `combine`.
            scaling: Scaling coefficient; float64, no dimensions.
            num_valid: Elements from the start that count; the rest is padding. int64, no dimensions.
        """
        rows = kernels.task_rows(base, checkpoints)
        found = self.combine(rows, *per_element, *per_task)
        counts = torch.empty(0)
        if self.selects:
            valid = torch.arange(len(base)) < num_valid
            # Winners as floats: the compiler vectorises their comparison, which it does not for bytes.
            winners = torch.where(valid, found.float(), -1.0)
            counts = torch.stack([torch.where(winners == t, 1.0, 0.0).sum() for t in range(len(rows))])
            found = kernels.select_rows(rows, winners)
        merged = kernels.apply_update(base, found, scaling, self.dtype)
        probe = torch.stack([row.sum() for row in (*rows, merged.float())]).sum()
        return merged, counts, probe


class Fuser:
    """Compiles passes in the background, each once.

    Args:
        num_elements: Of the whole merge; small ones are not compiled for.
    """

    def __init__(self, num_elements: int) -> None:
        self._wanted = num_elements >= FUSE_ABOVE_ELEMENTS
        self.chunk_elements = FUSED_CHUNK_ELEMENTS if self._wanted else EAGER_CHUNK_ELEMENTS
        self._compiled: dict[Any, Callable[..., Merged] | None] = {}
        self._threads: list[threading.Thread] = []

    def find(self, a_pass: Pass, arguments: tuple[Any, ...]) -> Callable[..., Merged] | None:
        """Return the compiled form of `a_pass` for arguments of these dtypes, or None so far.

        The first call starts the compilation. Where there is no C++ compiler, or compiling
        fails for any other reason, the answer stays None: the merge is slower, not different.
        """
        if not self._wanted:
            return None
        base, checkpoints, *_ = arguments
        key = (a_pass, base.dtype, *(checkpoint.dtype for checkpoint in checkpoints))
        if key not in self._compiled:
            self._compiled[key] = None
            examples = _padded(arguments, FUSED_CHUNK_ELEMENTS)
            thread = threading.Thread(target=self._compile, args=(key, a_pass, examples), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self._compiled[key]

    def _compile(self, key: Any, a_pass: Pass, examples: tuple[Any, ...]) -> None:
        torch.set_num_threads(1)  # a setting of each thread; the compiler reads this one's
        try:
            compiled = torch.compile(a_pass.__call__, dynamic=False)
            with torch.inference_mode():
                compiled(*examples)
        except Exception as error:  # torch raises many kinds, most of them for a missing compiler
            logging.getLogger(__name__).info("merging without compiled passes: %s", error)
        else:
            self._compiled[key] = compiled

    def close(self) -> None:
        """Wait for compilations that are still going on; their results stay in torch's cache."""
        for thread in self._threads:
            thread.join()


def run_pass(fused: Callable[..., Merged] | None, a_pass: Pass, arguments: tuple[Any, ...]) -> Merged:
    """Merge a chunk, compiled if it is; a compiled pass always gets chunks of one size."""
    if fused is None:
        return a_pass(*arguments)
    num_elements = len(arguments[0])
    merged, counts, probe = fused(*_padded(arguments, FUSED_CHUNK_ELEMENTS))
    return merged[:num_elements], counts, probe


def _padded(arguments: tuple[Any, ...], num_elements: int) -> tuple[Any, ...]:
    """Return the arguments of a pass with zeros appended, so that every call has the same shapes."""
    base, checkpoints, per_element, *rest = arguments

    def pad(values: Tensor) -> Tensor:
        if len(values) == num_elements:
            return values
        padded = torch.zeros(num_elements, dtype=values.dtype)
        padded[: len(values)] = values
        return padded

    # Tuples always: a list in place of a tuple would be compiled for anew.
    return pad(base), tuple(map(pad, checkpoints)), tuple(map(pad, per_element)), *rest


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the others read and write, and more would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
