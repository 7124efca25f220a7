"""Hostile bytes, by chance: every answer is success or a HubMagmaxError, soon, in little memory.

`make torture` runs 20,000 headers, 5,000 indexes and 5,000 recipes; here is a slice of each.
"""

import json
import random
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import hostile, reader_attacks, torture
from hub_magmax.checkpoints.headers import MAX_DIMENSIONS
from hub_magmax.checkpoints.listing import Listing
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.checkpoints.weight_files import read_index
from hub_magmax.errors import CheckpointError, HubMagmaxError

SLICES = {"headers": 1500, "indexes": 500, "recipes": 120}


@pytest.mark.parametrize("part", SLICES)
def test_mutated_input_is_read_or_refused(part):
    found = torture.READERS[part](SLICES[part], seed=1)
    assert found.failures == []
    assert set(found.outcomes) == {"accepted", "refused"}
    assert found.slowest_seconds < 10
    assert found.memory_growth_bytes < reader_attacks.MEMORY_BYTES


def read_or_refused(files: dict[str, bytes]) -> None:
    try:
        hostile.read_all(files)
    except HubMagmaxError as error:
        assert len(str(error)) < 3000
        assert str(error).isprintable()


slices = settings(max_examples=150, derandomize=True, deadline=None, database=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(("a", "dtype", "shape", "data_offsets", "__metadata__")), inner)
    ),
    max_leaves=12,
)


@slices
@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(content):
    read_or_refused({"model.safetensors": content})


@slices
@given(json_values, st.binary(max_size=32))
def test_any_header_is_read_or_refused(header, data):
    text = json.dumps(header).encode()
    read_or_refused({"model.safetensors": struct.pack("<Q", len(text)) + text + data})


@slices
@given(st.dictionaries(st.text(max_size=8), json_values, max_size=3))
def test_any_index_is_read_or_refused(weight_map):
    files = {"x.safetensors": hostile.safetensors_bytes(hostile.tensors(1, 1))}
    index = json.dumps({"weight_map": weight_map}).encode()
    read_or_refused(files | {"model.safetensors.index.json": index})


@slices
@given(st.randoms(use_true_random=False))
def test_any_mutation_is_read_or_refused(generator):
    read_or_refused({"model.safetensors": hostile.mutated_weights(generator)})


@settings(slices, max_examples=100)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@,? \n\t01.\\~", max_size=60))
def test_any_text_is_a_recipe_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        try:
            hostile.load(text.encode(), Path(folder))
        except HubMagmaxError as error:
            assert len(str(error)) < 3000


def test_shape_that_claims_more_than_there_is_allocates_nothing():
    asked = []

    def read_bytes(path: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return content[start:stop]

    entry = {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4 * 10**18]}
    text = json.dumps({"w": entry}).encode()
    content = struct.pack("<Q", len(text)) + text
    with pytest.raises(CheckpointError, match="truncated"):
        read_index(Listing("model", {"model.safetensors": len(content)}, read_bytes))
    assert sum(asked) == len(content)


def test_header_length_beyond_the_file_is_never_asked_for():
    with pytest.raises(CheckpointError, match="header is said to be"):
        _ = MemorySource({"model.safetensors": struct.pack("<Q", 2**63) + bytes(100)}, "model").index


def test_index_larger_than_any_is_refused_unread():
    def read_bytes(path: str, start: int, stop: int) -> bytes:
        raise AssertionError("nothing is read")

    with pytest.raises(CheckpointError, match="bytes long"):
        read_index(Listing("model", {"model.safetensors.index.json": 10**12}, read_bytes))


@pytest.mark.parametrize("num_dimensions", [MAX_DIMENSIONS, MAX_DIMENSIONS + 1])
def test_more_dimensions_than_torch_has_are_refused(num_dimensions):
    entry = {"dtype": "F32", "shape": [1] * num_dimensions, "data_offsets": [0, 4]}
    text = json.dumps({"w": entry}).encode()
    source = MemorySource({"model.safetensors": struct.pack("<Q", len(text)) + text + bytes(4)}, "model")
    if num_dimensions <= MAX_DIMENSIONS:
        assert source.index.tensors["w"].num_bytes == 4
    else:
        with pytest.raises(CheckpointError, match="larger than any tensor"):
            _ = source.index


@pytest.mark.timeout(60)
def test_large_hostile_headers_are_answered_soon():
    number = str(2**62)
    names = ", ".join(f'"x{i}": 1' for i in range(100_000))
    shape = ", ".join([number] * 100_000)
    for text in (
        "{" + names + ', "x99999": 1}',
        f'{{"w": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}',
        '{"' + "n" * 1_000_000 + '": {"dtype": "F7", "shape": [], "data_offsets": [0, 4]}}',
    ):
        content = struct.pack("<Q", len(text)) + text.encode() + bytes(4)
        with pytest.raises(CheckpointError) as caught:
            _ = MemorySource({"model.safetensors": content}, "model").index
        assert len(str(caught.value)) < 1000


def test_card_of_a_source_cannot_explode(tmp_path):
    from hub_magmax.checkpoints.pinning import card_facts

    levels = [f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 9)}]}}" for n in range(1, 40)]
    card = "---\nl0: &l0 {license: mit}\n" + "\n".join(levels) + "\nlicense: apache-2.0\n---\n"
    assert card_facts(MemorySource({"README.md": card.encode()}, "model"))["license"] == "apache-2.0"
    for value in ("!!int ''", "!!bool maybe", "!!timestamp x", "[a", "null", ""):
        source = MemorySource({"README.md": f"---\nlicense: {value}\n---\n".encode()}, "model")
        assert card_facts(source)["license"] in (None, "maybe", "x")


def test_same_seed_makes_the_same_case():
    assert hostile.mutated_weights(random.Random("1/2")) == hostile.mutated_weights(random.Random("1/2"))
    assert hostile.recipe_text(random.Random("1/2")) == hostile.recipe_text(random.Random("1/2"))
