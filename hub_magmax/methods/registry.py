"""Merge methods: the decorator that registers a function, its options, and the rule that it returns.

A method is one decorated function. The modules that define the built-in methods import torch
only when one is used, so that a recipe is checked without paying for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from hub_magmax.errors import ArgumentError, RecipeError
from hub_magmax.methods.argument_kinds import Paper as Paper  # noqa: PLC0414, methods take it from here
from hub_magmax.methods.argument_kinds import check_forms, check_kinds
from hub_magmax.methods.data_statistics import (
    KINDS,
    StatisticsByTask,
    StatisticsKind,
    of_all,
    without_statistics,
)
from hub_magmax.methods.matrices import Matrices, matrices_in, matrix_rule, transposed
from hub_magmax.methods.plugins import failures, plugin_rule, refusal
from hub_magmax.methods.rules import Rule, weighted_rule
from hub_magmax.options import Options, for_each_task, options_of
from hub_magmax.registry import METHODS

if TYPE_CHECKING:
    from hub_magmax.kernels.randomness import CounterGenerator
    from hub_magmax.methods.chunks import Chunks

#: Parameters a method may declare that the merge supplies, not the recipe.
SUPPLIED = ("preference", "multipliers", "generator", "shape", "base", "sides", *KINDS)

#: Built-in methods whose survey of a tensor has no form for many side by side.
ALONE = ("ram_plus", "sce", "pcb")

#: Options with which a method that elects a sign adds multiples of task vectors, and does not average them.
ADDING: Mapping[str, str] = MappingProxyType({"consensus": "sum"})

Form = Literal["tensor", "matrix", "elementwise", "rule", "linear"]

#: Takes the rows and columns of a matrix and the number of tasks, and returns bytes.
BytesOfMatrix = Callable[[int, int, int], float]


@dataclass(frozen=True)
class MergeMethod:
    """A registered method.

    Attributes:
        name: Its name in recipes.
        source: The paper, or who invented it.
        paper: The paper in full, where it is known.
        scaling: Default scaling coefficient λ.
        form: Kind of argument that `function` takes; see `merge_method`.
        held_bytes: Memory per element of a tensor that is kept while the method looks at all of it; None for
            a single pass, which keeps elements that are undecided at a first look.
        matrix_bytes: Memory that a method of whole matrices takes of one, beside the task vectors; None:
            `held_bytes` for each element, and what is merged.
        uses: Takes the preference and returns the numbers of the tasks that count; None: all.
        in_comparison: Options with which a comparison tries it that names no methods.
        is_portable: Whether every processor gives the same bytes.
        options: Recipe options as pydantic field definitions, (annotation, default) by name.
        supplied: Which of `SUPPLIED` the function asks for.
        summary: First line of the function's docstring.
    """

    name: str
    source: str
    scaling: float
    form: Form
    function: Callable[..., Any]
    options: Options = field(hash=False)
    supplied: tuple[str, ...]
    summary: str
    held_bytes: int | None = 0
    matrix_bytes: BytesOfMatrix | None = None
    uses: Callable[[tuple[float, ...]], Sequence[int]] | None = None
    paper: Paper | None = None
    in_comparison: tuple[Mapping[str, Any], ...] = field(default=({},), hash=False)
    is_portable: bool = True

    def unread(self, preference: tuple[float, ...]) -> tuple[int, ...]:
        """Return the tasks that do not count under a preference; zeros do in place of their task vectors."""
        used = self.used(preference)
        return tuple(task for task in range(len(preference)) if task not in used)

    def used(self, preference: tuple[float, ...]) -> tuple[int, ...]:
        """Return the tasks that count, in order."""
        every = range(len(preference))
        if self.uses is None:
            return tuple(every)
        with failures(f"{self.label}, uses"):
            used = tuple(self.uses(preference))
        if not set(used) <= {*every}:
            raise refusal(f"the tasks {list(used)}", f"{self.label}, uses", f"numbers from 0 to {every[-1]}")
        return tuple(task for task in every if task in used)

    def held_of(self, rows: int, columns: int, num_tasks: int) -> float:
        """Return the bytes that a method of whole matrices takes of one, beside the task vectors."""
        if self.matrix_bytes is not None:
            return self.matrix_bytes(rows, columns, num_tasks)
        return (8 + (self.held_bytes or 0)) * rows * columns

    @property
    def is_built_in(self) -> bool:
        return self.name in METHODS.built_in

    @property
    def is_light(self) -> bool:
        """Whether its rule of a tensor has no numbers for each element that are kept."""
        return self.form in ("rule", "linear", "elementwise") and not self.held_bytes

    @property
    def is_bundled(self) -> bool:
        """Whether `methods.small_tensors` merges small tensors together: not if each has facts of its own."""
        is_known = self.is_built_in and self.form in ("rule", "linear") and "shape" not in self.supplied
        return is_known and self.name not in ALONE and self.statistics is None

    @property
    def statistics(self) -> StatisticsKind | None:
        """The kind of statistics of the tasks' data that it needs, None where it needs none."""
        return next((kind for kind in KINDS if kind in self.supplied), None)

    @cached_property
    def label(self) -> str:
        """Name of the method in messages, with the package of a plug-in."""
        plugin = METHODS.plugin(self.name)
        return f"method {self.name}" if plugin is None else f"plug-in {self.name} ({plugin})"

    @property
    def takes_factors(self) -> bool:
        """Whether it merges products in coordinates of their factors."""
        return "sides" in self.supplied

    @property
    def uses_preference(self) -> bool:
        return "preference" in self.supplied or "multipliers" in self.supplied

    def multiplies(self, options: Mapping[str, Any]) -> bool:
        """Say whether it multiplies task vectors by numbers, so that recipes may give these, of any sign.

        A method with the option `consensus` does so where that is `ADDING`.
        """
        adds = all(options.get(key) == value for key, value in ADDING.items() if key in self.options)
        return "multipliers" in self.supplied and adds

    def rule(
        self,
        chunks: Chunks,
        *,
        shape: tuple[int, ...],
        preference: tuple[float, ...],
        generator: CounterGenerator,
        options: Mapping[str, Any],
        statistics: StatisticsByTask | None = None,
    ) -> Rule:
        """Survey one tensor and return how to merge it.

        Args:
            chunks: The tensor's stacked task vectors.
            shape: The tensor's own shape, for methods that see whole tensors.
            preference: One weight per task, non-negative, summing to 1.
            generator: Counter-based random bits for this tensor.
            options: As returned by `check_options`.
            statistics: What the data of each task tells of the tensor, for methods that need that. Where it
                tells nothing, the tensor is averaged by preference.

        Raises:
            RecipeError: If a method needs statistics, and there are none, or only some tasks have them.
        """
        if self.form == "linear":
            return weighted_rule(self.coefficients(chunks.num_tasks, preference, options))
        call = self.arguments(chunks.num_tasks, shape, preference, generator, options)
        where = f"{self.label}, tensor {generator.name!r}"
        if (kind := self.statistics) is not None:
            if statistics is None:
                raise without_statistics(self.label, kind)
            call[kind] = of_all(statistics, self.used(preference), where)
            if not call[kind]:
                return weighted_rule(preference)
        if self.form == "matrix":
            matrices, tasks = matrices_in(generator.name, shape), self.used(preference)
            if matrices is None or not tasks:
                return weighted_rule(preference)
            return self._rule_of_matrices(chunks, matrices, tasks, call, where)
        if self.form == "rule" and self.is_built_in:
            with failures(where):
                rule: Rule = self.function(chunks, **call)
                return rule
        takes_base = "base" in self.supplied
        return plugin_rule(self.form, self.function, chunks, shape, call, where, takes_base=takes_base)

    def arguments(
        self,
        num_tasks: int,
        shape: tuple[int, ...],
        preference: tuple[float, ...],
        generator: CounterGenerator,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return what the function is called with for a tensor, values and what is known of these aside."""
        supplied = {
            "preference": preference,
            "multipliers": _multipliers(preference),
            "generator": generator,
            "shape": shape,
        }
        call = {name: supplied[name] for name in self.supplied if name in supplied}
        return call | for_each_task(self, options, num_tasks)

    def of_matrix(
        self, call: Mapping[str, Any], tasks: Sequence[int], sides: tuple[int, int]
    ) -> dict[str, Any]:
        """Return the arguments for a matrix of some sides, of which the function gets some tasks alone."""
        own = {
            name: tuple(call[name][task] for task in tasks)
            for name in ("preference", "multipliers")
            if name in call
        }
        return {**call, **own} | ({"sides": sides} if self.takes_factors else {})

    def _rule_of_matrices(
        self, chunks: Chunks, matrices: Matrices, tasks: Sequence[int], call: Mapping[str, Any], where: str
    ) -> Rule:
        """Return the rule of a tensor of matrices, for which the function gets the tasks that count."""
        call = self.of_matrix(call, tasks, (matrices.rows, matrices.columns))
        inputs_are_rows = any(own.is_transposed for own in call.get(self.statistics or "", ()))
        function = transposed(self.function) if inputs_are_rows else self.function
        return matrix_rule(function, chunks, matrices, tasks, call, where, is_checked=not self.is_built_in)

    def multipliers(
        self, num_tasks: int, preference: tuple[float, ...], options: Mapping[str, Any]
    ) -> tuple[float, ...] | None:
        """Return what multiplies each task vector, the scaling coefficient aside; None if no number does."""
        if self.form == "linear":
            return self.coefficients(num_tasks, preference, options)
        return _multipliers(preference) if self.multiplies(options) else None

    def coefficients(
        self, num_tasks: int, preference: tuple[float, ...], options: Mapping[str, Any]
    ) -> tuple[float, ...]:
        """Return the factors of a linear method, one per task vector, the same for all tensors.

        Args:
            num_tasks: Number of task vectors.
            preference: One weight per task, non-negative, summing to 1.
            options: As returned by `check_options`.

        Raises:
            RecipeError: If the method is not linear, or fails, or returns anything but finite numbers.
        """
        where = self.label
        if self.form != "linear":
            raise RecipeError("the method is not linear", where=where, expected=", ".join(linear_names()))
        supplied = {"preference": preference, "multipliers": _multipliers(preference)}
        call = {name: supplied[name] for name in self.supplied} | for_each_task(self, options, num_tasks)
        with failures(where):
            found = tuple(float(value) for value in self.function(num_tasks, **call))
        if len(found) != num_tasks or not all(map(math.isfinite, found)):
            raise refusal(str(found), where, f"{num_tasks} finite numbers")
        return found


def _multipliers(preference: tuple[float, ...]) -> tuple[float, ...]:
    """Return weights times the number of tasks: ones where all tasks weigh the same."""
    return tuple(weight * len(preference) for weight in preference)


def preferred(preference: tuple[float, ...]) -> tuple[int, ...]:
    """Return the tasks with a weight."""
    return tuple(task for task, weight in enumerate(preference) if weight)


def merge_method(
    name: str,
    *,
    source: str | Paper,
    scaling: float = 1.0,
    form: Form = "tensor",
    held_bytes: int | BytesOfMatrix | None = 0,
    uses: Callable[[tuple[float, ...]], Sequence[int]] | None = None,
    in_comparison: Sequence[Mapping[str, Any]] = ({},),
    is_portable: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a function into a merge method, known by its name in this process.

    A package announces it to all others (docs/plugins.md). Keyword-only arguments of the function become
    recipe options, checked by pydantic (`Annotated[float, Field(gt=0)]` works, and `PerTask` gives each task
    its own value); arguments named `preference` (tuple of floats), `generator` (`CounterGenerator`) or
    `shape` (the tensor's own) are supplied by the merge. One named `multipliers`, in place of `preference`,
    gets the preference times the number of tasks, or the coefficients that a recipe gives, which may have any
    sign; with an option `consensus`, coefficients where that is `sum`, and then it has to read `multipliers`
    alone. One named `base` gets the base model's values, float32 and of the shape of one task vector, where
    the form is "tensor" or "elementwise". One named `sides`, for the form "matrix", gets rows and columns,
    and says that the result turns with these and that zero ones count there alone: products, as of adapters,
    then come in coordinates of their factors. One named `gram` or `merged_gram` (form "matrix"), or `fisher`
    (form "rule"), gets statistics of the data of each task that counts (`data_statistics.TensorStatistics`);
    tensors without them are averaged by preference.

    Args:
        name: Name in recipes: lower case, words joined by underscores.
        source: The paper it comes from, as a `Paper` or "arXiv:…", or who invented it.
        scaling: Default scaling coefficient λ, a finite number.
        form: Argument and result of the function.
            "tensor": task vectors `"tasks *shape"` of one whole tensor; returns `"*shape"`.
            "matrix": task vectors `"tasks rows columns"` of one matrix, of the tasks that `uses` names, on
            the device of the merge; returns `"rows columns"`, float32 there. All that is no matrix
            (`matrices.matrices_in`) is averaged by preference.
            "elementwise": the same for any run of elements, `"tasks chunk"` to `"chunk"`, so
            that memory does not grow with the tensor; every element must depend on its own
            column only.
            "rule": a re-iterable of chunks; returns a `Rule` (see there). An option `scope` that is
            "model" gives it the chunks of all merged tensors, as if they were one.
            "linear": the number of tasks; returns a coefficient for each, and the merged task vector is
            the sum of the task vectors times these. These, and those with `sides`, merge adapters into one.
        held_bytes: Memory per element of a tensor that the method keeps while it looks at all of it, beside
            the task vectors of `"tensor"` and `"matrix"`; plans state it and `output.memory` limits it. None
            for a rule that merges chunks while it looks at them (`Chunks.map`) and keeps the undecided
            elements of a few. For `"matrix"` also a function that returns all that is held of one matrix.
        uses: Takes the preference and returns the tasks, from zero, on whose vectors the result depends; the
            others are not read, and the function gets zeros in their place. None: all.
        in_comparison: Options with which a comparison that names no methods tries it, one mapping per try;
            empty for a method that is too slow for that.
        is_portable: Whether every processor gives the same bytes. Plans and cards say where it does not.
    """

    check_kinds(name, source, scaling, held_bytes, uses, in_comparison, is_portable)
    if not isinstance(form, str) or form not in get_args(Form):
        raise ArgumentError(
            f"form {form!r} is not one of {', '.join(get_args(Form))}", where=f"method {name}"
        )
    per_element, of_matrix = (0, held_bytes) if callable(held_bytes) else (held_bytes, None)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        check_forms(name, form, inspect.signature(function).parameters)
        function.merge_method = MergeMethod(  # type: ignore[attr-defined]
            name=name,
            source=f"arXiv:{source.arxiv}" if isinstance(source, Paper) else source,
            paper=source if isinstance(source, Paper) else None,
            scaling=scaling,
            form=form,
            function=function,
            options=MappingProxyType(options_of(function, without=SUPPLIED)),
            supplied=tuple(name for name in inspect.signature(function).parameters if name in SUPPLIED),
            held_bytes=per_element,
            matrix_bytes=of_matrix,
            uses=uses,
            in_comparison=tuple(MappingProxyType(dict(options)) for options in in_comparison),
            is_portable=is_portable,
            summary=(inspect.getdoc(function) or "").split("\n", 1)[0],
        )
        METHODS.register(name, function)
        return function

    return register


#: `merge_method` for the built-in methods of whole matrices: slow, and of bytes that LAPACK decides.
matrix_method = partial(merge_method, form="matrix", uses=preferred, in_comparison=(), is_portable=False)


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, the built-in ones first, then those of other packages."""
    return METHODS.names()


def surveys_model(method: Mapping[str, Any]) -> bool:
    """Say whether a method, as a lock describes it, looks at all tensors before the first is merged."""
    return method.get("scope") == "model" and get_method(method["name"]).form == "rule"


def linear_names() -> tuple[str, ...]:
    """Return the names of the built-in methods that are linear."""
    return tuple(name for name in METHODS.built_in if get_method(name).form == "linear")


def get_method(name: str) -> MergeMethod:
    """Return the method that recipes call `name`.

    Raises:
        RecipeError: If there is none, with the nearest name.
    """
    method: MergeMethod = METHODS.get(name)
    return method
