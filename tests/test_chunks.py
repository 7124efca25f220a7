"""One tensor of stored checkpoints: rules find the same in stored bits as in task vectors."""

import gc
import weakref

import numpy as np
import pytest
import torch

from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.errors import NonFiniteError
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.methods import thresholds
from hub_magmax.methods.geometry.gram import Gram
from hub_magmax.methods.selection import algorithm_1, quotas, top_n

NUM_TASKS, NUM_ELEMENTS = 4, 300_001
SHAPE = 491, 611
WANTED = quotas([0.4, 0.3, 0.0, 0.3], NUM_ELEMENTS)
DTYPES = {
    "bfloat16": (torch.bfloat16,) * 5,
    "float16": (torch.float16,) * 5,
    "float32": (torch.float32,) * 5,
    "float64": (torch.float64,) * 5,
    "mixed": (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.bfloat16),
}
RULES = {
    "thresholds": lambda chunks: thresholds.magnitude_thresholds(
        chunks, np.array([[60_000, 3, 9, 2**16], [9, 300_001, 60_000, 0]])
    ).tolist(),
    "algorithm-1": lambda chunks: algorithm_1(chunks, WANTED, CounterGenerator(3, "t")).winners.tolist(),
    "inner products": lambda chunks: Gram(chunks, (NUM_ELEMENTS,)).products().tolist(),
    "products of rows": lambda chunks: Gram(chunks, SHAPE, "row").products().tolist(),
    "products of columns": lambda chunks: Gram(chunks, SHAPE, "column").products().tolist(),
    "top-n": lambda chunks: top_n(chunks, WANTED, CounterGenerator(3, "t")).winners.tolist(),
}


def stored(dtypes, backend, damage=None):
    """Five checkpoints of one tensor; half of what moves stays where it was."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(NUM_ELEMENTS, generator=generator)
    steps = 0.002 * torch.randn((NUM_TASKS, NUM_ELEMENTS), generator=generator)
    steps *= torch.rand((NUM_TASKS, NUM_ELEMENTS), generator=generator) < 0.5
    values = [base, *(base.bfloat16() + steps)]
    if damage is not None:
        values[2][NUM_ELEMENTS // 2] = damage
    pairs = zip(values, dtypes, strict=True)
    base_source, *tasks = [MemorySource.from_tensors({"w": one.to(dtype)}) for one, dtype in pairs]
    return StoredChunks("w", NUM_ELEMENTS, base_source, tuple(tasks), 1 << 16, None, backend)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rules_find_the_same_in_stored_bits(dtypes, rule):
    slow, fast = (RULES[rule](stored(DTYPES[dtypes], backend)) for backend in (Reference(), Compiled()))

    assert slow == fast


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_chunk_that_is_done_takes_no_memory(dtypes):
    chunks = stored(DTYPES[dtypes], Reference()).last_pass()
    gc.disable()  # the interpreter looks for cycles when it likes, in a merge seldom
    try:
        done = weakref.ref(next(chunks))
        assert next(chunks).start > 0
        assert done() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtypes", "damage"),
    [*((dtypes, torch.nan) for dtypes in DTYPES), ("bfloat16", torch.inf), ("bfloat16", -torch.inf)],
)
def test_values_that_are_not_finite_are_named(dtypes, damage, rule):
    with pytest.raises(NonFiniteError, match="element 150,000 is"):
        RULES[rule](stored(DTYPES[dtypes], Compiled(), damage))
