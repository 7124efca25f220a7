"""One pass from stored bytes to merged bytes, as one compiled loop where that pays.

Measured on one thread, 2^18 elements, five bfloat16 checkpoints: run operation by operation the pass
costs 60 to 140 ns per element, because every operation moves the chunk through memory; compiled it costs
1.1 to 5 ns. What an earlier merge compiled is loaded in 20 ms; else a large merge goes on operation by
operation while another process compiles. Both give the same bits: each operation is rounded alone, and
torch's compiler does not contract a product and a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hub_magmax import compiling
from hub_magmax.passes import Merged, Pass
from hub_magmax.planning import CHUNK_ELEMENTS

#: Elements per task in memory at a time, and in every call of a compiled pass.
FUSED_CHUNK_ELEMENTS = CHUNK_ELEMENTS

#: What stays in the caches, operation by operation.
EAGER_PIECE_ELEMENTS = 2**16

#: Chunks of fewer elements are merged operation by operation.
FUSED_LEAST_ELEMENTS = 2**14

#: Merges of fewer elements end before a first compilation would.
FUSE_ABOVE_ELEMENTS = 2**27

Compiled = Callable[..., Sequence[Tensor]]


class Fuser:
    """Finds passes that are compiled, and has those compiled that are not.

    Args:
        num_elements: Of the whole merge; nothing is compiled for small ones.
    """

    def __init__(self, num_elements: int) -> None:
        self._compiles = num_elements >= FUSE_ABOVE_ELEMENTS
        self.chunk_elements = FUSED_CHUNK_ELEMENTS
        self._compiled: dict[Any, Compiled | None] = {}
        self._pending: dict[Any, tuple[int, Path]] = {}

    def find(self, a_pass: Pass, arguments: tuple[Any, ...]) -> Compiled | None:
        """Return the compiled form of `a_pass` for arguments of these dtypes, or None so far.

        The first call may start a compilation. Where there is no C++ compiler, or compiling
        fails for any other reason, the answer stays None: the merge is slower, not different.
        """
        if len(arguments[0]) < FUSED_LEAST_ELEMENTS:
            return None  # padding it to a whole chunk would cost more than it saves
        base, checkpoints, per_element, *_ = arguments
        key = (a_pass, base.dtype, *(values.dtype for values in (*checkpoints, *per_element)))
        if key in self._pending:
            self._collect(key)
        elif key not in self._compiled:
            self._compiled[key] = None
            self._look_up(key, a_pass, arguments)
        return self._compiled[key]

    @property
    def is_compiling(self) -> bool:
        """Whether a compilation that this merge started goes on."""
        return bool(self._pending)

    def _look_up(self, key: Any, a_pass: Pass, arguments: tuple[Any, ...]) -> None:
        facts = {"selects": a_pass.selects, "dtype": str(a_pass.dtype).removeprefix("torch.")}
        examples = _padded(arguments, FUSED_CHUNK_ELEMENTS)
        request = compiling.request_for(a_pass.combine, facts, examples)
        if request is None:
            return
        path = compiling.package_path(request)
        self._compiled[key] = compiling.load(path)
        if self._compiled[key] is None and self._compiles:
            self._pending[key] = compiling.start(request, path), path

    def _collect(self, key: Any) -> None:
        process, path = self._pending[key]
        if compiling.has_ended(process):
            del self._pending[key]
            self._compiled[key] = compiling.load(path)


def run_pass(fused: Compiled | None, a_pass: Pass, arguments: tuple[Any, ...]) -> Merged:
    """Merge a chunk, compiled if it is; a compiled pass always gets chunks of one size."""
    num_elements = len(arguments[0])
    if fused is None:
        return _piecewise(a_pass, arguments)
    merged, counts, probe = fused(*_padded(arguments, FUSED_CHUNK_ELEMENTS))
    return merged[:num_elements], counts, probe


def _piecewise(a_pass: Pass, arguments: tuple[Any, ...]) -> Merged:
    """Merge a chunk operation by operation, in pieces that stay in the processor's caches."""
    base, checkpoints, per_element, per_task, scaling, num_valid = arguments
    parts = []
    for start in range(0, max(1, len(base)), EAGER_PIECE_ELEMENTS):
        piece = slice(start, start + EAGER_PIECE_ELEMENTS)
        parts.append(
            a_pass(
                base[piece],
                [checkpoint[piece] for checkpoint in checkpoints],
                [values[piece] for values in per_element],
                per_task,
                scaling,
                num_valid - start,
            )
        )
    if len(parts) == 1:
        return parts[0]
    merged, counts, probes = zip(*parts, strict=True)
    return torch.cat(merged), torch.stack(counts).sum(dim=0), torch.stack(probes).sum()


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
