"""Merges of `benchmarks.golden`: methods, sources, outputs and backends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.golden_checkpoints import SOURCES, WITH_STATISTICS


@dataclass(frozen=True)
class Case:
    """One merge.

    Attributes:
        title: The method with its selection and scope, as keys name it.
        method: What the recipe says.
        source: One of `SOURCES`.
        output: What the recipe says besides the path; by the key's name for it.
        backend: "eager" or "compiled"; "memory": without files; "tensors": by `merge_tensors`, one by one.
    """

    title: str
    method: Mapping[str, Any] = field(hash=False)
    source: str
    output: str
    backend: str

    @property
    def key(self) -> str:
        output = f" output={self.output}" if self.output else ""
        return f"{self.title} source={self.source}{output} backend={self.backend}"

    @property
    def is_of_one_machine(self) -> bool:
        is_solved = self.title in (*OF_MATRICES, "regmean", "regmean_plusplus")
        return self.source == ROUNDED or is_solved or "rank" in OUTPUTS[self.output]

    @property
    def group(self) -> str:
        """Key that is equal for cases that must give the same weights."""
        same = ("hub",) if self.title in ORDERED else ("hub", "sharded")
        source = "folder" if self.source in same else self.source
        output = "" if self.output == "sharded" else self.output
        return f"{self.title} source={source} output={output}"


METHODS: Mapping[str, Mapping[str, Any]] = {
    "agreement": {"name": "agreement"},
    "average": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "slerp": {"name": "slerp", "t": 0.75, "linear_above": 1.0},
    "model_stock": {"name": "model_stock"},
    "ties scope=tensor": {"name": "ties"},
    "ties scope=model": {"name": "ties", "scope": "model"},
    "dare": {"name": "dare"},
    "dare_ties": {"name": "dare_ties", "density": 0.4},
    "breadcrumbs scope=tensor": {"name": "breadcrumbs", "density": 0.4, "outliers": 0.05},
    "breadcrumbs scope=model": {"name": "breadcrumbs", "density": 0.4, "outliers": 0.05, "scope": "model"},
    "della": {"name": "della", "density": 0.6, "epsilon": 0.2},
    "sce": {"name": "sce", "density": 0.6},
    "sce floor": {"name": "sce", "density": 0.6, "floor": 1.0},
    "pcb": {"name": "pcb", "density": 0.3},
    "random_mix": {"name": "random_mix"},
    "single_task": {"name": "single_task"},
    "last_task": {"name": "last_task"},
    "magmax": {"name": "magmax"},
    "tunable_magmax/algorithm-1 scope=tensor": {"name": "tunable_magmax", "selection": "algorithm-1"},
    "tunable_magmax/algorithm-1 scope=model": {
        "name": "tunable_magmax",
        "selection": "algorithm-1",
        "scope": "model",
    },
    "tunable_magmax/top-n scope=tensor": {"name": "tunable_magmax", "selection": "top-n"},
    "tunable_magmax/top-n scope=model": {"name": "tunable_magmax", "selection": "top-n", "scope": "model"},
}
OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "sharded": {"shard_size": "20KB"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "adapter": {"format": "adapter"},
    "adapter rank=2": {"format": "adapter", "rank": 2},
}
#: Methods whose result can be an adapter.
LINEAR = ("average", "task_arithmetic")
#: Methods of whole matrices, whose last bits depend on the processor; the engine treats their tensors alike.
OF_MATRICES: Mapping[str, Mapping[str, Any]] = {
    name: {"name": name} for name in ("tsv", "iso_c", "iso_cts", "cart", "wudi", "actmat", "opcm")
}
#: Methods that need statistics of the tasks' data.
OF_DATA: Mapping[str, Mapping[str, Any]] = {
    "fisher": {"name": "fisher"},
    "regmean": {"name": "regmean"},
    "regmean_plusplus": {"name": "regmean_plusplus"},
}
#: Other methods whose tensors the engine treats as those of `slerp`, `average` or `ties`.
ALIKE: Mapping[str, Mapping[str, Any]] = {
    "weighted_sum": {"name": "weighted_sum", "total": 1.25},
    "nuslerp": {"name": "nuslerp"},
    "nuslerp each=row": {"name": "nuslerp", "of": "models", "each": "row"},
    "multislerp": {"name": "multislerp"},
    "karcher": {"name": "karcher"},
    "model_stock each=column": {"name": "model_stock", "each": "column"},
    "arcee_fusion": {"name": "arcee_fusion"},
    "breadcrumbs_ties scope=tensor": {"name": "breadcrumbs_ties", "density": 0.4, "outliers": 0.05},
    "della_linear": {"name": "della_linear", "density": 0.6, "rescale": "norm"},
    "localize_stitch scope=tensor": {"name": "localize_stitch"},
    "pcb scope=model": {"name": "pcb", "density": 0.3, "scope": "model"},
    "ram": {"name": "ram", "epsilon": 0.01},
    "ram_plus scope=tensor": {"name": "ram_plus", "epsilon": 0.01},
    "nearswap": {"name": "nearswap", "limit": 0.01},
}
#: Sources whose task vectors are scaled before any method sees them, and the methods that merge these.
SCALED = ("norms", "norms_by_tensor")
OF_SCALED = ("task_arithmetic", "ties scope=tensor", "ties scope=model")
#: Methods of two models; other tasks of a source have no weight.
OF_TWO = ("slerp", "nuslerp")
#: Methods that number the elements of all tensors, in the order of the input's files, and draw by number.
ORDERED = ("tunable_magmax/algorithm-1 scope=model", "tunable_magmax/top-n scope=model")
#: Elements in memory at a time, so that tensors of the source `large` have several chunks.
CHUNK_ELEMENTS = 2**16
#: Matrix products are rounded here, and processors may add in different orders (docs/adapters.md).
ROUNDED = "adapter_rounded"


def cases() -> Iterator[Case]:
    """Yield every case."""
    for title, method in METHODS.items():
        sources = [source for source in SOURCES if source not in SCALED or title in OF_SCALED]
        yield from _cases_of(title, method, sources)
    for title, method in ALIKE.items():
        yield from _cases_of(title, method, ["folder"])
    for title, method in OF_MATRICES.items():
        yield from _cases_of(title, method, ["folder", "adapter"])
    for title, method in OF_DATA.items():
        yield from _cases_of(title, method, [WITH_STATISTICS])


def _cases_of(title: str, method: Mapping[str, Any], sources: Sequence[str]) -> Iterator[Case]:
    for source in sources:
        outputs = ["", "sharded", "bfloat16", "float64"] if source == "folder" else [""]
        if source == "adapter" and title in (*LINEAR, *OF_MATRICES):
            outputs += ["adapter", "adapter rank=2"]
        for output in outputs:
            yield Case(title, method, source, output, "eager")
            yield Case(title, method, source, output, "compiled")
        if source != "sharded":
            yield Case(title, method, source, "", "memory")
    if method.get("scope") != "model" and "folder" in sources:
        yield Case(title, method, "folder", "", "tensors")
