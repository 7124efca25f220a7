"""Seconds by kind of work: nested work counts once, and threads add up."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hub_magmax.merging import profile
from hub_magmax.merging.profile import Clock


@pytest.fixture
def tick(monkeypatch):
    """Time that passes when told to."""
    now = [100.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_work_inside_other_work_counts_for_itself_alone(tick):
    found = Clock()
    tick(5)  # nobody's
    with found.spend("compute"):
        tick(1)
        with found.spend("read"):
            tick(2)
        tick(4)
        with found.spend("read"):
            tick(8)
    tick(16)
    assert found.seconds == {"compute": 5.0, "read": 10.0}


def test_what_was_told_apart_afterwards_counts_for_itself_alone(tick):
    found = Clock()
    with found.spend("compute"):
        tick(5)
        found.count("read", 2)
    found.count("wait", 1)
    assert found.seconds == {"compute": 3.0, "read": 2.0, "wait": 1.0}


def test_what_fails_counts_too(tick):
    found = Clock()
    with pytest.raises(KeyError), found.spend("write"):
        tick(3)
        raise KeyError
    assert found.seconds == {"write": 3.0}


def test_threads_add_up():
    found = Clock()

    def work(_):
        for _ in range(100):
            with found.spend("compute"):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(found.seconds) == ["compute"] and found.seconds["compute"] >= 0
