"""Rows of one tensor in several files, read by compiled loops: the values, and what goes wrong meanwhile."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import CheckpointError, NonFiniteError
from hub_magmax.kernels import ops, reference
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.merging import rows as filerows
from hub_magmax.merging.chunk_memory import ChunkMemory
from hub_magmax.merging.chunks import JoinedChunks, StoredChunks
from hub_magmax.merging.combine import merged_chunks
from hub_magmax.merging.profile import Clock
from hub_magmax.merging.rows import FileRows
from hub_magmax.merging.tensors import tensor_rule
from hub_magmax.methods import Rule, thresholds
from hub_magmax.methods.chunks import places_in_runs
from hub_magmax.methods.selection import assignment, top_n
from tests.families import make_tensors, write_checkpoint

NUM_ELEMENTS = 5000
RULE = Rule(ops.WEIGHTED_SUM, per_task=(torch.tensor([0.5, 0.25]),))


def write(folder, dtype=torch.bfloat16):
    """A base model and two tasks, whose headers are of different lengths."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((3, NUM_ELEMENTS), generator=generator).to(dtype)
    for number, row in enumerate(values):
        write_checkpoint(folder / str(number), {"w": row, "x" * (number + 1): torch.arange(number)})
    return values


def sources(folder):
    return [LocalSource(folder / str(number)) for number in range(3)]


def chunks(found, chunk_elements=1000, clock=None, memory=None):
    base, *tasks = found
    own = clock or Clock()
    return StoredChunks("w", NUM_ELEMENTS, base, tuple(tasks), chunk_elements, None, Compiled(), memory, own)


def merged(found):
    assert all(chunk.files is not None for chunk in found.last_pass())
    return torch.cat([one.values.tensor for _, one in merged_chunks(found, RULE, "BF16", 1.0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def values(folder):
    return write(folder)


@given(st.sets(st.integers(0, NUM_ELEMENTS), min_size=2, max_size=20).map(sorted))
def test_parts_of_any_lengths_are_read(folder, values, bounds):
    found = FileRows.find(sources(folder), "w", Clock(), None)
    parts = [*zip(bounds[:-1:2], bounds[1::2], strict=False)]
    with found.opened():
        rows = found.read(parts)
    assert rows.tensor.equal(torch.cat([values[:, first:stop] for first, stop in parts], dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8])
def test_any_dtype_is_read(tmp_path, dtype):
    values = write(tmp_path, dtype)
    found = FileRows.find(sources(tmp_path), "w", Clock(), None)
    with found.opened():
        assert found.read([(3, 4000)]).tensor.equal(values[:, 3:4000])


@pytest.mark.parametrize("chunk_elements", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("block_elements", [cache.BLOCK, 1 << 16])
def test_merging_from_files_gives_what_merging_values_gives(
    folder, values, chunk_elements, block_elements, monkeypatch
):
    monkeypatch.setattr(filerows, "BLOCK_ELEMENTS", block_elements)
    base, *tasks = values
    update = ops.weighted_sum(ops.task_rows(base, tasks), RULE.per_task[0])
    expected = reference.apply_update(base, update, 1.0, torch.bfloat16)
    found = chunks(sources(folder), chunk_elements, memory=ChunkMemory())
    assert merged(found).equal(expected)


def test_checkpoints_that_are_not_all_in_files_of_one_dtype_have_no_rows(folder, values, tmp_path):
    found = sources(folder)
    assert FileRows.find([*found, MemorySource.from_tensors({"w": values[0]})], "w", Clock(), None) is None
    write_checkpoint(tmp_path / "other", {"w": values[0].float()})
    assert FileRows.find([*found, LocalSource(tmp_path / "other")], "w", Clock(), None) is None


def test_reading_is_told_from_computing(folder, values):
    clock = Clock()
    with clock.spend("compute"):
        merged(chunks(sources(folder), clock=clock))
    assert clock.seconds["read"] > 0 and clock.seconds["compute"] > 0


def run(folder, action):
    """Do something to a file between two chunks of a pass that merges, and of one that reads."""
    for passing in (lambda found: merged_chunks(found, RULE, "BF16", 1.0), iter):
        write(folder)

        def use(passing=passing):
            for start, _ in passing(chunks(sources(folder))):
                if start == 2000:
                    action(folder / "2" / "model.safetensors")

        yield use


def test_file_that_is_cut_meanwhile_is_an_error(tmp_path):
    for use in run(tmp_path, lambda path: os.truncate(path, 4000)):
        with pytest.raises(CheckpointError, match=r"changed or replaced|ends at byte 4,000"):
            use()


def test_file_that_is_written_to_meanwhile_is_an_error(tmp_path):
    def change(path):
        os.utime(path, ns=(0, 0))

    for use in run(tmp_path, change):
        with pytest.raises(CheckpointError, match="changed or replaced"):
            use()


def test_nan_in_a_file_that_was_changed_is_not_told_of(tmp_path):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[-2 * NUM_ELEMENTS :] = b"\xff" * (2 * NUM_ELEMENTS)
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))

    for use in run(tmp_path, damage):
        with pytest.raises(CheckpointError, match="changed or replaced"):
            use()


def test_value_that_is_not_finite_is_named_where_runs_are_read_together(tmp_path):
    values = write(tmp_path)
    values[1, 3210] = torch.inf
    write_checkpoint(tmp_path / "1", {"w": values[1]})
    with pytest.raises(NonFiniteError, match=r"element 3,210 is inf"):
        list(chunks(sources(tmp_path), 4000).runs(100, 200))
    with pytest.raises(NonFiniteError, match=r"element 3,210 is inf"):
        merged(chunks(sources(tmp_path)))


def test_runs_are_read_together(folder, values):
    found = chunks(sources(folder), 450)
    base, *tasks = values[:, places_in_runs(NUM_ELEMENTS, 100, 300)]
    assert found.runs(100, 300).tolist() == ops.task_vectors(base, tasks).tolist()


@pytest.mark.parametrize("chunk_elements", [7, 1000, 1 << 19])
def test_several_tensors_are_read_as_one(tmp_path, chunk_elements):
    """Chunks and runs reach from tensor to tensor, so they begin and end with pieces of any length."""
    shapes = {"a": (900,), "b": (7,), "c": (700,), "d": (30, 61)}
    base = make_tensors(0, shapes=shapes)
    checkpoints = [base, *(make_tensors(seed, base=base, shapes=shapes) for seed in (1, 2))]
    for number, tensors in enumerate(checkpoints):
        write_checkpoint(tmp_path / str(number), tensors)
    expected = torch.stack(
        [torch.cat([(own[name] - base[name]).flatten() for name in shapes]) for own in checkpoints[1:]]
    )
    own, *tasks = sources(tmp_path)
    with ThreadPoolExecutor(1) as reader:
        parts = [
            StoredChunks(name, base[name].numel(), own, tuple(tasks), chunk_elements, reader, Compiled())
            for name in shapes
        ]
        joined = JoinedChunks(tuple(parts), lambda in_part: None)
        assert torch.cat([vectors for _, vectors in joined], dim=1).equal(expected)
        places = places_in_runs(expected.shape[1], 500, 800)
        assert joined.runs(500, 800).tolist() == expected[:, places].tolist()


def joined(folder, shapes, num_threads, *, spoiled=()):
    """Tensors of a base model and two tasks; those named have a NaN in their second half."""
    base = make_tensors(0, shapes=shapes)
    for number in range(3):
        tensors = base if number == 0 else make_tensors(number, base=base, shapes=shapes)
        for name in spoiled if number == 2 else ():
            tensors[name].view(-1)[tensors[name].numel() // 2] = torch.nan
        write_checkpoint(folder / str(number), tensors)
    own, *tasks = sources(folder)
    memory = ChunkMemory()
    parts = [
        StoredChunks(name, base[name].numel(), own, tuple(tasks), 4096, None, Compiled(), memory)
        for name in shapes
    ]
    return JoinedChunks(tuple(parts), lambda in_part: None, num_threads)


SEVERAL = {f"w{number}": (300 + 10 * number, 61) for number in range(16)}
RULES = [
    {"name": "tunable_magmax", "selection": "algorithm-1", "scope": "model", "scaling": 1.0},
    {"name": "tunable_magmax", "selection": "top-n", "scope": "model", "scaling": 1.0},
    {"name": "ties", "density": 0.2, "scope": "model", "scaling": 1.0},
    {"name": "breadcrumbs", "density": 0.5, "outliers": 0.1, "scope": "model", "scaling": 1.0},
]


@pytest.mark.parametrize("method", RULES, ids=lambda method: method.get("selection", method["name"]))
def test_threads_that_share_tensors_find_the_same_rule(tmp_path, method, monkeypatch):
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 0)
    monkeypatch.setattr(assignment, "HELD_NUMBERS", 0)
    found = []
    for num_threads in (1, 3):
        chunks_of_all = joined(tmp_path, SEVERAL, num_threads)
        shape, generator = (chunks_of_all.num_elements,), CounterGenerator(0, "m")
        rule = tensor_rule(chunks_of_all, shape, method, (0.7, 0.3), generator)
        per_element = [values.tolist() for values in rule.per_element(0, *shape)]
        per_task = [values.tolist() for values in rule.per_task]
        found.append((per_element, per_task, rule.num_unaligned, rule.duality_gap))
    assert found[0] == found[1]


def test_every_chunk_has_one_thread(tmp_path):
    chunks_of_all = joined(tmp_path, SEVERAL, 3)
    shares = [
        *chunks_of_all.map(lambda share: [(start, start + chunk.num_elements) for start, chunk in share])
    ]
    assert len(shares) == 3
    assert all(share == sorted(share) for share in shares)
    bounds = sorted(itertools.chain(*shares))
    assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), chunks_of_all.num_elements]


def test_of_several_errors_in_threads_the_first_in_order_is_told(tmp_path):
    for _ in range(10):
        chunks_of_all = joined(tmp_path, SEVERAL, 3, spoiled=("w3", "w4", "w5"))

        def look(share):
            for _, chunk in share:
                owner, codes = np.empty((2, chunk.num_elements), np.uint8)
                wanted = np.ones(2, np.uint8)
                Compiled().rank(chunk, wanted, owner, codes)

        with pytest.raises(NonFiniteError, match="element 10,065 is nan"):
            list(chunks_of_all.map(look))


@pytest.mark.parametrize("backend", [Reference(), Compiled()])
def test_nan_that_no_sample_has_seen_is_named(tmp_path, backend):
    chunks_of_all = joined(tmp_path, {"w": (5000, 61)}, 1, spoiled=("w",))
    found = replace(chunks_of_all.tensors[0], backend=backend)
    wanted = (200_000, 105_000)
    assert np.isfinite(found.runs(64, 64 * found.num_elements // 9000)).all()
    with pytest.raises(NonFiniteError, match="element 152,500 is nan"):
        top_n(found, wanted, CounterGenerator(0, "w"))
