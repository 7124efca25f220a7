import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.families import SIZES, make_family


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = json.loads(SIZES[size].config_text)
    architecture = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(config))
    tied = model.all_tied_weights_keys
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    assert SIZES[size].shapes == expected


def test_a_family_is_made_once_and_its_size_is_checked(tmp_path):
    files = make_family(tmp_path, "30m", num_tasks=0, shard_bytes=30_000_000)
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) > 1
    assert make_family(tmp_path, "30m", num_tasks=0) == files
    assert [path.stat().st_mtime_ns for path in files] == before
    with pytest.raises(SystemExit, match="another size than bert-base"):
        make_family(tmp_path, "bert-base", num_tasks=0)


@pytest.mark.parametrize(
    ("size", "zeros", "most"), [("30m", 0.5, 0.02), ("30m-1e-4", 0.32, 0.23), ("30m-2e-5", 0.78, 0.08)]
)
def test_small_steps_leave_zeros_and_equals_in_bfloat16(tmp_path, size, zeros, most, monkeypatch):
    """The share of zeros, and that of the commonest other magnitude."""
    shapes = {"w": (500, 1000)}
    monkeypatch.setitem(SIZES, size, replace(SIZES[size], shapes=shapes))
    base, task = (load_file(path)["w"].float() for path in make_family(tmp_path, size, num_tasks=1))
    magnitudes, counts = (task - base).abs().unique(return_counts=True)
    shares = counts / base.numel()
    assert magnitudes[0] == 0 and shares[0] == pytest.approx(zeros, abs=0.01)
    assert shares[1:].max() == pytest.approx(most, abs=0.01)


def test_families_of_other_steps_are_not_confused(tmp_path, monkeypatch):
    for size in ("30m", "30m-1e-4", "30m-2e-5"):
        monkeypatch.setitem(SIZES, size, replace(SIZES[size], shapes={"w": (5,)}))
    make_family(tmp_path, "30m-1e-4", num_tasks=1)
    for other in ("30m", "30m-2e-5"):
        with pytest.raises(SystemExit, match=f"another size than {other}"):
            make_family(tmp_path, other, num_tasks=1)
