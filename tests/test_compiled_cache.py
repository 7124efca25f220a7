"""Compiled loops outlast the process: kept on disk, checked, and called without their compiler."""

import logging
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from hub_magmax.kernels import ops
from hub_magmax.kernels.compiled import cache
from hub_magmax.kernels.compiled.backend import in_memory, merging_of

KEYS = np.array([2**63], dtype=np.uint64)
NAMES = np.array([3, 5], dtype=np.uint8)
TABLE = np.full(1 << cache.MIX_BITS, 255, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folders", lambda: (tmp_path / "absent" / "cache",))
    return tmp_path / "absent" / "cache"


def mixed(loop):
    owner = np.empty(1000, dtype=np.uint8)
    loop(
        7,
        np.uint64(1),
        np.uint64(2),
        KEYS,
        NAMES,
        TABLE,
        owner,
        np.empty((2, cache.BLOCK + cache.SPARE), np.int64),
    )
    return owner.tolist()


def test_what_was_compiled_is_kept_and_used_again(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="hub_magmax")
    loop = cache.Loop("mix")
    assert not loop.is_kept()
    found = mixed(loop)
    told = "compiling the loop mix, once on this machine\ncompiled the loop mix in [0-9.]+ s"
    assert re.fullmatch(told, "\n".join(caplog.messages))
    assert set(found) == {3, 5} and loop.is_kept() and not cache.Loop("rank").is_kept()
    monkeypatch.setattr(cache, "compile_loop", None)
    assert mixed(cache.Loop("mix")) == found
    assert len(caplog.messages) == 2


def test_of_two_that_need_the_same_loop_one_compiles_it_and_the_other_waits(folder, monkeypatch):
    waits, calls, found = threading.Event(), [], []
    other = threading.Thread(target=lambda: found.append(mixed(cache.Loop("mix"))))
    real = cache.compile_loop

    class Waits(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("waiting for another process"):
                waits.set()

    def compile_loop(name, kinds):
        calls.append(name)
        if len(calls) == 1:
            other.start()
            assert waits.wait(60)
        return real(name, kinds)

    log, handler = logging.getLogger("hub_magmax"), Waits()
    monkeypatch.setattr(cache, "compile_loop", compile_loop)
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.DEBUG)
    try:
        found.append(mixed(cache.Loop("mix")))
        other.join()
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert calls == ["mix"] and found[0] == found[1]
    assert [path.suffix for path in folder.iterdir()] == [".o"]


@pytest.mark.parametrize(("dtype", "told"), [(np.uint16, "16 bits"), (np.uint32, "32 bits")])
def test_forms_of_a_loop_are_told_apart(folder, monkeypatch, caplog, dtype, told):
    caplog.set_level(logging.INFO, logger="hub_magmax")
    monkeypatch.setattr(cache, "compile_loop", lambda name, kinds: pytest.fail("not compiled here"))
    rows = np.zeros((2, cache.BLOCK), dtype)
    merging = merging_of(ops.WEIGHTED_SUM, ops.Inputs(), 1.0, 1, rows[0])
    for per_element, more in ((merging.per_element, ""), (np.zeros((0, 0), np.float32), ", with a factor")):
        caplog.clear()
        with pytest.raises(pytest.fail.Exception):
            cache.Loop("merge_chunk")(in_memory(rows), merging._replace(per_element=per_element))
        assert caplog.messages[0].startswith(f"compiling the loop merge_chunk for numbers of {told}{more}")


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: b"", lambda c: c[:-1] + b"?"])
def test_damaged_code_is_compiled_again(folder, damage):
    found = mixed(cache.Loop("mix"))
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert mixed(cache.Loop("mix")) == found
    assert len(file.read_bytes()) == len(content)


def test_without_a_place_to_keep_it_code_is_compiled_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "folders", lambda: (tmp_path / "file" / "cache",))
    assert set(mixed(cache.Loop("mix"))) == {3, 5}


def test_code_of_another_source_is_not_used(folder, monkeypatch):
    loop = cache.Loop("mix")
    mixed(loop)
    monkeypatch.setattr(cache, "fingerprint", lambda: "another")
    assert not loop.is_kept()


def test_arrays_with_gaps_are_refused():
    with pytest.raises(AssertionError):
        cache.mix(0, np.uint64(1), np.uint64(2), KEYS, NAMES, np.empty(20, np.uint8)[::2], np.empty(2048))


def test_another_way_of_passing_arguments_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(cache, "ARRAY_ARGUMENTS", cache.ARRAY_ARGUMENTS[1:])
    with pytest.raises(AssertionError, match="numba passes"):
        mixed(cache.Loop("mix"))


def test_kept_code_runs_without_its_compiler():
    mixed(cache.mix)  # kept from here on
    program = (
        "import sys; from tests.test_compiled_cache import mixed, cache\n"
        "mixed(cache.mix); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
