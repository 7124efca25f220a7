"""Checkpoints read under the base model's names, and as parts of joint tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hub_magmax.checkpoints.index import INDEX_NAME
from hub_magmax.checkpoints.names.renamed import RenamedSource
from hub_magmax.checkpoints.source import MemorySource, tensor_place
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.recipe.renaming import LockedJoint, Renaming
from tests.families import write_checkpoint
from tests.test_checkpoints_renaming import rand

JOINTS: Mapping[str, tuple[LockedJoint, dict[str, Tensor], dict[str, Tensor]]] = {}


def case(name: str, joint: LockedJoint, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    JOINTS[name] = (joint, dict(whole), dict(parts))  # type: ignore[index]


GATES, UPS = ([rand(5, 3, seed=10 * k + e) for e in range(4)] for k in (1, 2))
case(
    "stacked and beside each other",
    LockedJoint("l.#.gate_up", ("l.#.e.*.gate.w", "l.#.e.*.up.w"), 1, is_stacked=True, is_own=True),
    {"l.7.gate_up": torch.stack([torch.cat([g, u]) for g, u in zip(GATES, UPS, strict=True)])},
    {f"l.7.e.{e}.{n}.w": t[e] for e in range(4) for n, t in (("gate", GATES), ("up", UPS))},
)
case(
    "stacked",
    LockedJoint("l.#.down", ("l.#.e.*.w",), 0, is_stacked=True, is_own=True),
    {"l.0.down": torch.stack(GATES)},
    {f"l.0.e.{e}.w": GATES[e] for e in range(4)},
)
case(
    "stacked, and beside each other along the last axis",
    LockedJoint("x.gate_up", ("x.*.gate", "x.*.up"), 2, is_stacked=True, is_own=True),
    {"x.gate_up": torch.stack([torch.cat([g, u], dim=1) for g, u in zip(GATES, UPS, strict=True)])},
    {f"x.{e}.{n}": t[e] for e in range(4) for n, t in (("gate", GATES), ("up", UPS))},
)
QUERY, KEY, VALUE = rand(6, 4, seed=1), rand(2, 4, seed=2), rand(3, 4, seed=3)
case(
    "rows below each other, unequal",
    LockedJoint("qkv", ("q", "k", "v"), 0, is_stacked=False, is_own=True),
    {"qkv": torch.cat([QUERY, KEY, VALUE])},
    {"q": QUERY, "k": KEY, "v": VALUE},
)
case(
    "columns beside each other, unequal",
    LockedJoint("qkv", ("q", "k", "v"), 1, is_stacked=False, is_own=True),
    {"qkv": torch.cat([QUERY.T, KEY.T, VALUE.T], dim=1)},
    {"q": QUERY.T.contiguous(), "k": KEY.T.contiguous(), "v": VALUE.T.contiguous()},
)
case(
    "biases",
    LockedJoint("qkv.bias", ("q.bias", "k.bias"), 0, is_stacked=False, is_own=True),
    {"qkv.bias": torch.arange(5.0)},
    {"q.bias": torch.arange(2.0), "k.bias": torch.arange(2.0, 5.0)},
)


def views(name: str) -> list[tuple[RenamedSource, dict[str, Tensor]]]:
    """Return the whole seen as parts, and the parts seen as a whole, each with the values to be read."""
    joint, whole, parts = JOINTS[name]
    inverse = LockedJoint(joint.whole, joint.parts, joint.axis, joint.is_stacked, is_own=False)
    sources = MemorySource.from_tensors(whole), MemorySource.from_tensors(parts)
    return [
        (RenamedSource(sources[0], Renaming((), (joint,)), sources[1].index), parts),
        (RenamedSource(sources[1], Renaming((), (inverse,)), sources[0].index), whole),
    ]


@pytest.mark.parametrize("name", JOINTS)
def test_joint_tensors_are_read_as_parts_and_parts_as_joint_tensors(name: str) -> None:
    for view, expected in views(name):
        assert view.index.tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            info = view.index.tensors[key]
            assert (info.name, info.shape, info.num_bytes) == (key, tuple(tensor.shape), 4 * tensor.numel())
            assert view.read(key, 0, tensor.numel()).equal(tensor.reshape(-1))


@given(st.data())
@settings(max_examples=200)
def test_any_range_is_read_into_the_memory_that_is_given(data: st.DataObject) -> None:
    view, expected = data.draw(st.sampled_from(views(data.draw(st.sampled_from([*JOINTS])))))
    key = data.draw(st.sampled_from([*expected]))
    flat = expected[key].reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert view.read(key, start, stop).equal(flat[start:stop])
    out = torch.empty(stop - start).view(torch.int32).numpy().view("u4")
    assert view.read_stored(key, start, stop, out).bits is out or stop == start
    view.release(key, stop)


def test_reading_goes_no_further_than_asked() -> None:
    class Counting(MemorySource):
        read_bytes_count = 0

        def read_into(self, path: str, start: int, buffer: memoryview) -> None:
            self.read_bytes_count += len(buffer)
            super().read_into(path, start, buffer)

    joint, whole, parts = JOINTS["stacked and beside each other"]
    source = Counting(MemorySource.from_tensors(whole).files)
    view = RenamedSource(source, Renaming((), (joint,)), MemorySource.from_tensors(parts).index)
    assert len(view.index.tensors) == len(parts)
    source.read_bytes_count = 0
    view.read("l.7.e.3.up.w", 2, 6)
    assert source.read_bytes_count == 4 * 4


def test_renamed_tensors_keep_their_place_in_the_file(tmp_path: Path) -> None:
    tensors = {"model.layers.3.up": rand(4, 3, seed=1), "other": rand(2, seed=2)}
    stored = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    source = LocalSource(write_checkpoint(tmp_path / "one", stored), "./one")
    renaming = Renaming((("_orig_mod.model.layers.#.up", "model.layers.#.up"), ("_orig_mod.other", "other")))
    view = RenamedSource(source, renaming, MemorySource.from_tensors(tensors).index)
    for name, tensor in tensors.items():
        assert view.tensor_file(name).start_byte == source.tensor_file(f"_orig_mod.{name}").start_byte
        assert view.read(name, 0, tensor.numel()).equal(tensor.reshape(-1))
    view.expect(tensors, 1000)
    view.release("other", 2)
    place = tensor_place(view, view.index.tensors["model.layers.3.up"], 0)
    assert place.startswith("./one, model.safetensors, tensor '_orig_mod.model.layers.3.up', byte")
    assert INDEX_NAME not in view.sizes
    view.close()


def test_parts_that_lie_in_one_piece_have_a_place_in_the_file(tmp_path: Path) -> None:
    joint, whole, parts = JOINTS["stacked and beside each other"]
    source = LocalSource(write_checkpoint(tmp_path / "one", whole), "./one")
    view = RenamedSource(source, Renaming((), (joint,)), MemorySource.from_tensors(parts).index)
    content = (tmp_path / "one" / "model.safetensors").read_bytes()
    for name, tensor in parts.items():
        start = view.tensor_file(name).start_byte
        assert content[start : start + 60] == tensor.numpy().tobytes()
        assert view.index.tensors[name].start_byte == start


def test_tensors_that_the_renaming_does_not_name_keep_their_names() -> None:
    source = MemorySource.from_tensors({"a.x": torch.ones(2), "extra": torch.ones(3)})
    base = MemorySource.from_tensors({"x": torch.ones(2)}).index
    view = RenamedSource(source, Renaming((("a.x", "x"),)), base)
    assert view.index.tensors.keys() == {"x", "extra"}
    assert view.read("extra", 0, 3).equal(torch.ones(3))
