import json

import pytest
import torch

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
