"""Factors and configuration of a merged adapter: factors beside each other, or solved for layer by layer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hub_magmax.checkpoints.adapters.config import config_of
from hub_magmax.checkpoints.source import TensorSource, tensor_place
from hub_magmax.errors import NonFiniteError
from hub_magmax.files import json_text
from hub_magmax.kernels.dtypes import torch_dtype
from hub_magmax.kernels.lazy_imports import torch
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.merging.output.report import LostPart
from hub_magmax.methods.factors import Factors, in_coordinates
from hub_magmax.methods.matrices import merged_in
from hub_magmax.methods.spectra import low_rank, low_rank_in
from hub_magmax.planning.plan import FactorJob, Part, Plan, SolvedJob, TensorJob

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.kernels.backend import Backend
    from hub_magmax.methods.factors import Coordinates


#: PEFT's names of the tasks of models.
_TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def factor_values(job: FactorJob, sources: Mapping[str, TensorSource]) -> Tensor:
    """Return a factor of the merged adapter, flat, in the output's dtype; computed in float32.

    Args:
        job: Of the factor.
        sources: The adapters as they are stored, by name.

    Raises:
        NonFiniteError: If a factor holds a NaN or an infinity, or the dtype cannot hold the result.
    """
    pieces = [_read(part, sources) * part.coefficient for part in job.parts]
    return _stored(torch.cat(pieces, job.axis), job)


def _read(part: Part, sources: Mapping[str, TensorSource]) -> Tensor:
    """Return a factor as it is stored, in float32."""
    source = sources[part.source]
    info = source.index.tensors[part.tensor]
    flat = source.read(part.tensor, 0, info.num_elements).to(torch.float32)
    source.release(part.tensor, info.num_elements)
    if (bad := torch.nonzero(~torch.isfinite(flat))).numel():
        raise NonFiniteError(
            f"element {int(bad[0]):,} is {float(flat[bad[0]])}",
            where=tensor_place(source, info, int(bad[0])),
            expected="finite numbers only",
            hint="The adapter is damaged or its training diverged; use an earlier one.",
        )
    return flat.reshape(info.shape)


def _stored(factor: Tensor, job: FactorJob) -> Tensor:
    """Return a factor, flat, in the output's dtype."""
    stored = factor.to(torch_dtype(job.dtype)).reshape(-1)
    if not torch.isfinite(stored).all():
        raise NonFiniteError(
            "a merged element is infinite, from finite factors",
            where=f"tensor {job.name!r}",
            expected=f"numbers that {str(stored.dtype).removeprefix('torch.')} can hold",
            hint="Lower method.scaling, or choose a wider output.dtype.",
        )
    return stored


@dataclass(frozen=True)
class SolvedLayer:
    """The two factors of a layer, A first, which are solved for together."""

    jobs: tuple[SolvedJob, SolvedJob]

    @property
    def num_elements(self) -> int:
        return sum(job.num_elements for job in self.jobs)

    @property
    def is_whole(self) -> bool:
        """Whether the merged task vector is formed whole."""
        return bool(self.jobs[0].of_shape)

    def solve(
        self, plan: Plan, sources: Mapping[str, TensorSource], backend: Backend, vector: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], LostPart]:
        """Return A and B, flat, in the output's dtype, and what they lack; computed in float64.

        Args:
            plan: Of the adapter.
            sources: The adapters as they are stored, by name.
            backend: Runs methods of whole matrices.
            vector: The merged task vector, scaled, where it is formed whole.

        Raises:
            NonFiniteError: If a factor holds a NaN or an infinity, or the dtype cannot hold the result.
        """
        first, second = self.jobs
        if vector is None:
            product = low_rank_in(*self._merged(plan, sources, backend), first.rank)
        else:
            product = low_rank(vector.double(), first.rank)
        factors = (product.left.T, product.right.T) if first.is_transposed else (product.right, product.left)
        stored = tuple(_stored(factor, job) for factor, job in zip(factors, self.jobs, strict=True))
        return (stored[0], stored[1]), LostPart(second.module, product.norm, product.lost)

    def _merged(
        self, plan: Plan, sources: Mapping[str, TensorSource], backend: Backend
    ) -> tuple[Coordinates, Tensor]:
        """Return the merged task vector, scaled, in coordinates of the adapters' factors."""
        by_task = {part.source: factors for part, factors in self._factors(sources)}
        job = self.jobs[0]
        if job.is_sum:
            found = in_coordinates([Factors.total(by_task.values())])
            return found, found.small[0]
        values, nothing = plan.values_of(job.name), Factors.nothing(*job.sides)
        vectors = [by_task.get(task, nothing) for task in plan.lock.tasks]
        if plan.lock.adapters == "sequence":
            vectors = [Factors.total(vectors[: number + 1]) for number in range(len(vectors))]
        vectors = [*map(Factors.times, vectors, plan.lock.factors("", values))]
        method, generator = values.how, CounterGenerator(plan.lock.seed, job.of)
        given = method.arguments(len(vectors), job.sides, values.weights, generator, values.options)
        tasks = method.used(values.weights)
        found = in_coordinates([vectors[task] for task in tasks])
        call = partial(method.function, **method.of_matrix(given, tasks, job.sides))
        where = f"{method.label}, tensor {job.of!r}"
        merged = merged_in(found, call, backend, where, is_checked=not method.is_built_in)
        return found, (found.small[0] if merged is None else merged) * values.scaling

    def _factors(self, sources: Mapping[str, TensorSource]) -> Iterator[tuple[Part, Factors]]:
        """Yield the products of the adapters that have the layer, as the base model stores it."""
        first, second = self.jobs
        for right, left in zip(first.parts, second.parts, strict=True):
            inputs, outputs = _read(right, sources), _read(left, sources) * left.coefficient
            inputs, outputs = inputs.reshape(len(inputs), -1), outputs.reshape(len(outputs), -1)
            yield right, Factors(inputs.T, outputs.T) if first.is_transposed else Factors(outputs, inputs)


def solved_together(jobs: Iterable[TensorJob]) -> Iterator[TensorJob | SolvedLayer]:
    """Yield the tensors of a file in order, factors that are solved for with the other one of their layer."""
    left = iter(jobs)
    for job in left:
        if not isinstance(job, SolvedJob):
            yield job
            continue
        second = next(left)
        assert isinstance(second, SolvedJob), "B follows A"
        yield SolvedLayer((job, second))


def adapter_config(plan: Plan, sources: Mapping[str, TensorSource]) -> str:
    """Return the `adapter_config.json` of a merged adapter: every layer has its rank, and the scale 1.

    Args:
        plan: From `plan_adapter`.
        sources: The adapters as they are stored, by name.
    """
    adapters = [name for name, task in plan.lock.tasks.items() if task.adapter_config]
    said = [json.loads(config_of(sources[name])) for name in adapters]
    kinds = {config.get("task_type") for config in said}
    kind = kinds.pop() if len(kinds) == 1 else None
    rank = Counter(plan.ranks.values()).most_common(1)[0][0]
    # Patterns match the end of a name unless they say where it starts.
    others = {f"^{re.escape(module)}": own for module, own in plan.ranks.items() if own != rank}
    base = plan.lock.base_model
    values = {
        "peft_type": "LORA",
        "task_type": kind if kind in _TASK_TYPES else None,
        "base_model_name_or_path": base.repo_id or base.reference,
        "revision": base.commit,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [*plan.ranks],
        "modules_to_save": None,
        "fan_in_fan_out": _is_transposed(plan, said),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return json_text(values)


def _is_transposed(plan: Plan, said: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether the base model stores layers transposed: as adapters say, or as its class does."""
    if plan.lock.merges_factors:
        return any(config.get("fan_in_fan_out") for config in said)
    return any(isinstance(job, SolvedJob) and job.is_transposed for job in plan.jobs)
