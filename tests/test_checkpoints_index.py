import json
import os
import struct
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hub_magmax.checkpoints.index import CheckpointIndex
from hub_magmax.checkpoints.listing import Listing
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.checkpoints.weight_files import read_index
from hub_magmax.errors import CheckpointError, HubMagmaxError, SourceError
from tests.families import make_tensors, write_checkpoint


def shard(entries: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def index_of(files: dict[str, bytes]) -> CheckpointIndex:
    return MemorySource(files, "model").index


def entry(
    dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry(), "b": entry(offsets=(8, 16))}


def test_index_agrees_with_what_safetensors_wrote(tmp_path):
    tensors = make_tensors(0)
    for num_shards in (1, 3):
        folder = write_checkpoint(tmp_path / str(num_shards), tensors, num_shards=num_shards)
        source = LocalSource(folder)
        assert {name: info.shape for name, info in source.index.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            assert source.read(name, 0, tensor.numel()).equal(tensor.reshape(-1))
        assert len(source.index.shards) == num_shards
        source.close()


def test_tensors_come_in_file_and_offset_order():
    index = index_of({"model.safetensors": shard({"z": entry(), "a": entry(offsets=(8, 16))}, bytes(16))})
    assert list(index.tensors) == ["z", "a"]


def test_metadata_is_not_a_tensor():
    index = index_of({"model.safetensors": shard({"__metadata__": {"format": "pt"}, **GOOD}, bytes(16))})
    assert list(index.tensors) == ["a", "b"]


BAD_FILES = {
    "empty file": (b"", "0 bytes"),
    "length beyond the file": (shard(GOOD, bytes(16), length=10**9), "header is said to be"),
    "length of zero": (shard(b"", length=0), "header is said to be"),
    "header is not JSON": (shard(b"{not json}"), "not readable as JSON"),
    "header is not UTF-8": (shard(b'{"\xff": 1}'), "not readable as JSON"),
    "header is a list": (shard([1, 2]), "not a JSON object"),
    "name appears twice": (shard(b'{"a": {}, "a": {}}'), "appears twice"),
    "entry is not an object": (shard({"a": 5}), "lacks dtype"),
    "entry without offsets": (shard({"a": {"dtype": "F32", "shape": [1]}}), "lacks dtype"),
    "unknown dtype": (shard({"a": entry("F7")}, bytes(8)), "dtype 'F7'"),
    "negative shape": (shard({"a": entry(shape=(-2,))}, bytes(8)), "not whole numbers"),
    "fractional shape": (shard({"a": entry(shape=(2.0,))}, bytes(8)), "not whole numbers"),  # type: ignore[arg-type]
    "boolean offset": (shard({"a": entry(shape=(0,), offsets=(False, 0))}), "not whole numbers"),
    "offsets and shape disagree": (shard({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes"),
    "tensors overlap": (shard({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "hole between tensors": (shard({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
    "truncated data": (shard(GOOD, bytes(12)), "truncated"),
    "surplus data": (shard(GOOD, bytes(20)), "belong to no tensor"),
    "nested too deeply": (shard(b"[" * 100_000), "not readable as JSON"),
    "no tensors": (shard({}), "no tensors"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_file_is_refused_with_its_reason(case):
    content, reason = BAD_FILES[case]
    with pytest.raises(CheckpointError) as caught:
        index_of({"model.safetensors": content})
    assert reason in str(caught.value)
    assert "model" in caught.value.where


def sharded(weight_map: object, **files: bytes) -> dict[str, bytes]:
    return {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()} | {
        f"{name}.safetensors": content for name, content in files.items()
    }


ONE = shard({"a": entry()}, bytes(8))
BAD_LAYOUTS = {
    "no weights": ({"config.json": b"{}"}, "no safetensors file"),
    "pickle only": ({"pytorch_model.bin": b""}, "never loaded"),
    "several files without index": ({"x.safetensors": ONE, "y.safetensors": ONE}, "several weight files"),
    "index names a missing shard": (
        sharded({"a": "gone.safetensors"}),
        "'gone.safetensors', which is not there",
    ),
    "index points outside": (sharded({"a": "../x.safetensors"}, x=ONE), "which is not there"),
    "index lists a tensor that is not there": (
        sharded({"a": "x.safetensors", "b": "x.safetensors"}, x=ONE),
        "lacks 'b'",
    ),
    "file holds a tensor the index does not list": (sharded({"b": "x.safetensors"}, x=ONE), "also holds 'a'"),
    "index without weight_map": ({"model.safetensors.index.json": b"{}"}, "no `weight_map`"),
    "index with wrong types": (sharded({"a": 1}), "no `weight_map`"),
    "index is empty": (sharded({}), "no `weight_map`"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_malformed_layout_is_refused_with_its_reason(case):
    files, reason = BAD_LAYOUTS[case]
    with pytest.raises(CheckpointError, match=None) as caught:
        index_of(files)
    assert reason in str(caught.value)


@given(st.data())
def test_any_mutation_of_a_header_is_read_or_refused(data):
    content = bytearray(shard({"__metadata__": {"k": "v"}, **GOOD}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = index_of({"model.safetensors": bytes(content)})
    except HubMagmaxError:
        return
    bounds = [(info.start_byte, info.stop_byte) for info in index.tensors.values()]
    assert bounds == sorted(bounds)
    assert bounds[-1][1] == len(content)


def test_header_hash_changes_with_the_header_only():
    first = index_of({"model.safetensors": shard(GOOD, bytes(16))}).shards[0]
    other_data = index_of({"model.safetensors": shard(GOOD, bytes([1] * 16))}).shards[0]
    renamed = index_of(
        {"model.safetensors": shard({"c": entry(), "b": entry(offsets=(8, 16))}, bytes(16))}
    ).shards[0]
    assert first.header_sha256 == other_data.header_sha256 != renamed.header_sha256


def test_reading_an_index_reads_headers_only():
    content = {"model.safetensors": shard(GOOD, bytes(16))}
    ranges = []

    def read_bytes(path: str, start: int, stop: int) -> bytes:
        ranges.append((start, stop))
        return content[path][start:stop]

    read_index(Listing("model", {path: len(data) for path, data in content.items()}, read_bytes))
    assert max(stop for _, stop in ranges) == len(content["model.safetensors"]) - 16


def test_what_is_read_next_is_told_to_the_system(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(5_000_000), "b": torch.zeros(1_000_000)}, tmp_path / "model.safetensors")
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, what: advice.append((start, length)))

    def told() -> int:
        return sum(length for _, length in advice)

    with closing(LocalSource(tmp_path, is_cached=lambda descriptor, place: False)) as source:
        first, second = (source.index.tensors[name].start_byte for name in "ab")
        source.expect(["b", "a"], 16_000_000, in_part=True)
        assert not advice
        source.expect(["b", "a"], 16_000_000)
        assert [start for start, _ in advice[:3]] == [second, second + 2**21, first]
        assert 16_000_000 <= told() < 16_000_000 + 2**21
        for stop in (500_000, 500_000, 1_000_000):
            source.release("b", stop)
        assert told() < 16_000_000 + 2**21  # of what little room there is, some more is waited for
        source.release("a", 500_000)
        source.release("a", 1_000_000)
        assert told() < 16_000_000 + 2**21
        source.release("a", 1_250_000)  # 9 MB were read, and half of the budget is free
        assert told() == 24_000_000
    assert advice == sorted(advice[:2]) + sorted(advice[2:])


def test_file_that_is_gone_is_an_error_when_it_is_read(tmp_path):
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    with closing(LocalSource(tmp_path)) as source:
        source.index  # noqa: B018
        source.close()
        (tmp_path / "model.safetensors").unlink()
        source.expect(["a"], 1000)
        with pytest.raises(SourceError, match="cannot be read"):
            source.read("a", 0, 10)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_link_to_a_file_that_is_not_there_is_told(tmp_path, file):
    """A snapshot of the Hub's cache that was copied without its blobs."""
    write_checkpoint(tmp_path, make_tensors(0))
    (tmp_path / ".#notes").symlink_to("someone@host:1")  # a lock of an editor
    with closing(LocalSource(tmp_path)) as source:
        assert "model.safetensors" in source.sizes
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).symlink_to("../../blobs/0123")
    with (
        closing(LocalSource(tmp_path)) as source,
        pytest.raises(SourceError, match="a file that is not there"),
    ):
        _ = source.sizes
