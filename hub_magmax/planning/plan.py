"""Turn a recipe, its lock and the checkpoints' headers into a flat list of tensor jobs.

No tensor is read here. What the plan says is all that a merge needs: an output tensor depends
on the tensors of the same name, the locked method and preference, and the seed.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hub_magmax import methods
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.checkpoints.side_files import tokenizer_notices
from hub_magmax.errors import RecipeError
from hub_magmax.files import digest
from hub_magmax.kernels.arrays import IN_MEMORY_BYTES
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Recipe
from hub_magmax.text import format_bytes

#: Elements of one tensor that are in memory at a time, per task. Half as many take an eighth longer with two
#: threads, because each call into the system gives the interpreter away; twice as many leave the caches.
CHUNK_ELEMENTS = 2**19

#: Bytes that a merge may hold ahead of what is being read from the Hub.
READ_AHEAD_BYTES = 256 * 2**20

#: Of elements that are not decided when they are first seen, so many chunks' are held of a tensor at most.
OPEN_CHUNKS = 8

#: A tensor of up to so many chunks is not written before all of its elements are merged. To write it, read it
#: and write it again takes a twenty-fifth of a merge, measured.
HELD_CHUNKS = 32

#: Measured: the process with torch imported and no tensors (docs/design.md).
RUNTIME_BYTES = 350_000_000

#: A merge that must not take much works on pieces no smaller than these.
_LEAST_CHUNK_ELEMENTS, _LEAST_READ_AHEAD_BYTES = 2**14, 2**25


@dataclass(frozen=True)
class TensorJob:
    """One output tensor.

    Attributes:
        name, shape: Of the output and of all its inputs.
        dtype: Of the output, in safetensors' names.
        source: "merge", or the name of the source that is copied.
        reason: Why it is copied; empty for a merged tensor.
        unread: Tasks that do not count for a merged tensor, such as those of weight zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_elements: int
    source: str
    reason: str = ""
    unread: tuple[str, ...] = ()

    @property
    def merged(self) -> bool:
        return self.source == "merge"

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    def inputs(self, source: str) -> tuple[str, ...]:
        """Return the names of the tensors that are read of a source to make this one."""
        is_read = self.merged or source == self.source or self.reason == EXACT_REASON
        is_read = is_read and source not in self.unread
        return (self.name,) if is_read else ()


@dataclass(frozen=True)
class Part:
    """A factor of a task's LoRA adapter, and what it is multiplied by."""

    source: str
    tensor: str
    coefficient: float


@dataclass(frozen=True)
class FactorJob(TensorJob):
    """One factor of one layer of a merged adapter: the adapters' own factors beside each other.

    Attributes:
        module: What the adapters call the layer.
        axis: Along which the parts lie beside each other: 0 for A, 1 for B.
        parts: In the order of the tasks.
    """

    module: str = ""
    axis: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def rank(self) -> int:
        return self.shape[self.axis]

    def inputs(self, source: str) -> tuple[str, ...]:
        return tuple(part.tensor for part in self.parts if part.source == source)


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors it holds, in order."""

    file: str
    jobs: tuple[TensorJob, ...]

    @property
    def data_bytes(self) -> int:
        return sum(job.num_bytes for job in self.jobs)


@dataclass(frozen=True)
class Budget:
    """What a process of a merge works with at a time.

    Attributes:
        num_threads: Each merges one tensor after the other.
        chunk_elements: Elements per task that each thread has in memory.
        read_ahead_bytes: Bytes held of what is read from the Hub.
    """

    num_threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    read_ahead_bytes: int = READ_AHEAD_BYTES


@dataclass(frozen=True)
class Plan:
    """All there is to do, from headers alone.

    Attributes:
        recipe, lock: What the plan carries out.
        shards: Output files in order.
        left_out: Names of the base model's tensors that a rule leaves out.
        bytes_in: Bytes of tensors that are read, once each.
    """

    recipe: Recipe
    lock: Lock
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    bytes_in: int

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer of a merged adapter, by what the adapters call it; else empty."""
        return {job.module: job.rank for job in self.jobs if isinstance(job, FactorJob)}

    @property
    def unread(self) -> tuple[str, ...]:
        """The tasks that do not count for any merged tensor."""
        return next((job.unread for job in self.jobs if job.unread), ())

    @property
    def looked_at_bytes(self) -> int:
        """Bytes of the output whose tensors are looked at before the first is merged; mostly none."""
        if not methods.surveys_model(self.lock.method):
            return 0
        return sum(job.num_bytes for job in self.jobs if job.merged)

    @property
    def progress_bytes(self) -> int:
        """What a merge tells its progress of, in all."""
        return self.bytes_out + self.looked_at_bytes

    @property
    def bytes_out(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the output: the lock, the layout, and whose files lie beside the weights."""
        shards = [asdict(shard) for shard in self.shards]
        files_from = self.recipe.output.files_from
        return digest({"lock": self.lock.digest, "shards": shards, "files_from": files_from})

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know and no rule forbids: tokenizers and heads that differ."""
        sources = self.lock.sources
        classes = {name: ", ".join(source.architectures) for name, source in sources.items()}
        known = {name: text for name, text in classes.items() if text}
        heads = ", ".join(f"{name} {text}" for name, text in known.items())
        side_files = {name: source.side_files for name, source in sources.items()}
        name = self.lock.method["name"]
        portable = methods.get_method(name).is_portable
        return (
            *(() if portable else (f"the bytes that {name} gives depend on the processor",)),
            *((f"the model classes differ: {heads}",) if len(set(known.values())) > 1 else ()),
            *tokenizer_notices(side_files, self.recipe.output.files_from),
        )

    @property
    def peak_memory_bytes(self) -> int:
        """Return about how much memory one process needs that works with one thread."""
        return self.memory_bytes(self.budget(1))

    def memory_bytes(self, budget: Budget) -> int:
        """Return about how much memory one process needs that works with this much at a time."""
        sizes = sorted((job.num_elements for job in self.jobs if job.merged), reverse=True)[
            : budget.num_threads
        ]
        if self.ranks:  # a factor's parts, these together, and in the output's dtype
            return RUNTIME_BYTES + 12 * sum(sizes) + self._held_from_hub_bytes("linear", budget)
        num_tasks = len(self.lock.tasks)
        method = methods.get_method(self.lock.method["name"])
        # A chunk: stored inputs, task vectors in float32, the merged vector and temporaries.
        per_chunk_element = 4 * (num_tasks + 1) + 4 * num_tasks + 24
        chunks = per_chunk_element * sum(min(size, budget.chunk_elements) for size in sizes)
        if methods.surveys_model(self.lock.method):
            sizes = [sum(job.num_elements for job in self.jobs if job.merged)]
        elif method.held_bytes is None:  # what is stored of open elements, their places, and merged chunks
            most_open, most_held = OPEN_CHUNKS * budget.chunk_elements, HELD_CHUNKS * budget.chunk_elements
            chunks += (4 * (num_tasks + 1) + 8) * sum(min(size, most_open) for size in sizes)
            chunks += 4 * sum(size for size in sizes if size <= most_held)
        held = sum(_held_bytes(method, num_tasks, size) for size in sizes)
        return RUNTIME_BYTES + chunks + held + self._held_from_hub_bytes(method.form, budget)

    def budget(self, num_threads: int) -> Budget:
        """Return how much to work with at a time so that `output.memory` is kept, as near as can be told.

        Chunks become smaller first, then threads fewer, then less is read ahead.

        Args:
            num_threads: Threads that could work.

        Raises:
            RecipeError: If the least that a merge can do with is more than that.
        """
        limit = self.recipe.output.memory
        if limit is None:
            return Budget(num_threads)
        choices = [
            Budget(threads, chunk, ahead)
            for ahead in _halved(READ_AHEAD_BYTES, _LEAST_READ_AHEAD_BYTES)
            for threads in range(num_threads, 0, -1)
            for chunk in _halved(CHUNK_ELEMENTS, _LEAST_CHUNK_ELEMENTS)
        ]
        fitting = next((choice for choice in choices if self.memory_bytes(choice) <= limit), None)
        if fitting is None:
            needed = format_bytes(self.memory_bytes(choices[-1]))
            raise RecipeError(
                f"this merge needs about {needed} of memory in each process",
                where="recipe, output.memory",
                expected=f"at least that; found {format_bytes(limit)}",
                hint="Raise it, or choose a method that keeps nothing of tensors: average, magmax.",
            )
        return fitting

    @cached_property
    def num_remote(self) -> int:
        """Number of sources that are read over a network."""
        folder = self.recipe.folder
        return sum(location_of(source, folder).is_remote for source in self.lock.sources.values())

    def _held_from_hub_bytes(self, form: str, budget: Budget) -> int:
        """Return what is held of sources on the Hub: ahead, and of a tensor that is read more than once."""
        largest = max((job.num_bytes for job in self.jobs if job.merged), default=0)
        repeated = 0 if form in ("elementwise", "linear") else self.num_remote * largest
        return min(budget.read_ahead_bytes, self.bytes_in) + repeated if self.num_remote else 0

    def tensors_read(self, jobs: Sequence[TensorJob]) -> dict[str, tuple[str, ...]]:
        """Return which tensors making `jobs` one after the other reads from each source, in order."""
        return {
            source: tuple(name for job in jobs for name in job.inputs(source)) for source in self.lock.sources
        }

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Provenance stored in every shard: strings, and the same for the same merge on any machine."""
        sources = {name: source.label for name, source in self.lock.sources.items()}
        merge = {
            "sources": sources,
            "method": dict(self.lock.method),
            "preference": dict(self.lock.preference.weights),
            "seed": self.lock.seed,
            "lock": self.lock.digest,
        }
        return {"format": "pt", "hub_magmax": json.dumps(merge, ensure_ascii=False)}

    def header(self, shard: Shard) -> bytes:
        """Return the safetensors header of an output file, known before any tensor is.

        It is padded so that the data begin at a multiple of 64 bytes, as memory does: between places that
        differ by a few bytes some processors copy at a fifth of the speed, see `source.RowMemory`.
        """
        entries: dict[str, Any] = {"__metadata__": self.metadata}
        position = 0
        for job in shard.jobs:
            offsets = [position, position + job.num_bytes]
            entries[job.name] = {"dtype": job.dtype, "shape": list(job.shape), "data_offsets": offsets}
            position += job.num_bytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return struct.pack("<Q", len(text)) + text

    def to_dict(self) -> dict[str, Any]:
        """Return the summary that `plan --json` prints."""
        merged = [job for job in self.jobs if job.merged]
        copied = [job for job in self.jobs if not job.merged]
        return {
            "digest": self.digest,
            "method": dict(self.lock.method),
            "preference": dict(self.lock.preference.weights),
            "tensors_merged": len(merged),
            "tensors_copied": len(copied),
            "tensors_left_out": list(self.left_out),
            "tasks_not_read": list(self.unread),
            "ranks": self.ranks,
            "elements_merged": sum(job.num_elements for job in merged),
            "copied": [{"tensor": j.name, "from": j.source, "reason": j.reason} for j in copied],
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "shards": [
                {"file": s.file, "tensors": len(s.jobs), "data_bytes": s.data_bytes} for s in self.shards
            ],
            "peak_memory_bytes": self.peak_memory_bytes,
            "notices": list(self.notices),
        }

    def explain(self) -> str:
        """Return the plan in words, for a person to read before it is carried out."""
        facts = self.to_dict()
        method = self.lock.method
        options = ", ".join(f"{k} {v}" for k, v in method.items() if k not in ("name", "scaling"))
        preference = ", ".join(
            f"{name} {weight:.4g}" for name, weight in self.lock.preference.weights.items()
        )
        lines = [
            f"base model   {self.lock.base_model.label}",
            *(
                f"task {i:<7} {name}: {task.label}"
                for i, (name, task) in enumerate(self.lock.tasks.items(), 1)
            ),
            f"method       {method['name']}, scaling {method['scaling']:g}"
            + (f", {options}" if options else ""),
            f"preference   {preference} ({self.lock.preference.kind})",
            f"merged       {facts['tensors_merged']:,} tensors, {facts['elements_merged']:,} elements",
            f"copied       {facts['tensors_copied']:,} tensors",
        ]
        reasons = Counter((job.reason, job.source) for job in self.jobs if not job.merged)
        lines += [f"             {count:,} from {source}: {why}" for (why, source), count in reasons.items()]
        lines += [f"left out     {', '.join(self.left_out)}"] if self.left_out else []
        if ranks := self.ranks.values():
            least, most = min(ranks), max(ranks)
            rank = f"rank {most}" if least == most else f"ranks from {least} to {most}"
            lines.append(f"adapter      {len(ranks):,} layers, {rank}")
        if not methods.get_method(method["name"]).uses_preference:
            lines.append(f"note         {method['name']} ignores the preference")
        if self.unread:
            lines.append(f"not read     {', '.join(self.unread)}: no part of the result")
        lines += [f"note         {notice}" for notice in self.notices]
        return "\n".join(
            [
                *lines,
                f"reads        {format_bytes(self.bytes_in)}",
                f"writes       {format_bytes(self.bytes_out)} in {len(self.shards)} file(s)",
                f"memory       about {format_bytes(self.peak_memory_bytes)} per process",
            ]
        )


def _held_bytes(method: methods.MergeMethod, num_tasks: int, size: int) -> int:
    """Return what is held of one tensor of so many elements, in memory and not in a file."""
    if method.form == "tensor":
        return (4 * num_tasks + 8 + (method.held_bytes or 0)) * size
    if not method.held_bytes:
        return 0
    within = min(size, IN_MEMORY_BYTES)
    # Measured with `top-n`: what is not decided at once, of a tensor of a billion elements.
    return method.held_bytes * within + (size - within) * 3 // 4


def _halved(most: int, least: int) -> Iterator[int]:
    """Yield a number and its halves, down to the least."""
    while most >= least:
        yield most
        most //= 2


#: Why counts, positions and masks are copied.
EXACT_REASON = "not floating point, and must agree"
