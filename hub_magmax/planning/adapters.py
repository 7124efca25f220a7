"""Plan of one LoRA adapter merged from several: their factors beside each other, or solved for.

A weighted sum of products is one product. With Aₜ of shape (rₜ, inputs) and Bₜ of shape (outputs, rₜ),

    Σ cₜ Bₜ Aₜ = [c₁ B₁, ..., c_T B_T] [A₁; ...; A_T],

whose rank is the sum of the ranks, and whose scale is 1: nothing is approximated. The embedding's and the
convolutions' factors have the rank at the same axes. Where a method of whole matrices merges a layer, or
`output.rank` is less than that sum, A and B are solved for (`merging.adapters`). The base model's weights are
not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from hub_magmax.checkpoints.adapters.adapter import AdapterSource
from hub_magmax.checkpoints.adapters.layout import Product
from hub_magmax.checkpoints.adapters.places import Place
from hub_magmax.checkpoints.index import ADAPTER_NAME, TensorInfo
from hub_magmax.checkpoints.source import TensorSource
from hub_magmax.errors import MismatchError, RecipeError
from hub_magmax.methods.matrices import matrices_in
from hub_magmax.planning.layout import OUTPUT_DTYPES
from hub_magmax.planning.plan import FactorJob, Part, Plan, Shard, SolvedJob
from hub_magmax.planning.reads import bytes_read
from hub_magmax.planning.rule_coverage import check_rules, check_values
from hub_magmax.recipe.lockfile import Lock
from hub_magmax.recipe.merge_values import MergeValues, RuleValues, rule_values
from hub_magmax.recipe.schema import Output, Recipe
from hub_magmax.recipe.tensor_rules import TensorRule, rule_for
from hub_magmax.text import rule_text, shown

_AS_WEIGHTS = "Or write whole weights: output.format: weights."


def plan_adapter(recipe: Recipe, lock: Lock, sources: Mapping[str, TensorSource]) -> Plan:
    """Check that the adapters fit the base model and each other, and lay out the merged one.

    Args:
        recipe: For the output's dtype and the rules, which are applied layer by layer.
        lock: For method, preference and what the adapters are added to.
        sources: `base_model`, then the adapters themselves, as they are stored.

    Returns:
        A plan with one file. By layer, in the base model's order, it has A (rank, ...) and B (outputs, rank,
        ...), in float32 unless the recipe names a dtype. The rank is the sum of the ranks, or less where the
        layer is solved for.

    Raises:
        MismatchError: If an adapter does not fit the base model, or does not name layers as the others do.
        RecipeError: If the recipe asks for what an adapter cannot hold, or a rule matches nothing.
    """
    base_model = sources["base_model"]
    adapters = {
        name: AdapterSource(base_model, sources[name], task.places) for name, task in lock.tasks.items()
    }
    check_rules((source.index for source in (sources["base_model"], *adapters.values())), recipe.tensors)
    base = base_model.index.tensors
    for adapter in adapters.values():
        _check_whole(adapter, recipe.tensors, base)
    _check_orientation([*adapters.values()])
    own_values = _own_values(recipe, lock, base, adapters)
    made = [*_jobs(recipe, lock, base, adapters, own_values)]
    jobs = tuple(job for _, job in made)
    if not jobs:
        raise RecipeError(
            "no layer is left to be adapted: rules, preference and scaling take every product away",
            key=("output", "format"),
            hint="Leave out a rule, or raise method.scaling.",
        )
    own = {job.name: own_values[tensor] for tensor, job in made if tensor in own_values}
    bytes_in = bytes_read(jobs, sources)
    return Plan(recipe, lock, (Shard(ADAPTER_NAME, jobs),), (), bytes_in, own_values=own)


def _own_values(
    recipe: Recipe, lock: Lock, base: Mapping[str, TensorInfo], adapters: Mapping[str, AdapterSource]
) -> dict[str, RuleValues]:
    """Return what rules say of the base model's tensors; each has to be about one that adapters change."""
    adapted = dict.fromkeys(tensor for adapter in adapters.values() for tensor in adapter.products)
    check_values(recipe.tensors, [tensor for tensor in base if tensor in adapted], {}, base)
    return rule_values(recipe.tensors, lock.method, tuple(lock.tasks), base)


def _jobs(
    recipe: Recipe,
    lock: Lock,
    tensors: Iterable[str],
    adapters: Mapping[str, AdapterSource],
    own_values: Mapping[str, RuleValues],
) -> Iterator[tuple[str, FactorJob]]:
    """Yield the factors of every layer that an adapter changes with a coefficient other than zero.

    Each comes with the name of the tensor that the layer lies in.
    """
    merged = _merged(lock, own_values.values())
    counted: dict[str, _Way] = {}
    for tensor in tensors:
        covered = _covered(tensor, recipe, lock)
        way = merged[own_values.get(tensor)] if covered is None else _Way.sum_by(covered)
        for products in _layers(tensor, adapters):
            module = next(iter(products.values())).module
            if counted.setdefault(module, way) != way:
                raise _torn(module, tensor)
            layer = _Layer(tensor, way.kept(products), adapters, way, recipe.output)
            if layer.begins:
                layer.check_names()
                yield from ((tensor, job) for job in layer.jobs())


@dataclass(frozen=True)
class _Way:
    """How the products of a layer are merged.

    Attributes:
        coefficients: What each adapter's product is multiplied by in a sum, its own scale aside.
        counted: The tasks whose products count.
        values: By which a method merges whole matrices; None where products are summed.
    """

    coefficients: Mapping[str, float]
    counted: tuple[str, ...]
    values: MergeValues | None = None

    def kept(self, products: Mapping[str, Product]) -> dict[str, Product]:
        """Return those that count."""
        return {task: product for task, product in products.items() if task in self.counted}

    @classmethod
    def sum_by(cls, coefficients: Mapping[str, float]) -> _Way:
        return cls(coefficients, tuple(task for task, number in coefficients.items() if number))


def _covered(tensor: str, recipe: Recipe, lock: Lock) -> dict[str, float] | None:
    """Return the coefficients of a tensor that a rule covers, else None."""
    rule = rule_for(tensor, recipe.tensors)
    if rule is not None and rule.take == "nothing":
        raise _left_out(tensor, rule)
    return _taken(lock, rule.source) if rule is not None else None


def _layers(tensor: str, adapters: Mapping[str, AdapterSource]) -> list[dict[str, Product]]:
    """Return the products of each layer that lies in a tensor, by task; mostly it is one layer."""
    found: dict[Place, dict[str, Product]] = {}
    for task, adapter in adapters.items():
        for product in adapter.products.get(tensor, ()):
            found.setdefault(product.place, {})[task] = product
    return [found[place] for place in sorted(found, key=lambda place: place.start_row)]


def _merged(lock: Lock, own: Iterable[RuleValues]) -> dict[RuleValues | None, _Way]:
    """Return how layers are merged, by what a rule says of them; None stands for no rule."""
    found: dict[RuleValues | None, MergeValues] = {None: lock.values}
    found |= {one: one.over(lock.values) for one in dict.fromkeys(own)}
    return {one: _way(lock, values) for one, values in found.items()}


def _way(lock: Lock, values: MergeValues) -> _Way:
    factors = lock.factors("", values)
    if values.how.form != "matrix":
        found = map(mul, factors, values.how.coefficients(len(lock.tasks), values.weights, values.options))
        return _Way.sum_by(_of_products(lock, [values.scaling * value for value in found]))
    unread = values.how.unread(values.weights)
    used = [bool(values.scaling) and task not in unread for task in range(len(lock.tasks))]
    # What is no matrix is averaged.
    weights = [weight * is_used for weight, is_used in zip(values.weights, used, strict=True)]
    averaged = [values.scaling * number for number in map(mul, factors, weights)]
    counted = _of_products(lock, used)
    return _Way(_of_products(lock, averaged), tuple(task for task in lock.tasks if counted[task]), values)


def _taken(lock: Lock, source: str) -> dict[str, float]:
    """Return the same where a rule takes the tensor from one source."""
    return _of_products(lock, [float(name == source) for name in lock.tasks])


def _of_products(lock: Lock, of_vectors: Sequence[float]) -> dict[str, float]:
    """Return coefficients of the adapters' products, given those of the task vectors."""
    if lock.adapters == "sequence":  # a product is in the task vectors of its own task and of all later ones
        of_vectors = [math.fsum(of_vectors[start:]) for start in range(len(of_vectors))]
    return dict(zip(lock.tasks, of_vectors, strict=True))


@dataclass(frozen=True)
class _Layer:
    """One layer of the merged adapter.

    Attributes:
        tensor: In which it lies.
        products: Of the tasks that count and have it.
    """

    tensor: str
    products: Mapping[str, Product]
    adapters: Mapping[str, AdapterSource]
    way: _Way
    output: Output

    @property
    def begins(self) -> bool:
        """Whether it begins in this tensor, and something counts."""
        return bool(self.products) and all(product.is_first for product in self.products.values())

    def check_names(self) -> None:
        """Raise where adapters call it by different names."""
        first_task = next(iter(self.products))
        for name, product in self.products.items():
            if product.names != self._first.names:
                raise MismatchError(
                    f"{shown(self.tensor)} is changed by {shown(product.names[0])}",
                    where=self.adapters[name].label,
                    expected=f"{shown(self._first.names[0])}, as in {self.adapters[first_task].label}",
                    hint=f"Train all adapters with one model class and one kind of layer. {_AS_WEIGHTS}",
                )

    def jobs(self) -> Iterator[FactorJob]:
        """Yield how the factors A and B are made."""
        solved = self._is_merged or self._total > self.rank
        stored = "F32" if self.output.dtype == "auto" else OUTPUT_DTYPES[self.output.dtype]
        for axis, name in enumerate(self._first.names):
            shape = list(self._shapes(axis)[0])
            shape[axis] = self.rank if solved else self._total
            job = FactorJob(
                name,
                tuple(shape),
                stored,
                math.prod(shape),
                "merge",
                module=self._first.module,
                axis=axis,
                parts=self._parts(axis),
            )
            yield self._solved(job) if solved else job

    def _solved(self, job: FactorJob) -> SolvedJob:
        rows, columns = self._sides
        return SolvedJob(
            **vars(job),
            of=self.tensor,
            sides=(rows, columns),
            is_transposed=self._first.transposed,
            is_sum=not self._is_merged,
            total_rank=self._total,
        )

    @property
    def _first(self) -> Product:
        return next(iter(self.products.values()))

    @property
    def _total(self) -> int:
        """The sum of the ranks."""
        return sum(shape[0] for shape in self._shapes(0))

    @property
    def rank(self) -> int:
        """The rank that it gets where it is solved for."""
        return min(self._total, *self._sides, self.output.rank or self._total)

    @property
    def _shape(self) -> tuple[int, ...]:
        """The shape of what is merged, as the base model stores it."""
        (_, *inputs), (outputs, *_) = self._shapes(0)[0], self._shapes(1)[0]
        return (*inputs, outputs) if self._first.transposed else (outputs, *inputs)

    @property
    def _sides(self) -> tuple[int, int]:
        return self._shape[0], math.prod(self._shape[1:])

    @property
    def _is_merged(self) -> bool:
        """Whether a method of whole matrices merges it."""
        return self.way.values is not None and matrices_in(self.tensor, self._shape) is not None

    def _shapes(self, axis: int) -> list[tuple[int, ...]]:
        """Return the shapes of the tasks' factors A or B."""
        return [
            self.adapters[task].adapter.index.tensors[product.second if axis else product.first].shape
            for task, product in self.products.items()
        ]

    def _parts(self, axis: int) -> tuple[Part, ...]:
        """Return the stored factors A or B and their coefficients, which are 1 for A."""
        if not axis:
            return tuple(Part(task, product.first, 1.0) for task, product in self.products.items())
        counted = dict.fromkeys(self.products, 1.0) if self._is_merged else self.way.coefficients
        return tuple(
            Part(task, product.second, counted[task] * product.scale)
            for task, product in self.products.items()
        )


def _check_whole(adapter: AdapterSource, rules: tuple[TensorRule, ...], base: Mapping[str, Any]) -> None:
    """Raise unless rules leave out what is no product: trained heads, biases, a layer saved with factors."""
    for name in adapter.whole:
        rule, take = rule_for(name, rules), "base_model" if name in base else "nothing"
        if rule is None or rule.take not in ("base_model", take):
            saved = "Save it again with `save_pretrained(..., save_embedding_layers=False)`. "
            raise RecipeError(
                f"the adapter holds {shown(name)} whole, which is no product",
                where=f"{adapter.label}, {ADAPTER_NAME}",
                expected="factors of products only, for output.format: adapter",
                hint=(saved if name in adapter.products else "")
                + f"Go without it: tensors: [{rule_text(name, take)}]. {_AS_WEIGHTS}",
            )


def _check_orientation(adapters: list[AdapterSource]) -> None:
    for adapter in adapters:
        if adapter.config.transposed != adapters[0].config.transposed:
            raise MismatchError(
                f"`fan_in_fan_out` is {str(adapter.config.transposed).lower()}",
                where=adapter.label,
                expected=f"the same as in {adapters[0].label}, since the merged adapter says it once",
                hint=f"Check that all adapters are of one base model. {_AS_WEIGHTS}",
            )


def _torn(module: str, tensor: str) -> RecipeError:
    return RecipeError(
        f"the layer {shown(module)} is several tensors of the base model, and a rule covers {shown(tensor)} "
        "and not all of them",
        key=("tensors",),
        hint=f"Write rules that treat them alike. {_AS_WEIGHTS}",
    )


def _left_out(tensor: str, rule: TensorRule) -> RecipeError:
    return RecipeError(
        f"the rule {rule.match!r} leaves out {shown(tensor)}, and an adapter cannot take tensors away",
        key=("tensors",),
        hint=f"Say `take: base_model` to leave it as it is in the base model. {_AS_WEIGHTS}",
    )
