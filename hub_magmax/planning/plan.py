"""A plan: output files, the tensors in each, and the tensors that each is made of.

An output tensor depends on the tensors of the same name (or, where it is tied to another one, of that one's),
the locked method and preference, and the seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hub_magmax import methods
from hub_magmax.checkpoints.locations import location_of
from hub_magmax.files import digest
from hub_magmax.kernels.dtypes import ITEM_BYTES
from hub_magmax.planning.findings.finding import Finding
from hub_magmax.planning.tokenizers.files import TokenizerFiles
from hub_magmax.planning.tokens import TokenChange
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.merge_values import MergeValues, RuleValues
from hub_magmax.recipe.schema import Recipe
from hub_magmax.recipe.tokenizer import UNION
from hub_magmax.text import Brief, format_bytes, number_of

#: Why counts, positions and masks are copied.
EXACT_REASON = "not floating point, and must agree"

#: Room for headers, and for what a merge itself writes beside the weights.
SMALL_BYTES = 20_000_000

#: Source of running statistics.
MEAN = "mean of the tasks"


@dataclass(frozen=True)
class TensorJob:
    """One output tensor.

    Attributes:
        name, shape: Of the output and of all its inputs.
        dtype: Of the output, in safetensors' names.
        source: "merge", `MEAN`, or the name of the source that is copied.
        reason: Why it is not merged; empty for a merged tensor.
        unread: Sources that do not count, such as tasks of weight zero, or those that lack the tensor.
        factor: What a copy is multiplied by.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_elements: int
    source: str
    reason: str = ""
    unread: tuple[str, ...] = ()
    factor: float = 1.0

    @property
    def merged(self) -> bool:
        return self.source == "merge"

    @property
    def uses_values(self) -> bool:
        """Whether the numbers of the merge count for it."""
        return self.source in ("merge", MEAN)

    @property
    def tensor(self) -> str:
        """Name of the tensor that is read of the sources, and whose rule and draws count."""
        return self.name

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    def inputs(self, source: str) -> tuple[str, ...]:
        """Return the names of the tensors that are read of a source to make this one."""
        is_read = self.source in ("merge", MEAN, source) or self.reason == EXACT_REASON
        is_read = is_read and source not in self.unread
        return (self.tensor,) if is_read else ()


@dataclass(frozen=True)
class TiedJob(TensorJob):
    """A tensor that is one parameter with another one of the output: the same values under its own name.

    Attributes:
        of: Name of the other one.
    """

    of: str = ""

    @property
    def tensor(self) -> str:
        return self.of


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
        module: Name of the layer in the adapters.
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
class SolvedJob(FactorJob):
    """One of two factors that are solved for: a layer's by a method of whole matrices, or of a bound rank.

    `parts` are those of all adapters, each multiplied by its own scale; where they are summed, by the
    coefficient of its task too.

    Attributes:
        of: The base model's tensor that the layer lies in.
        sides: Rows and columns of what is merged, as the base model stores it.
        is_transposed: Whether that is the transpose of the product.
        is_sum: Whether the layer's products are summed; else the method merges them.
        total_rank: The sum of the products' ranks, or that of a whole matrix.
        of_shape: Of the tensor, where its merged task vector is formed whole, and there are no parts.
    """

    of: str = ""
    sides: tuple[int, int] = (0, 0)
    is_transposed: bool = False
    is_sum: bool = False
    total_rank: int = 0
    of_shape: tuple[int, ...] = ()

    @property
    def whole(self) -> TensorJob:
        """The tensor whose merged task vector the layer has."""
        num_elements = self.sides[0] * self.sides[1]
        return TensorJob(self.of, self.of_shape, "F32", num_elements, "merge", unread=self.unread)

    def inputs(self, source: str) -> tuple[str, ...]:
        return self.whole.inputs(source) if self.of_shape else super().inputs(source)

    @property
    def most_rank(self) -> int:
        """The rank that holds all that is merged."""
        return min(self.total_rank, *self.sides)


@dataclass(frozen=True)
class ConfigChange:
    """A value of the output's config.json that is not that of the file it is a copy of.

    Attributes:
        path: The keys that lead to it.
        old: None where the key is absent.
        new: That of the output's weights.
    """

    path: tuple[str, ...]
    old: Any
    new: Any


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors it holds, in order."""

    file: str
    jobs: tuple[TensorJob, ...]

    @property
    def data_bytes(self) -> int:
        return sum(job.num_bytes for job in self.jobs)


def _values(job: TensorJob) -> dict[str, Any]:
    """Return what `asdict` does, which takes a second for ten thousands of jobs; no factor of 1.

    The digests of earlier plans stay the same.
    """
    values = asdict(job) if isinstance(job, FactorJob) else dict(vars(job))
    if job.factor == 1:
        del values["factor"]
    return values


@dataclass(frozen=True, repr=False)
class Plan(Brief):
    """All jobs of a merge, from headers alone.

    Attributes:
        recipe, lock: Inputs of the merge.
        shards: Output files in order.
        left_out: Names of the base model's tensors that a rule leaves out.
        bytes_in: Bytes that are read of files or fetched: of a stored tensor once for each output tensor made
            of it, and once more where a method looks at the whole model first, which may take several looks.
        findings: Odd things about the sources, which do not decide the output.
        unseen: Tasks whose values were not looked at for findings, because that would cost requests.
        in_spite_of: Names of faults that are accepted.
        left_behind: Files, and folders with a slash at their end, of the source whose files are copied, that
            are not; for a notice.
        copied_bytes: Of the files that are copied from it.
        config: Values of the config.json that is among them.
        metadata: Of the output's headers, beside the merge's own.
        lost_metadata: Keys of the same source's headers that are left out.
        stored_item_bytes: Of an element of a merged tensor as it is stored, the widest of all.
        needs_torch: Something besides the method takes torch: adapters, casts, means, rows put in order.
        dtypes: By source the dtypes that it is stored in, the most frequent one first.
        tokens: What differs in the tokens of tasks.
        config_changes: What config.json says of the output's weights, and not of those it was written for.
        tokenizer: Its files that are not copied as they are.
        by_statistics: Names of the tensors that are merged by statistics of the tasks' data.
        unchanged: Names of the merged tensors that no task changes, as far as headers tell: of adapters.
        own_values: What rules say of the merge of a tensor, by the name of what is read for it.
        selection: Folder of a selection, which says from which task each element is in place of the method,
            and its name in messages.
    """

    recipe: Recipe
    lock: Lock
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    bytes_in: int
    findings: tuple[Finding, ...] = ()
    unseen: tuple[str, ...] = ()
    in_spite_of: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    copied_bytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    lost_metadata: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    tokens: tuple[TokenChange, ...] = ()
    config_changes: tuple[ConfigChange, ...] = ()
    tokenizer: TokenizerFiles = field(default_factory=TokenizerFiles, hash=False)
    stored_item_bytes: int = 4
    needs_torch: bool = True
    by_statistics: tuple[str, ...] = ()
    unchanged: frozenset[str] = frozenset()
    own_values: Mapping[str, RuleValues] = field(default_factory=dict, hash=False)
    selection: tuple[Path, str] | None = None

    def values_of(self, tensor: str, values: MergeValues | None = None) -> MergeValues:
        """Return the numbers by which a tensor is merged.

        Args:
            tensor: Name of what is read for it, `TensorJob.tensor`.
            values: In place of the lock's, of the tensors about which no rule says more.
        """
        if values is None:
            return self._own.get(tensor, self.lock.values)
        own = self.own_values.get(tensor)
        return values if own is None else own.over(values)

    @cached_property
    def _own(self) -> dict[str, MergeValues]:
        made = {own: own.over(self.lock.values) for own in dict.fromkeys(self.own_values.values())}
        return {tensor: made[own] for tensor, own in self.own_values.items()}

    @cached_property
    def surveyed(self) -> tuple[MergeValues, ...]:
        """Values of merged tensors that differ in more than the scaling coefficient; at least one."""
        found = [self.values_of(job.tensor) for job in self.merged] if self._own else []
        return tuple({values.surveyed: values for values in found or [self.lock.values]}.values())

    @property
    def tokenizer_source(self) -> str:
        """The source whose tokenizer the output gets, with more tokens or without."""
        found = self.lock.tokenizer
        named = None if found is None or found.source == UNION else found.source
        return named or self.recipe.output.files_from

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        return tuple(job for shard in self.shards for job in shard.jobs)

    @property
    def whole_jobs(self) -> tuple[TensorJob, ...]:
        """The jobs; in place of two factors that are made of a whole tensor that tensor."""
        of = (job.whole if isinstance(job, SolvedJob) and job.of_shape else job for job in self.jobs)
        return tuple(dict.fromkeys(of))

    @property
    def merged(self) -> tuple[TensorJob, ...]:
        """The merged tensors, each parameter once."""
        return tuple(job for job in self.jobs if job.merged and not isinstance(job, TiedJob))

    @property
    def merged_elements(self) -> int:
        """Elements of the output that are merged, of tied tensors each time."""
        return sum(job.num_elements for job in self.jobs if job.merged)

    @property
    def parameters(self) -> dict[str, int]:
        """Elements of the output by dtype, of tied tensors once."""
        found: Counter[str] = Counter()
        for job in self.jobs:
            found[job.dtype] += 0 if isinstance(job, TiedJob) else job.num_elements
        return dict(found)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer of a merged adapter, by what the adapters call it; else empty."""
        return {job.module: job.rank for job in self.jobs if isinstance(job, FactorJob)}

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """The tasks that do not count for any merged tensor."""
        found = {job.unread for job in self.jobs if job.merged}
        return tuple(task for task in self.lock.tasks if found and all(task in unread for unread in found))

    @property
    def looked_at_bytes(self) -> int:
        """Bytes of the output whose tensors are looked at before the first is merged; mostly none."""
        num_surveys = sum(methods.surveys_model(values.method) for values in self.surveyed)
        return num_surveys * sum(job.num_bytes for job in self.merged) if num_surveys else 0

    @property
    def brief(self) -> str:
        done = f"{format_bytes(self.bytes_in)} read, {format_bytes(self.bytes_out)} written"
        size = f"{number_of(len(self.jobs), 'tensor')} in {number_of(len(self.shards), 'file')}"
        return f"{size}, {done}; hub_magmax.explain tells all"

    @property
    def progress_bytes(self) -> int:
        """Bytes that a merge reports to its progress, in all."""
        return self.bytes_out + self.looked_at_bytes

    @property
    def bytes_out(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Digest of what decides the output: the lock, the layout, and whose files lie beside the weights."""
        shards = [{"file": shard.file, "jobs": [_values(job) for job in shard.jobs]} for shard in self.shards]
        files_from = self.recipe.output.files_from
        values: dict[str, Any] = {"lock": self.lock.digest, "shards": shards, "files_from": files_from}
        values |= {"metadata": dict(self.metadata)} if self.metadata else {}
        numbers = {own: number for number, own in enumerate(dict.fromkeys(self.own_values.values()))}
        by_tensor = {name: numbers[own] for name, own in self.own_values.items()}
        return digest(values | ({"own_values": [[*map(asdict, numbers)], by_tensor]} if numbers else {}))

    @property
    def index_name(self) -> str:
        """Name of the index of several files."""
        return re.sub(r"(-\d+-of-\d+)?\.safetensors$", ".safetensors.index.json", self.shards[0].file)

    @cached_property
    def num_remote(self) -> int:
        """Number of sources that are read over a network."""
        folder = self.recipe.folder
        return sum(location_of(source, folder).is_remote for source in self.lock.every_source.values())

    def tensors_read(self, jobs: Sequence[TensorJob]) -> dict[str, tuple[str, ...]]:
        """Return which tensors making `jobs` one after the other reads from each source, in order."""
        return {
            source: tuple(dict.fromkeys(name for job in jobs for name in job.inputs(source)))
            for source in self.lock.sources
        }
