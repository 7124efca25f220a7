"""Methods of other packages: their errors name them, and what they return is checked before it is merged.

Built-in methods are tested instead, and pay for none of this.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hub_magmax.errors import HubMagmaxError, RecipeError
from hub_magmax.kernels.lazy_imports import np, torch
from hub_magmax.kernels.ops import OPS, Op
from hub_magmax.methods.rules import Rule, precomputed_rule

if TYPE_CHECKING:
    from torch import Tensor

    from hub_magmax.kernels.lazy_imports import Array, Rows
    from hub_magmax.methods.chunks import Chunks

#: Errors of the machine, which are no fault of a method.
_OF_THE_MACHINE = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)

#: Numbers per task that each built-in operation takes; the last ones are weights.
_PER_TASK = {
    "weighted_sum": 1, "affine_sum": 1, "agreeing_sum": 1, "ties": 2, "ties_sum": 2, "band": 3,
    "band_ties": 3, "band_ties_sum": 3, "dropped": 1, "dropped_ties": 2, "dropped_ties_sum": 2,
    "scaled": 1, "scaled_ties": 2, "scaled_ties_sum": 1, "selected_ties": 2,
    "stitched": 3, "balanced": 6, "clipped": 2,
}  # fmt: skip
#: Operations that take bits of what is kept, for each element.
_DROPPING = ("dropped", "dropped_ties", "dropped_ties_sum", "selected_ties")
#: Operations that take a factor for each element and task.
_SCALING = ("scaled", "scaled_ties", "scaled_ties_sum")


@contextmanager
def failures(where: str) -> Iterator[None]:
    """Turn any error of a method into a RecipeError that says where it happened."""
    try:
        yield
    except (HubMagmaxError, MemoryError):
        raise  # of the checkpoints, or of the machine
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        told = " ".join(str(error).split())[:500]
        raise RecipeError(
            f"the method failed ({type(error).__name__}{': ' if told else ''}{told})",
            where=where,
            hint="Mend it, or choose another method; --debug shows the line.",
        ) from error


def refusal(found: str, where: str, expected: str) -> RecipeError:
    """Return the error of a method that returned anything else than it has to."""
    return RecipeError(
        f"the method returned {found}",
        where=where,
        expected=expected,
        hint="Mend the method: docs/plugins.md says what each form returns.",
    )


def plugin_rule(
    form: str,
    function: Callable[..., Any],
    chunks: Chunks,
    shape: tuple[int, ...],
    options: Mapping[str, Any],
    where: str,
    *,
    takes_base: bool = False,
) -> Rule:
    """Return how a plug-in merges one tensor; whatever it computes, now or later, is checked.

    Args:
        form: "tensor", "elementwise" or "rule"; see `merge_method`.
        function: The plug-in's.
        chunks: The tensor's stacked task vectors.
        shape: The tensor's own shape.
        options: What the function takes beside them.
        where: Names method, package and tensor in messages.
        takes_base: The function of a form other than "rule" also takes the base model's values.

    Raises:
        RecipeError: If the function fails, or returns anything else than its form says.
    """
    if form == "elementwise":
        return Rule(_checked_op(_own_op(function, options, takes_base=takes_base), where))
    with failures(where):
        if form == "tensor":
            rows = _whole(chunks, with_base=takes_base)
            given = {"base": rows[0].view(shape)} if takes_base else {}
            merged = function(rows[int(takes_base) :].view(chunks.num_tasks, *shape), **given, **options)
            return precomputed_rule(checked_values(merged, shape, where).reshape(-1))
        return _checked_rule(function(chunks, **options), chunks.num_tasks, where)


def _own_op(function: Callable[..., Any], options: Mapping[str, Any], *, takes_base: bool) -> Op:
    if takes_base:
        return Op(lambda base, rows: function(_stacked(rows), base=base, **options), takes_base=True)
    return Op(lambda rows: function(_stacked(rows), **options))


def _stacked(rows: Rows) -> Tensor:
    return torch.stack(list(rows))


def _whole(chunks: Chunks, *, with_base: bool) -> Tensor:
    """Return all task vectors of a tensor, in memory of their own, perhaps after the base model's values."""
    from hub_magmax.methods.chunks import stacked_vectors, whole_vectors

    if with_base:
        return torch.from_numpy(whole_vectors(chunks))
    return stacked_vectors(chunks, range(chunks.num_tasks))


def checked_values(found: Any, shape: tuple[int, ...], where: str, rows: Rows = ()) -> Tensor:
    """Return merged values, if that is what they are.

    Args:
        found: As the method returned it.
        shape: Of the result.
        where: For messages.
        rows: What it was made of; where that is not finite, the checkpoints are to blame.
    """
    _check_kind(found, shape, "float32", where)
    if not bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(row).all()) for row in rows):
        first = torch.nonzero(~torch.isfinite(found).reshape(-1))[0]
        value = float(found.reshape(-1)[first])
        raise refusal(f"{value} as element {int(first):,}, from finite numbers", where, "finite numbers")
    tensor: Tensor = found
    return tensor.detach()


def _check_kind(found: Any, shape: tuple[int, ...], dtype: str, where: str) -> None:
    """Raise RecipeError unless this is a tensor of this shape and dtype on the CPU."""
    expected = f"torch.{dtype} of shape {list(shape)} on the CPU"
    if not isinstance(found, torch.Tensor):
        told = "None" if found is None else f"a {type(found).__name__}"
        raise refusal(told, where, f"a torch.Tensor: {expected}")
    if found.device.type != "cpu":
        raise refusal(f"a tensor on {found.device}", where, expected)
    if found.layout != torch.strided:
        raise refusal(f"a tensor of layout {found.layout}", where, f"{expected}, dense")
    if tuple(found.shape) != shape or found.dtype != getattr(torch, dtype):
        raise refusal(f"{found.dtype} of shape {list(found.shape)}", where, expected)


def _checked_op(op: Op, where: str) -> Op:
    """Return an operation of a plug-in that checks what it returns."""

    def reference(*arguments: Any) -> Tensor:
        rows: Rows = arguments[op.takes_base]
        with failures(where):
            found = op.reference(*arguments)
            shape = tuple(rows[0].shape)
            if not op.selects:
                return checked_values(found, shape, where, rows)
            _check_kind(found, shape, "uint8", where)
            return _checked_winners(found, len(rows), where)

    return replace(op, reference=reference, name="")


def _checked_winners(found: Tensor, num_tasks: int, where: str) -> Tensor:
    if found.numel() and int(found.max()) >= num_tasks:
        raise refusal(f"task {int(found.max())} as a winner", where, f"tasks from 0 to {num_tasks - 1}")
    return found


def _checked_rule(rule: Any, num_tasks: int, where: str) -> Rule:
    """Return a plug-in's rule that checks its numbers and, where it is its own, what the operation gives."""
    if not isinstance(rule, Rule) or not isinstance(rule.op, Op):
        told = f"a Rule whose op is a {type(rule.op).__name__}" if isinstance(rule, Rule) else f"{rule!r:.80}"
        raise refusal(told, where, "a Rule with an Op")
    is_built_in = OPS.get(rule.op.name) == rule.op
    if is_built_in:
        _check_per_task(rule, num_tasks, where)

    def per_element(start: int, count: int) -> tuple[Array, ...]:
        with failures(where):
            found = tuple(rule.per_element(start, count))
            if is_built_in:
                return _checked_numbers(rule.op.name, found, count, num_tasks, where)
            for values in found:
                if len(values) != count:
                    raise refusal(f"{len(values):,} numbers for {count:,} elements", where, "one for each")
            return found

    return replace(rule, op=rule.op if is_built_in else _checked_op(rule.op, where), per_element=per_element)


def _check_per_task(rule: Rule, num_tasks: int, where: str) -> None:
    number = _PER_TASK.get(rule.op.name, 0)
    found = [np.asarray(values) for values in rule.per_task]
    width = num_tasks + (rule.op.name == "affine_sum")  # with the base model's
    kind = (width,), np.dtype(np.float32)
    if [(one.shape, one.dtype) for one in found] != [kind] * number:
        told = ", ".join(f"{one.dtype} of shape {list(one.shape)}" for one in found) or "nothing"
        expected = f"{number} of float32 of shape [{width}] for the operation {rule.op.name}"
        raise refusal(f"per_task {told}", where, expected)
    # Thresholds, all but the last, may be infinite, and keep nothing or all.
    if found and (np.isnan(np.stack(found)).any() or not np.isfinite(found[-1]).all()):
        raise refusal(f"per_task {[one.tolist() for one in found]}", where, "finite numbers")


def _checked_numbers(
    name: str, found: tuple[Array, ...], count: int, num_tasks: int, where: str
) -> tuple[Array, ...]:
    """Return the numbers of a built-in operation for some elements, if that is what they are."""
    bytes_of_tasks = -(-num_tasks // 8)
    kinds: dict[str, tuple[tuple[int, ...], str]] = {
        "precomputed": ((count,), "float32"),
        "affine_sum_of_each": ((count, num_tasks + 1), "float32"),
        "chosen": ((count,), "uint8"),
        **dict.fromkeys(_DROPPING, ((count, bytes_of_tasks), "uint8")),
        **dict.fromkeys(_SCALING, ((count, num_tasks), "float32")),
    }
    if len(found) != (name in kinds):
        raise refusal(
            f"{len(found)} numbers per element", where, f"{int(name in kinds)} for the operation {name}"
        )
    for values in found:
        shape, dtype = kinds[name]
        tensor = torch.as_tensor(values)
        if dtype == "float32":
            checked_values(tensor, shape, where)
        else:
            _check_kind(tensor, shape, dtype, where)
        if name == "chosen":
            _checked_winners(tensor, num_tasks, where)
    return found
