"""One pass per chunk: what it counts and notices, and that compiling it changes nothing."""

import shutil
import subprocess
import sys

import pytest
import torch

from hub_magmax import fusing, kernels, selection
from hub_magmax.fusing import Fuser, Pass, run_pass

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


def test_merge_goes_on_where_compiling_fails(eager_to_compile, monkeypatch):
    def fail(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    fuser = Fuser(1)
    step = Pass(kernels.weighted_sum, False, torch.float32)
    given = arguments("weighted sum", 10, torch.float32)
    fuser.find(step, given)
    fuser.close()
    assert fuser.find(step, given) is None
    merged, _, _ = run_pass(None, step, given)
    assert merged.shape == (10,)


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
