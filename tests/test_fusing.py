"""One pass per chunk: what it counts and notices, and that compiled loops change nothing."""

import math
from dataclasses import replace

import pytest
import torch

from hub_magmax.checkpoints.stored import Stored, dtype_name
from hub_magmax.kernels import reference
from hub_magmax.kernels.compiled import cache
from hub_magmax.merging import combine, passes
from hub_magmax.merging.chunk import StoredChunk
from hub_magmax.merging.combine import compiles, make_step
from hub_magmax.merging.passes import Pass
from hub_magmax.methods import TensorRule, draws, selection

WEIGHTS = torch.tensor([0.5, 0.0, 0.5])
RULES = {
    "weighted sum": TensorRule(reference.weighted_sum, per_task=(WEIGHTS,)),
    "agreeing sum": TensorRule(reference.agreeing_sum, per_task=(WEIGHTS,)),
    "ties": TensorRule(reference.ties_merge, per_task=(torch.tensor([0.05, 0.0, 0.1]), WEIGHTS)),
    "banded sum": TensorRule(
        reference.banded_sum,
        per_task=(torch.tensor([0.05, 0.0, 0.1]), torch.tensor([0.1, 0.2, 0.1]), WEIGHTS),
    ),
    "dropped sum": TensorRule(draws.dropped_sum, per_task=(WEIGHTS / 0.3,)),
    "dropped ties": TensorRule(draws.dropped_ties, per_task=(WEIGHTS * 0.3, WEIGHTS)),
    "magmax": TensorRule(selection.largest_magnitude, selects=True),
    "given winners": TensorRule(reference.given, selects=True),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def chunk_of(length, dtype, seed=0, other=None):
    """A chunk in which ties, zeros of both signs and elements that do not move are common."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(length, generator=generator).to(dtype)
    keep = [torch.rand(length, generator=generator) < 0.5 for _ in range(3)]
    steps = [0.1 * torch.randn(length, generator=generator).round(decimals=1) * k for k in keep]
    checkpoints = [(base.double() + step).to(dtype) for step in steps]
    if length > 3:
        base[:2], checkpoints[0][1] = torch.tensor([0.0, -0.0]), 0.0
    if other is None:
        rows = Stored.of(torch.stack([base, *checkpoints]))
        return StoredChunk([(0, length)], lambda: rows)
    values = [base, checkpoints[0].to(other), *checkpoints[1:]]
    return StoredChunk([(0, length)], lambda: [Stored.of(row) for row in values])


def given_for(rule, length):
    """Winners, or what is kept for which task; nothing for most rules."""
    generator = torch.Generator().manual_seed(1)
    if rule == "given winners":
        return (torch.randint(0, 3, (length,), generator=generator, dtype=torch.uint8),)
    if rule.startswith("dropped"):
        return (torch.randint(0, 256, (1, length), generator=generator, dtype=torch.uint8).T,)
    return ()


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("length", [0, 1, 7, cache.BLOCK, 5 * cache.BLOCK + 3])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_compiled_passes_give_the_same_bits(rule, dtype, out, length):
    chunk, given = chunk_of(length, dtype), given_for(rule, length)
    fast, slow = (
        make_step(RULES[rule], dtype_name(out), 0.3, is_compiled=compiled)(chunk, given)
        for compiled in (True, False)
    )
    assert fast[0].bits.tobytes() == slow[0].bits.tobytes() and fast[0].dtype == slow[0].dtype
    assert fast[1].tolist() == slow[1].tolist()
    assert math.isfinite(fast[2]) and math.isfinite(slow[2])


@pytest.mark.parametrize("rule", RULES)
def test_checkpoints_of_several_dtypes_are_compiled_too(rule):
    chunk, given = chunk_of(1000, torch.bfloat16, other=torch.float32), given_for(rule, 1000)
    fast, slow = (
        make_step(RULES[rule], "BF16", 0.3, is_compiled=compiled)(chunk, given) for compiled in (True, False)
    )
    assert fast[0].bits.tobytes() == slow[0].bits.tobytes()


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_compiled_task_vectors_are_the_same_bits(dtype):
    chunk = chunk_of(3 * cache.BLOCK + 1, dtype)
    found = torch.empty((3, len(chunk.base)))
    probe = combine.task_vectors(chunk, found.numpy())
    assert same_bits(found, reference.task_vectors(chunk.base, chunk.checkpoints)) and probe == 0.0


def test_rows_that_float32_cannot_hold_are_not_compiled():
    assert combine.is_narrow(chunk_of(10, torch.float16)) and not combine.is_narrow(
        chunk_of(10, torch.float64)
    )


def test_small_merges_are_not_compiled(monkeypatch):
    monkeypatch.setattr(combine, "_is_compiled", lambda: True)
    assert not compiles(combine.LOAD_ABOVE_ELEMENTS - 1) and compiles(combine.LOAD_ABOVE_ELEMENTS)


def test_middling_merges_do_not_wait_for_a_compiler(monkeypatch):
    monkeypatch.setattr(combine, "_is_compiled", lambda: False)
    assert not compiles(combine.COMPILE_ABOVE_ELEMENTS - 1) and compiles(combine.COMPILE_ABOVE_ELEMENTS)


def test_what_was_compiled_is_found_again():
    make_step(RULES["magmax"], "F32", 0.3, is_compiled=True)(chunk_of(10, torch.float32), ())
    assert combine._is_compiled()


def test_rules_of_plugins_run_operation_by_operation():
    rule = TensorRule(lambda rows: rows[0])
    merged, counts, _ = make_step(rule, "F32", 1.0, is_compiled=True)(chunk_of(5, torch.float32), ())
    chunk = chunk_of(5, torch.float32)
    assert merged.tensor.allclose(chunk.checkpoints[0]) and not len(counts)


@pytest.mark.parametrize("rule", RULES)
def test_pieces_give_what_the_whole_gives(rule, monkeypatch):
    chunk, given = chunk_of(1000, torch.bfloat16), given_for(rule, 1000)
    step = make_step(RULES[rule], "BF16", 0.3, is_compiled=False)
    whole, counts, _ = step(chunk, given)
    monkeypatch.setattr(passes, "PIECE_ELEMENTS", 77)
    merged, found, _ = step(chunk, given)
    assert merged.bits.tolist() == whole.bits.tolist() and found.tolist() == counts.tolist()
    assert counts.sum() == (1000 if RULES[rule].selects else 0)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_probe_is_not_finite_where_an_input_is_not(rule, value, is_compiled):
    chunk = chunk_of(5000, torch.float32)
    chunk.checkpoints[1][4321] = value
    step = make_step(RULES[rule], "F32", 0.3, is_compiled=is_compiled)
    assert not math.isfinite(step(chunk, given_for(rule, 5000))[2])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_probe_is_not_finite_where_the_merged_value_is_too_large(dtype, is_compiled):
    rows = torch.zeros((2, 10), dtype=dtype)
    rows[1, 3] = 0.4 * torch.finfo(dtype).max
    chunk = StoredChunk([(0, 10)], lambda: Stored.of(rows))
    rule = TensorRule(reference.weighted_sum, per_task=(torch.ones(1),))
    assert not math.isfinite(make_step(rule, dtype_name(dtype), 3.0, is_compiled=is_compiled)(chunk, ())[2])
    assert math.isfinite(make_step(rule, dtype_name(dtype), 0.5, is_compiled=is_compiled)(chunk, ())[2])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize(("base", "other", "is_finite"), [(3e38, 3e38, True), (3e38, -3e38, False)])
def test_probe_counts_task_vectors_that_are_not_chosen(base, other, is_finite, dtype, is_compiled):
    """A number that is far from the base model's is told of, as are all that are not finite."""
    length = cache.BLOCK + 5
    stored = torch.ones(3, length, dtype=dtype)
    stored[0, -1], stored[2, -1] = base, other
    stored[1, -1] = base
    rows = Stored.of(stored)
    chunk = StoredChunk([(0, length)], lambda: rows)
    step = make_step(RULES["given winners"], dtype_name(dtype), 0.5, is_compiled=is_compiled)
    merged, counts, probe = step(chunk, (torch.zeros(length, dtype=torch.uint8),))
    assert math.isfinite(probe) == is_finite
    assert torch.equal(merged.tensor, stored[1]) and counts.tolist() == [length, 0]


@pytest.mark.parametrize("name", ["dropped sum", "dropped ties", "given winners", "magmax", "ties"])
def test_many_tasks_are_compiled_to_the_same_bits(name):
    """What is kept for more than eight tasks takes two bytes for each element."""
    num_tasks, length = 11, cache.BLOCK + 7
    generator = torch.Generator().manual_seed(3)
    rows = Stored.of(torch.randn(num_tasks + 1, length, generator=generator).bfloat16())
    chunk = StoredChunk([(0, length)], lambda: rows)
    numbers = tuple(torch.rand(num_tasks, generator=generator) for _ in RULES[name].per_task)
    kept = torch.randint(0, 256, (2, length), generator=generator, dtype=torch.uint8)
    given = {"dropped": (kept.T,), "given": (kept[0] % num_tasks,)}.get(name.split()[0], ())
    rule = replace(RULES[name], per_task=numbers)
    fast, slow = (
        make_step(rule, "BF16", 0.3, is_compiled=is_compiled)(chunk, given) for is_compiled in (True, False)
    )
    assert fast[0].bits.tobytes() == slow[0].bits.tobytes() and fast[1].tolist() == slow[1].tolist()


def test_a_pass_alone_is_what_it_is_made_of():
    chunk = chunk_of(100, torch.float32)
    merged, counts, _ = Pass(selection.largest_magnitude, True, "F32")(
        chunk.base, chunk.checkpoints, (), (), torch.tensor(0.5, dtype=torch.float64)
    )
    rows = reference.task_vectors(chunk.base, chunk.checkpoints)
    winners = selection.largest_magnitude(rows)
    assert counts.tolist() == torch.bincount(winners, minlength=3).tolist()
    assert merged.tensor.equal(
        reference.apply_update(chunk.base, reference.select_rows(rows, winners), 0.5, torch.float32)
    )


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with combine.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
