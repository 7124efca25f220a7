import hashlib
from threading import Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_magmax.checkpoints.storage.readahead import ReadAhead, Segment, Wanted, segments
from hub_magmax.errors import DamagedError

CONTENT = bytes(number * 7 % 251 for number in range(1000))
HEADER = 100


class Server:
    """Serves ranges of `CONTENT`, and notes them."""

    def __init__(self, content=CONTENT):
        self.content, self.asked, self._lock = content, [], Lock()

    def fetch(self, path, start, buffer):
        with self._lock:
            self.asked.append((path, start, start + len(buffer)))
        buffer[:] = self.content[start : start + len(buffer)]


def wanted():
    digest = hashlib.sha256(CONTENT).hexdigest()
    return {"file": Wanted(digest, hashlib.sha256(CONTENT[:HEADER]), HEADER, len(CONTENT))}


def read(ahead, start, stop, path="file"):
    buffer = bytearray(stop - start)
    assert ahead.read_into(path, start, memoryview(buffer))
    return bytes(buffer)


def test_neighbours_become_one_range_and_large_ranges_are_cut():
    parts = [Segment("a", 0, 3), Segment("a", 3, 5), Segment("a", 9, 10), Segment("b", 10, 17)]
    found = [(s.path, s.start, s.stop) for s in segments(parts, 4)]
    assert found == [("a", 0, 4), ("a", 4, 5), ("a", 9, 10), ("b", 10, 14), ("b", 14, 17)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_segments_hold_every_byte_that_is_asked_for_as_often_as_it_is(parts):
    ranges = [Segment(path, start, start + length) for path, start, length in parts]

    def listed(found):
        return [(s.path, byte) for s in found for byte in range(s.start, s.stop)]

    assert listed(segments(ranges, 5)) == listed(ranges)
    assert all(0 < s.stop - s.start <= 5 for s in segments(ranges, 5))


def test_every_byte_is_fetched_once_and_arrives():
    server = Server()
    ahead = ReadAhead([Segment("file", HEADER, 1000)], server.fetch, wanted(), 256, "me/model", (64, 64))
    found = b"".join(read(ahead, start, start + 90) for start in range(HEADER, 1000, 90))
    assert found == CONTENT[HEADER:]
    assert sorted(server.asked) == [("file", s, min(s + 64, 1000)) for s in range(HEADER, 1000, 64)]
    ahead.close()


def test_what_was_not_released_can_be_read_again_without_a_request():
    server = Server()
    ahead = ReadAhead([Segment("file", HEADER, 1000)], server.fetch, wanted(), 256, "me/model", (64, 64))
    first = read(ahead, HEADER, 1000)
    num_asked = len(server.asked)
    assert read(ahead, HEADER, 1000) == first
    assert len(server.asked) == num_asked
    ahead.close()


def test_no_more_is_held_than_the_budget_and_what_is_not_released():
    server = Server()
    ahead = ReadAhead([Segment("file", 0, 1000)], server.fetch, {}, 200, "me/model", (50, 50))
    for start in range(0, 1000, 50):
        read(ahead, start, start + 50)
        ahead.release("file", start + 50)
        assert len(server.asked) <= start // 50 + 4  # four requests of 50 bytes, one of them read
    ahead.close()


def test_what_is_skipped_is_not_fetched():
    server = Server()
    ahead = ReadAhead([Segment("file", 0, 1000)], server.fetch, {}, 100, "me/model", (50, 50))
    read(ahead, 0, 50)
    ahead.release("file", 900)
    read(ahead, 900, 1000)
    ahead.close()
    assert sorted(start for _, start, _ in server.asked) == [0, 50, 900, 950]


def test_tensors_in_another_order_than_the_files_are_fetched_once():
    server = Server()
    tensors = [(100, 200), (0, 100), (300, 400), (200, 300)]
    ahead = ReadAhead(
        [Segment("file", *tensor) for tensor in tensors], server.fetch, {}, 150, "me/model", (50, 50)
    )
    for start, stop in tensors:
        ahead.reach("file", start)
        assert ahead.read_into("file", start, memoryview(bytearray(stop - start)))
        ahead.release("file", stop)
    ahead.close()
    assert sorted(start for _, start, _ in server.asked) == list(range(0, 400, 50))
    assert not any(ahead.read_into("file", start, memoryview(bytearray(1))) for start in range(400))


def test_bytes_that_nobody_expected_are_not_there():
    server = Server()
    ahead = ReadAhead([Segment("file", 200, 300)], server.fetch, {}, 100, "me/model")
    assert not ahead.read_into("file", 100, memoryview(bytearray(10)))
    assert not ahead.read_into("other", 200, memoryview(bytearray(10)))
    ahead.close()


def test_flipped_byte_is_found_when_the_file_has_been_read():
    damaged = bytearray(CONTENT)
    damaged[500] ^= 1
    ahead = ReadAhead([Segment("file", HEADER, 1000)], Server(damaged).fetch, wanted(), 256, "me/model")
    read(ahead, HEADER, 1000)
    with pytest.raises(DamagedError, match=r"me/model, file: sha256 of what was received"):
        ahead.release("file", 1000)
    ahead.close()


@pytest.mark.parametrize(
    "ranges",
    [
        [Segment("file", HEADER, 400), Segment("file", 500, 1000)],
        [Segment("file", 500, 1000), Segment("file", HEADER, 500)],
    ],
    ids=["with a hole", "out of order"],
)
def test_file_that_is_not_read_whole_and_in_order_is_not_hashed(ranges):
    damaged = bytes(1000)
    ahead = ReadAhead(ranges, Server(damaged).fetch, wanted(), 256, "me/model")
    for part in ranges:
        read(ahead, part.start, part.stop)
        ahead.release("file", part.stop)
    ahead.close()
