"""Plan of an adapter of a bound rank for merged whole matrices: of checkpoints, and by any method.

A merged task vector is formed whole, matrix by matrix, and its strongest singular directions become the
factors of a layer. An adapter holds products alone, so what is no matrix of a layer stays as it is in the
base model, where the recipe says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice

from hub_magmax.checkpoints.config import stated_config
from hub_magmax.checkpoints.index import ADAPTER_NAME
from hub_magmax.checkpoints.names.conversion_tables import layer_kinds, model_names
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import RecipeError
from hub_magmax.methods import surveys_model
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.planning.layout import OUTPUT_DTYPES, make_plan
from hub_magmax.planning.plan import Plan, Shard, SolvedJob, TensorJob, TiedJob
from hub_magmax.planning.reads import bytes_read
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.schema import Output, Recipe
from hub_magmax.text import number_of, rule_text, shown

#: Classes of layers that PEFT adds products to. Conv1D is stored transposed.
_LINEAR, _TRANSPOSED, _CONVOLUTIONS = "Linear", "Conv1D", ("Conv1d", "Conv2d", "Conv3d")

_PREFIX = "base_model.model."

#: Rules that a message proposes.
_MOST_RULES = 30


# Complex, and flat: one thing checked after the other.
def plan_low_rank(recipe: Recipe, lock: Lock, sources: Mapping[str, TensorSource]) -> Plan:
    """Check that the checkpoints fit each other, and lay out an adapter of the rank that the recipe bounds.

    Args:
        recipe: For the output's dtype and rank, and the rules.
        lock: For sources, method and preference.
        sources: The base model and the tasks, as they are merged.

    Returns:
        A plan with one file: A and B of every matrix that is merged, by the names of the base model's class,
        in float32 unless the recipe names a dtype.

    Raises:
        MismatchError: If the checkpoints do not fit each other.
        RecipeError: If something is merged that no product can be, naming the rules that leave it as it is.
    """
    whole = make_plan(recipe, lock, sources)
    _check(whole, sources["base_model"].index.tensors)
    layers = _Layers(sources["base_model"], recipe.output)
    changed = _changed(whole, sources)
    if without := [job for job in changed if not layers.holds(job)]:
        raise _no_product([job.name for job in without], [job.name for job in changed if job not in without])
    jobs = tuple(factor for job in changed for factor in layers.factors(job))
    if not jobs:
        raise RecipeError("no matrix is merged", key=("output", "format"), hint="Leave out a rule.")
    made = _of_factors(whole, jobs)
    return replace(made, bytes_in=bytes_read(made.whole_jobs, sources))


def _of_factors(whole: Plan, jobs: tuple[SolvedJob, ...]) -> Plan:
    """Return the plan of an adapter's file in place of whole weights."""
    return replace(
        whole,
        shards=(Shard(ADAPTER_NAME, jobs),),
        left_out=(),
        own_values={job.name: whole.own_values[job.of] for job in jobs if job.of in whole.own_values},
        needs_torch=True,
        metadata={},
        lost_metadata=(),
    )


@dataclass(frozen=True)
class _Layers:
    """Layers of the base model's class, by the names of its files.

    Attributes:
        base: The base model.
        output: Names dtype and rank.
    """

    base: TensorSource
    output: Output

    @cached_property
    def _kinds(self) -> Mapping[str, str] | None:
        return layer_kinds(stated_config(self.base))

    @cached_property
    def _names(self) -> Mapping[str, str] | None:
        """Names in the class by those in the files; None where transformers does not know the class."""
        found = model_names(stated_config(self.base), self.base.index.tensors)
        return None if found is None else found.of_file

    def module(self, tensor: str) -> str | None:
        """Return what the class calls a layer; None where it has no layer of this very tensor."""
        name = tensor if self._names is None else self._names.get(tensor, "")
        return name.removesuffix(".weight") if name.endswith(".weight") else None

    def kind(self, job: TensorJob) -> str:
        """Return the class of the layer that a tensor is the weight of; empty where it is none."""
        module = self.module(job.tensor)
        if module is None:
            return ""
        if self._kinds is None:  # an unknown class: matrices are of linear layers
            return _LINEAR if len(job.shape) == 2 else ""
        return self._kinds.get(module, "")

    def holds(self, job: TensorJob) -> bool:
        """Say whether a product can hold what is merged of a tensor."""
        if isinstance(job, TiedJob) or not job.merged:
            return False
        found, kind = matrices_in(job.tensor, job.shape), self.kind(job)
        is_layer = kind in (_LINEAR, _TRANSPOSED, *_CONVOLUTIONS)
        return is_layer and found is not None and found.number == 1

    def factors(self, job: TensorJob) -> Iterator[SolvedJob]:
        """Yield A and B of a layer."""
        module = self.module(job.tensor)
        assert module is not None, "only layers are merged"
        is_transposed = self.kind(job) == _TRANSPOSED
        rows, columns = job.shape[0], math.prod(job.shape[1:])
        rank = min(rows, columns, self.output.rank or rows)
        outputs, *inputs = job.shape[::-1] if is_transposed else job.shape
        shapes = ((rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:])))
        for axis, (side, shape) in enumerate(zip("AB", shapes, strict=True)):
            yield SolvedJob(
                f"{_PREFIX}{module}.lora_{side}.weight",
                shape,
                "F32" if self.output.dtype == "auto" else OUTPUT_DTYPES[self.output.dtype],
                math.prod(shape),
                "merge",
                unread=job.unread,
                module=module,
                axis=axis,
                of=job.tensor,
                sides=(rows, columns),
                is_transposed=is_transposed,
                total_rank=min(rows, columns),
                of_shape=job.shape,
            )


def _changed(whole: Plan, sources: Mapping[str, TensorSource]) -> list[TensorJob]:
    """Return the tensors that are merged, but those that no task changes."""
    tasks = [sources[name] for name in whole.lock.tasks]
    merged = (job for job in whole.jobs if job.uses_values)
    return [job for job in merged if not all(task.keeps(job.tensor) for task in tasks)]


def _check(whole: Plan, base: Iterable[str]) -> None:
    """Raise for a method of the whole model, or a rule that takes a tensor from a task, or leaves it out."""
    if any(surveys_model(values.method) for values in whole.surveyed):
        raise RecipeError(
            "a method that looks at the whole model gives no adapter",
            key=("method", "scope"),
            hint="Say `scope: tensor`, or write whole weights: output.format: weights.",
        )
    copied = [job for job in whole.jobs if not job.uses_values and job.source != "base_model"]
    for name in (*(job.name for job in copied), *(name for name in whole.left_out if name in base)):
        raise RecipeError(
            f"a rule takes {shown(name)} from a task, or leaves it out, and an adapter of a bound rank has "
            "what is merged, and no more",
            key=("tensors",),
            hint="Say `take: base_model` to leave it as it is in the base model, or leave the rule out.",
        )


def _no_product(without: Sequence[str], held: Sequence[str]) -> RecipeError:
    """Return the error of tensors that no product can hold, with the rules that leave them as they are."""
    names = dict.fromkeys(_glob(name, held) for name in without)
    rules = ", ".join(map(rule_text, islice(names, _MOST_RULES)))
    more = f" and {number_of(len(names) - _MOST_RULES, 'more kind')}" if len(names) > _MOST_RULES else ""
    return RecipeError(
        f"no matrix of a layer that an adapter adds to: {number_of(len(without), 'tensor')}, such as "
        f"{shown(without[0])}: vectors, embeddings, heads of language models, tied layers, experts",
        key=("output", "format"),
        expected="matrices of linear layers and convolutions only, for output.rank",
        hint=f"Leave them as they are in the base model: tensors: [{rules}]{more}. Or write whole weights: "
        "output.format: weights.",
    )


def _glob(name: str, held: Iterable[str]) -> str:
    """Return a glob over tensors whose names end alike; the name where one of those is a layer's matrix."""
    *before, module, parameter = ("", *name.split("."))
    glob = f"*.{module}.{parameter}" if any(before) else name
    return name if any(fnmatchcase(other, glob) for other in held) else glob
