"""Compiled loops outlast the process: kept on disk, checked, and called without their compiler."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hub_magmax.kernels.compiled import cache

KEYS = np.array([2**63], dtype=np.uint64)
NAMES = np.array([3, 5], dtype=np.uint8)
TABLE = np.full(1 << cache.MIX_BITS, 255, dtype=np.uint8)


def load(source):
    """Load the module of the cache again, as it is in a copy of the compiled loops."""
    spec = importlib.util.spec_from_file_location("copied_cache", source / "cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    """A copy of the compiled loops, beside which nothing is kept yet."""
    original = Path(cache.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(original, tmp_path / "kernels" / "compiled", ignore=ignored)
    shutil.copy(original.with_name("structures.py"), tmp_path / "kernels")
    return copy


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


def test_what_was_compiled_is_kept_and_used_again(source, monkeypatch):
    copied = load(source)
    loop = copied.Loop("mix")
    assert not loop.is_kept()
    found = mixed(loop)
    assert set(found) == {3, 5} and loop.is_kept() and not copied.Loop("rank").is_kept()
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it fails
    assert mixed(copied.Loop("mix")) == mixed(load(source).Loop("mix")) == found


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: b"", lambda c: c[:-1] + b"?"])
def test_damaged_code_is_compiled_again(source, damage):
    copied = load(source)
    found = mixed(copied.Loop("mix"))
    (file,) = source.glob("__pycache__/*.o")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert mixed(copied.Loop("mix")) == found
    assert len(file.read_bytes()) == len(content)


def test_without_a_place_to_keep_it_code_is_compiled_all_the_same(source, monkeypatch):
    copied = load(source)
    shutil.rmtree(source / "__pycache__", ignore_errors=True)
    (source / "__pycache__").touch()  # no folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(source / "__pycache__"))
    loop = copied.Loop("mix")
    assert set(mixed(loop)) == {3, 5} and not loop.is_kept()


def test_where_the_source_cannot_be_written_code_is_kept_in_the_users_cache(source, tmp_path, monkeypatch):
    copied = load(source)
    shutil.rmtree(source / "__pycache__", ignore_errors=True)
    (source / "__pycache__").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    loop = copied.Loop("mix")
    mixed(loop)
    assert loop.is_kept() and [*tmp_path.glob("home/hub_magmax/*.o")]


def test_code_of_another_source_is_not_used(source):
    loop = load(source).Loop("mix")
    mixed(loop)
    assert loop.is_kept()
    with (source / "random.py").open("a") as file:
        file.write("# changed\n")
    assert not load(source).Loop("mix").is_kept()


def test_arrays_with_gaps_are_refused():
    with pytest.raises(AssertionError):
        cache.mix(0, np.uint64(1), np.uint64(2), KEYS, NAMES, np.empty(20, np.uint8)[::2], np.empty(2048))


def test_another_way_of_passing_arguments_is_noticed(source, monkeypatch):
    import numba  # here, because the last test loads this module without it

    from_dtype = numba.from_dtype

    def narrower(dtype):
        return numba.uint32 if dtype == np.uint64 else from_dtype(dtype)

    monkeypatch.setattr(numba, "from_dtype", narrower)
    with pytest.raises(AssertionError, match="numba passes"):
        mixed(load(source).Loop("mix"))


def test_kept_code_runs_without_its_compiler():
    mixed(cache.mix)  # kept from here on
    program = (
        "import sys; from tests.test_loops import mixed, cache\n"
        "mixed(cache.mix); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
