"""Merging while looking: the bytes are those of a second look, whatever samples say and how much is open."""

import gc
import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import CheckpointError, NonFiniteError
from hub_magmax.kernels import ops
from hub_magmax.kernels.compiled import cache, one_pass
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.stored import Stored
from hub_magmax.kernels.structures import Histograms, Undecided
from hub_magmax.merging import bundles, engine
from hub_magmax.merging import one_pass as early
from hub_magmax.merging import rows as filerows
from hub_magmax.merging.chunks import StoredChunks
from hub_magmax.merging.one_pass import OnePassMerge
from hub_magmax.methods import Rule, thresholds
from hub_magmax.methods.rules import chosen_rule
from hub_magmax.methods.selection import assignment
from tests import test_merging
from tests.families import write_checkpoint
from tests.test_merging import hashes

SHAPES = {"wide": (70, 301), "long": (41_003,), "small": (5,)}
METHODS = [
    {"name": "ties", "density": 0.3},
    {"name": "breadcrumbs", "density": 0.3, "outliers": 0.1},
    {"name": "tunable_magmax", "selection": "top-n"},
]
merged = partial(test_merging.merged, backend=Compiled())
PREFERENCE = {"weights": {"a": 0.5, "b": 0.3, "c": 0.2}}


def write(folder, kind, dtype=torch.bfloat16):
    """A base model and three tasks; rows can be unlike, or nearly all magnitudes alike."""
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(("base", "a", "b", "c")):
        tensors = {}
        for title, shape in SHAPES.items():
            base = torch.randn(shape, generator=torch.Generator().manual_seed(7))
            step = 0.1 * torch.randn(shape, generator=generator)
            if kind == "tied":
                step = 0.25 * (step / 0.1).round()
                base = base.round()
            if kind == "small":  # a third of the differences are zero, a fourth have one magnitude
                base, step = (0.02 * base).to(dtype).float(), 1e-3 * step
            if kind == "unlike":
                step *= torch.linspace(0, 4, step.numel()).exp().view(shape)
            tensors[title] = (base + step * (number > 0)).to(dtype)
        write_checkpoint(folder / name, tensors)


@pytest.fixture
def small_samples(monkeypatch):
    """Small tensors are counted, settled and sampled as large ones are, and read in several blocks."""
    monkeypatch.setattr(bundles, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(thresholds, "HELD_NUMBERS", 0)
    monkeypatch.setattr(assignment, "HELD_NUMBERS", 0)
    monkeypatch.setattr(thresholds, "SAMPLE_RUN", 64)
    monkeypatch.setattr(thresholds, "SAMPLE_STRIDE", 300)
    monkeypatch.setattr(assignment, "DIRECT_ELEMENTS", 1000)
    monkeypatch.setattr(assignment, "MIN_SAMPLE", 500)
    monkeypatch.setattr(filerows, "BLOCK_ELEMENTS", 2 * cache.BLOCK)


@pytest.fixture
def finished(monkeypatch):
    """Which tensors were merged early, True or False for each."""
    seen = []
    finish = OnePassMerge.finish

    def noted(self, rule):
        counts = finish(self, rule)
        seen.append(counts is not None)
        return counts

    monkeypatch.setattr(OnePassMerge, "finish", noted)
    return seen


def late(monkeypatch):
    monkeypatch.setattr(OnePassMerge, "chunk", lambda self, chunk: None)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_what_is_open_is_let_go_without_a_look_for_cycles(tmp_path, method):
    write(tmp_path, "normal")
    gc.collect()
    gc.disable()
    try:
        merged(tmp_path, "out", method=method, preference=PREFERENCE, chunk_elements=4096)
        assert not [found for found in gc.get_objects() if type(found) is OnePassMerge]
    finally:
        gc.enable()


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("chunks", [(1000, 0), (4096, 32), (1 << 20, 32)], ids=["written", "held", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "tied", "small", "unlike"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_bytes_are_those_of_a_second_look(tmp_path, finished, monkeypatch, method, kind, dtype, chunks):
    write(tmp_path, kind, dtype)
    monkeypatch.setattr(engine, "OPEN_CHUNKS", 1 << 20)
    chunk_elements, held = chunks
    monkeypatch.setattr(engine, "HELD_CHUNKS", held)
    options = {"method": method, "preference": PREFERENCE, "chunk_elements": chunk_elements}
    found = merged(tmp_path, "early", **options)
    assert finished.count(True) >= 2  # all but the smallest
    late(monkeypatch)
    expected = merged(tmp_path, "late", **options)
    assert found.shards == expected.shards
    assert hashes(tmp_path / "early") == hashes(tmp_path / "late")


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("chunk_elements", [1, 7])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_tiny_chunks_give_the_same_bytes(tmp_path, finished, monkeypatch, method, chunk_elements):
    monkeypatch.setitem(SHAPES, "wide", (20, 61))
    monkeypatch.setitem(SHAPES, "long", (1003,))
    monkeypatch.setattr(engine, "OPEN_CHUNKS", 1 << 20)
    write(tmp_path, "normal")
    options = {"method": method, "preference": PREFERENCE}
    found = merged(tmp_path, "early", chunk_elements=chunk_elements, **options)
    assert any(finished)
    late(monkeypatch)
    assert found.shards == merged(tmp_path, "late", chunk_elements=4096, **options).shards


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_what_leaves_too_much_open_is_looked_at_again(tmp_path, finished, monkeypatch, method):
    write(tmp_path, "normal")
    options = {"method": method, "preference": PREFERENCE, "chunk_elements": 4096}
    expected = merged(tmp_path, "expected", **options)
    assert any(finished)
    finished.clear()
    monkeypatch.setattr(engine, "OPEN_CHUNKS", 0)
    found = merged(tmp_path, "found", **options)
    assert not any(finished)
    assert found.shards == expected.shards


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_sample_that_misleads_changes_nothing(tmp_path, monkeypatch, method):
    """The runs of a sample hold the smallest magnitudes only, and boxes are tiny: both are wrong at first."""
    monkeypatch.setattr(assignment, "DEVIATIONS", 1e-4)
    write(tmp_path, "normal")
    for name in ("a", "b", "c"):
        base, own = (LocalSource(tmp_path / folder) for folder in ("base", name))
        tensors = {}
        for title, shape in SHAPES.items():
            size = int(np.prod(shape))
            before, after = (source.read(title, 0, size) for source in (base, own))
            step = (after.float() - before.float()) * torch.where(torch.arange(size) % 300 < 64, 1e-3, 1.0)
            tensors[title] = (before.float() + step).view(shape)
        write_checkpoint(tmp_path / name, tensors)
    write_checkpoint(
        tmp_path / "base",
        {
            title: base.read(title, 0, int(np.prod(shape))).view(shape).float()
            for title, shape in SHAPES.items()
        },
    )
    monkeypatch.setattr(engine, "OPEN_CHUNKS", 1 << 20)
    seen, chunk = [], OnePassMerge.chunk
    monkeypatch.setattr(OnePassMerge, "chunk", lambda self, of: seen.append(of.start) or chunk(self, of))
    options = {"method": method, "preference": PREFERENCE, "chunk_elements": 4096}
    found = merged(tmp_path, "early", **options)
    assert seen.count(0) > len(SHAPES)  # a tensor was looked at more than once
    late(monkeypatch)
    assert found.shards == merged(tmp_path, "late", **options).shards


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("share", [0.27, 0.28, 0.33])
def test_a_class_of_equals_that_is_guessed_wrong_is_looked_at_again(tmp_path, monkeypatch, share):
    """Three tenths are kept; a sample sees 32 % of the magnitude 2, where elsewhere it is 27, 28 or 33 %."""
    monkeypatch.setattr(engine, "OPEN_CHUNKS", 1)
    for name in ("base", "a", "b", "c"):
        tensors = {}
        for title, shape in SHAPES.items():
            size = int(np.prod(shape))
            rng = np.random.default_rng([ord(name[0]), size])
            is_sampled = np.arange(size) % 300 < 64
            large = np.where(is_sampled, 0.32, share) > rng.permuted(np.linspace(0, 1, size))
            step = np.where(large, 2.0, 1.0) * rng.choice([-1, 1], size) * (name != "base")
            tensors[title] = torch.tensor(4.0 + step).view(shape).bfloat16()
        write_checkpoint(tmp_path / name, tensors)
    seen, chunk = [], OnePassMerge.chunk
    monkeypatch.setattr(OnePassMerge, "chunk", lambda self, of: seen.append(of.start) or chunk(self, of))
    options = {"method": METHODS[0], "preference": PREFERENCE, "chunk_elements": 4096}
    found = merged(tmp_path, "early", **options)
    # One tensor is sampled whole; the guess for both others is that of their samples, and right with 33 %.
    assert seen.count(0) == (3 if share == 0.33 else 5)
    late(monkeypatch)
    assert found.shards == merged(tmp_path, "late", **options).shards


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_progress_counts_every_byte_once(tmp_path, finished, method):
    write(tmp_path, "normal")
    counted = []
    options = {"method": method, "preference": PREFERENCE, "chunk_elements": 4096}
    merged(tmp_path, "out", progress=counted.append, **options)
    assert any(finished)
    assert sum(counted) == 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_values_that_are_not_finite_are_named(tmp_path, method):
    write(tmp_path, "normal")
    source = LocalSource(tmp_path / "b")
    tensors = {title: source.read(title, 0, int(np.prod(shape))).clone() for title, shape in SHAPES.items()}
    tensors["long"][35_001] = torch.nan
    write_checkpoint(tmp_path / "b", {title: one.view(SHAPES[title]) for title, one in tensors.items()})
    with pytest.raises(NonFiniteError, match="element 35,001 is nan"):
        merged(tmp_path, "out", method=method, preference=PREFERENCE, chunk_elements=4096)


@pytest.mark.usefixtures("small_samples")
def test_a_file_that_is_cut_meanwhile_is_named(tmp_path, monkeypatch):
    write(tmp_path, "normal")
    chunk = OnePassMerge.chunk

    def cut(self, stored):
        if stored.start:
            os.truncate(tmp_path / "b" / "model.safetensors", 20_000)
        return chunk(self, stored)

    monkeypatch.setattr(OnePassMerge, "chunk", cut)
    with pytest.raises(CheckpointError, match=r"\./b, model\.safetensors: the file was changed"):
        merged(tmp_path, "out", method=METHODS[0], preference=PREFERENCE, chunk_elements=4096)


class Tensor:
    """Three rows of one tensor in files, and what is written of it."""

    def __init__(self, folder, rows, chunk_elements, held=None):
        for number, row in enumerate(rows):
            write_checkpoint(folder / str(number), {"w": torch.tensor(row, dtype=torch.float32)})
        base, *tasks = (LocalSource(folder / str(number)) for number in range(len(rows)))
        self.written: dict[int, Stored] = {}
        self.early = OnePassMerge(
            len(rows[0]),
            "F32",
            1.0,
            100,
            held,
            self.written.__setitem__,
            lambda start: bytearray(self.written[start].content),
        )
        self.chunks = StoredChunks(
            "w", len(rows[0]), base, tuple(tasks), chunk_elements, None, Compiled(), one_pass=self.early.chunk
        )

    @property
    def values(self):
        return [value for start in sorted(self.written) for value in self.written[start].tensor.tolist()]


def look(share):
    """Merge early by thresholds of 2, with magnitudes from 1 to 3 open."""
    rule = Rule(ops.TIES, per_task=(np.full(2, 2, np.float32), np.full(2, 0.5, np.float32)))
    bounds = np.array(
        [
            [*(one, three, 24), *(one, three)]
            for one, three in [np.array([1, 3], np.float32).view(np.int32)] * 2
        ],
        np.int32,
    )
    for _, chunk in share:
        bins, most = np.zeros(4, np.int64), np.zeros((2, 4), np.int32)
        counted = Histograms(1, bounds, np.array([0, 2, 4]), bins, *most, np.zeros((2, 3), np.int64))
        assert Compiled().histogram(chunk, counted, rule)


@pytest.mark.parametrize("held", [None, np.empty(6, np.uint32)], ids=["written", "held"])
def test_open_elements_wait_for_the_rule(tmp_path, held):
    tensor = Tensor(tmp_path, [[1] * 6, [5, 1, 3, -3, 1.5, 9], [1, 5, 3.5, 1, 1, 1]], 4, held)
    list(tensor.chunks.map(look, is_early=True))
    # Task vectors: 4 0 2 -4 .5 8 and 0 4 2.5 0 0 0; open is the third element alone.
    assert tensor.values == ([5, 5, 3.25, -3, 1, 9] if held is None else [])
    final = Rule(ops.TIES, per_task=(np.full(2, 2.25, np.float32), np.full(2, 0.5, np.float32)))
    assert tensor.early.finish(final) is not None
    assert tensor.values == [5, 5, 3.5, -3, 1, 9]


def test_a_tensor_that_was_not_offered_whole_is_not_finished(tmp_path):
    tensor = Tensor(tmp_path, [[1] * 6, [2] * 6, [3] * 6], 4)
    list(tensor.chunks.map(lambda share: look([next(iter(share))]), is_early=True))
    assert tensor.early.finish(Rule(ops.TIES)) is None


def test_a_rule_that_changed_its_mind_is_not_finished(tmp_path):
    tensor = Tensor(tmp_path, [[1] * 3, [2] * 3, [3] * 3], 4)
    owner = np.array([0, 1, 1], np.uint8)
    rows = np.array([[1.0], [2.0], [3.0]], np.float32).view(np.uint32)
    given = early.digest_of((owner,), np.array([1]))
    merged_chunk = early.MergedChunk(3, np.array([1]), rows, np.array([1, 1]), given)
    tensor.early.note(0, merged_chunk, np.array([2.0, 0.0, 3.0], np.float32).view(np.uint32))
    assert tensor.early.finish(chosen_rule(np.array([0, 1, 0], np.uint8))) is None
    assert tensor.early.finish(chosen_rule(np.array([0, 0, 1], np.uint8))).tolist() == [2, 1]
    assert tensor.values == [2, 2, 3]


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(0, 10**6))
def test_open_columns_are_kept_in_order(size, share, seed):
    rng = np.random.default_rng(seed)
    found = np.flatnonzero(rng.integers(0, 100, size) < share)
    stored = rng.integers(0, 2**16, (3, size + 9), np.uint16)
    places, rows = np.empty(size, np.int64), np.empty((3, size), np.uint16)
    kept = Undecided(*np.zeros((2, 1), np.int64), places, rows)
    half = len(found) // 2
    for some in (found[:half], found[half:]):
        one_pass.keep_undecided(some, 9, 5, stored, kept)
    assert kept.number[0] == len(found)
    assert places[: len(found)].tolist() == (found + 14).tolist()
    assert np.array_equal(rows[:, : len(found)], stored[:, found + 9])
