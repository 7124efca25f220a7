"""The benchmarks of merges: that they run, keep what they stored, and write the page that is shipped."""

import sys
from argparse import Namespace

import pytest

from benchmarks import performance, run, timing
from benchmarks.families import SIZES, llama


@pytest.fixture
def tiny(monkeypatch):
    model = llama(vocabulary=50, width=64, layers=1, inner=64, key_width=64)
    monkeypatch.setitem(SIZES, "30m", model)
    return Namespace(size="30m", repeat=1)


def test_the_page_is_that_of_the_stored_results():
    same = performance.PAGE.read_text() == performance.page(performance.load())
    assert same, "write it again: python -m benchmarks.performance"


def test_a_result_replaces_only_the_one_of_its_part_and_size():
    stored = {"methods": {"1b": {"size": "1b"}, "30m": {"size": "30m"}}}
    new = {"size": "30m", "rows": []}
    found = performance.with_result(stored, "methods", new)
    assert found == stored | {"methods": {"1b": {"size": "1b"}, "30m": new}}


@pytest.mark.slow
def test_every_method_is_measured_beside_the_floor(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "METHODS", {"magmax": {"name": "magmax"}})
    result = run.measure(tmp_path, tiny)
    assert [(row["method"], row["runs"]) for row in result["rows"]] == [("magmax", 1)]
    assert "| magmax | 1 |" in performance.page({"methods": {"30m": result}})


def test_memory_is_that_of_the_command_alone():
    held = bytearray(200_000_000)
    small = timing.run([sys.executable, "-c", "pass"])
    large = timing.run([sys.executable, "-c", "print(len(bytearray(100_000_000)))"])
    assert small.peak_memory_bytes < 50_000_000 < len(held)
    assert 100_000_000 < large.peak_memory_bytes < 150_000_000
    assert (small.output, large.output) == ("", "100000000\n")


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        timing.run([sys.executable, "-c", "1 / 0"])
