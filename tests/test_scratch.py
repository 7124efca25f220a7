import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hub_magmax.kernels.arrays import IN_MEMORY, Scratch
from hub_magmax.kernels.compiled.backend import Compiled
from hub_magmax.kernels.randomness import CounterGenerator
from hub_magmax.kernels.reference import Reference
from hub_magmax.methods.chunks import ArrayChunks
from hub_magmax.methods.selection import algorithm_1, quotas, top_n


def test_large_arrays_lie_in_a_file_that_leaves_nothing(tmp_path):
    scratch = Scratch(tmp_path, in_memory_bytes=100)
    array = scratch.zeros(1000, np.uint16)
    assert array.dtype == np.uint16 and not array.any()
    assert list(tmp_path.iterdir()) == []
    array[999] = 7
    assert array.sum() == 7
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path) in maps.read_text(encoding="utf-8")
    assert isinstance(IN_MEMORY.zeros(1000, np.uint16), np.ndarray)


def test_no_room_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    def full(descriptor: int, start: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Scratch(tmp_path, 10).zeros(11, np.uint8)


def test_zeros_are_written_where_room_cannot_be_taken_otherwise(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    array = Scratch(tmp_path, 0).zeros(2**20 + 3, np.uint8)
    assert len(array) == 2**20 + 3 and not array.any()


@pytest.mark.parametrize("backend", [Reference(), Compiled()], ids=["reference", "compiled"])
@pytest.mark.parametrize("rule", [algorithm_1, top_n])
def test_where_arrays_lie_changes_nothing(tmp_path, rule, backend):
    vectors = torch.randn(4, 90_000, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    wanted = quotas((0.1, 0.2, 0.3, 0.4), 90_000)
    found = [
        rule(ArrayChunks(vectors, 4096, backend, scratch), wanted, CounterGenerator(1, "w")).winners
        for scratch in (IN_MEMORY, Scratch(tmp_path, 1000))
    ]
    assert found[0].equal(found[1])
