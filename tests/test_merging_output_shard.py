"""One file of the output: written in any order, read back in its own."""

import hashlib
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.errors import OutputError
from hub_magmax.merging.making import starting_order
from hub_magmax.merging.output import shard
from hub_magmax.merging.output.shard import ShardFile


def small_file(path):
    return ShardFile(path, read_bytes=4, hashed_bytes=3)


@given(data=st.data(), content=st.binary(min_size=1, max_size=60))
def test_sha256_is_the_file_s_in_whatever_order_pieces_are_written_and_read_back(
    tmp_path_factory, data, content
):
    bounds = sorted({0, len(content), *data.draw(st.sets(st.integers(1, len(content)), max_size=8))})
    pieces = data.draw(st.permutations([*pairwise(bounds)]))
    is_read_back = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    file = small_file(path)
    for number, (start, stop) in enumerate(pieces, start=1):
        file.write(bytes(stop - start), start)  # a piece may be written again
        file.write(content[start:stop], start)
        if is_read_back[number - 1]:
            file.read_back(min((start for start, _ in pieces[number:]), default=len(content)))
    assert file.finish() == hashlib.sha256(content).hexdigest() and path.read_bytes() == content


@pytest.mark.parametrize("damage", [b"x", b""])
def test_lost_bytes_are_noticed_before_the_file_is_whole(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    file = small_file(path)
    file.write(b"0123456789", 0)
    (tmp_path / "model.safetensors.tmp").write_bytes(damage)
    with pytest.raises(OutputError, match="bytes 0 to 10 are not what was written"):
        file.read_back(10)
    file.abandon()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("seconds_per_byte", "is_slow"), [(2e-10, False), (2.4e-9, True)])
def test_what_is_stored_is_let_go_of_only_where_new_memory_is_slow(
    tmp_path, monkeypatch, seconds_per_byte, is_slow
):
    asked, time = [], iter([0.0, 8 * seconds_per_byte, 1.0, 1.0 + 2 * seconds_per_byte])
    monkeypatch.setattr(shard.time, "thread_time", lambda: next(time))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    file = small_file(tmp_path / "model.safetensors")
    file.write(b"01234567", 0)
    file.read_back(8)
    file.write(b"89", 8)
    file.read_back(10)  # so little is left for the end
    assert file.finish() == hashlib.sha256(b"0123456789").hexdigest()
    assert asked == ([(0, 8, 4), (0, 10, 4)] if is_slow else [])


def test_slow_memory_of_one_file_says_nothing_about_another(tmp_path, monkeypatch):
    asked, time = [], iter([0.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(shard.time, "thread_time", lambda: next(time))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    slow, quick = small_file(tmp_path / "slow"), small_file(tmp_path / "quick")
    slow.write(b"0123", 0)
    quick.write(b"01234567", 0)
    quick.finish()
    assert asked == []
    slow.finish()
    assert asked == [(0, 4, 4)]


def test_advice_that_the_file_system_does_not_take_is_no_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("not here")

    time = iter([0.0, 1.0])
    monkeypatch.setattr(shard.time, "thread_time", lambda: next(time))
    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    file = small_file(tmp_path / "model.safetensors")
    file.write(b"0123", 0)
    assert file.finish() == hashlib.sha256(b"0123").hexdigest()


def test_large_tensors_are_begun_first_and_the_others_as_they_lie_in_the_file():
    sizes = [3, 900, 3, 2, 5, 1000, 4]
    jobs = [SimpleNamespace(name=place, num_elements=size) for place, size in enumerate(sizes)]
    found = starting_order(jobs, in_order=False)
    assert [job.name for job in found] == [5, 1, 0, 2, 3, 4, 6]
    assert starting_order(jobs, in_order=True) is jobs
