"""One pass per chunk: what it counts and notices, and that compiling it changes nothing."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from hub_magmax import compiling, fusing, kernels, selection
from hub_magmax.fusing import FUSED_LEAST_ELEMENTS, Fuser, run_pass
from hub_magmax.passes import Pass

RULES = {
    "weighted sum": (kernels.weighted_sum, False),
    "ties": (kernels.ties_merge, False),
    "magmax": (selection.largest_magnitude, True),
    "given winners": (kernels.given, True),
}


def arguments(rule: str, length: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(length, generator=generator)
    keep = [torch.rand(length, generator=generator) < 0.5 for _ in range(3)]
    checkpoints = [(base + 0.1 * torch.randn(length, generator=generator) * k).to(dtype) for k in keep]
    weights = torch.tensor([0.5, 0.0, 0.5])
    winners = torch.randint(0, 3, (length,), generator=generator, dtype=torch.uint8)
    per_element = (winners,) if rule == "given winners" else ()
    per_task = {"weighted sum": (weights,), "ties": (torch.tensor([0.05, 0.0, 0.1]), weights)}.get(rule, ())
    scaling = torch.tensor(0.3, dtype=torch.float64)
    return base.to(dtype), checkpoints, per_element, per_task, scaling, torch.tensor(length)


@pytest.fixture
def eager_to_compile(monkeypatch):
    monkeypatch.setattr(fusing, "FUSE_ABOVE_ELEMENTS", 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_passes_give_the_same_bits():
    # In a process of its own: here the checked annotations would be compiled with the functions.
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_passes"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [f"{rule}: same bits" for rule in RULES], done.stderr


def test_small_merges_are_not_compiled():
    step = Pass(kernels.weighted_sum, False, torch.float32)
    assert Fuser(1000).find(step, arguments("weighted sum", 10, torch.float32)) is None


def test_merge_goes_on_where_compiling_fails(eager_to_compile, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    (tmp_path / "a file").write_text("where no folder can be made")
    fuser = Fuser(1)
    step = Pass(kernels.weighted_sum, False, torch.float32)
    given = arguments("weighted sum", FUSED_LEAST_ELEMENTS, torch.float32)
    assert fuser.find(step, given) is None and fuser.is_compiling
    while fuser.is_compiling:
        time.sleep(0.2)
        assert fuser.find(step, given) is None
    merged, _, _ = run_pass(None, step, given)
    assert merged.shape == (FUSED_LEAST_ELEMENTS,)


def test_methods_that_cannot_be_found_by_name_are_not_compiled(eager_to_compile):
    step = Pass(lambda rows: rows[0], False, torch.float32)
    fuser = Fuser(1)
    given = arguments("magmax", FUSED_LEAST_ELEMENTS, torch.float32)
    assert fuser.find(step, given) is None and not fuser.is_compiling


def test_packages_that_others_may_have_written_are_not_loaded(tmp_path):
    (tmp_path / "pass.pt2").write_bytes(b"not a package")
    (tmp_path / "pass.pt2").chmod(0o666)
    assert compiling.load(tmp_path / "pass.pt2") is None
    assert compiling.load(tmp_path / "none.pt2") is None


def test_damaged_package_is_no_package(tmp_path):
    (tmp_path / "pass.pt2").write_bytes(b"not a package")
    (tmp_path / "pass.pt2").chmod(0o600)
    assert compiling.load(tmp_path / "pass.pt2") is None


def test_another_text_of_the_code_is_another_package(monkeypatch):
    request = {"module": "hub_magmax.kernels", "name": "weighted_sum"}
    before = compiling.package_path(request)
    assert before == compiling.package_path(dict(request))
    assert before != compiling.package_path(request | {"dtype": "float16"})
    monkeypatch.setattr(compiling, "_code", lambda request: "other")
    assert before != compiling.package_path(request)


@pytest.mark.parametrize("rule", RULES)
def test_pieces_give_what_the_whole_gives(rule, monkeypatch):
    combine, selects = RULES[rule]
    step, given = Pass(combine, selects, torch.bfloat16), arguments(rule, 1000, torch.bfloat16)
    whole, counts, _ = step(*given)
    monkeypatch.setattr(fusing, "EAGER_PIECE_ELEMENTS", 77)
    merged, found, _ = run_pass(None, step, given)
    assert merged.equal(whole) and found.equal(counts)


def test_counts_are_of_the_elements_that_count():
    step = Pass(selection.largest_magnitude, True, torch.float32)
    base, checkpoints, per_element, per_task, scaling, _ = arguments("magmax", 100, torch.float32)
    _, counts, _ = step(base, checkpoints, per_element, per_task, scaling, torch.tensor(60))
    assert counts.sum() == 60


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_probe_is_not_finite_where_an_input_is_not(rule, value):
    given = arguments(rule, 100, torch.float32)
    given[1][1][17] = value
    combine, selects = RULES[rule]
    assert not torch.isfinite(Pass(combine, selects, torch.float32)(*given)[2])


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with fusing.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
