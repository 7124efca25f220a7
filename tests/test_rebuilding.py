import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_magmax.errors import LockError, OutputError
from hub_magmax.locking import plan
from hub_magmax.merging import merge
from hub_magmax.publishing import push
from hub_magmax.rebuilding import rebuild
from hub_magmax.recipe import load_recipe
from tests.families import make_tensors, recipe_values, write_checkpoint, write_family, write_recipe

_numbers = itertools.count()


@pytest.fixture
def merged(family):
    recipe = load_recipe(
        write_recipe(family, output={"shard_size": "600B"}, preference={"geometric": {"ratio": 2}})
    )
    return merge(plan(recipe))


def test_model_is_rebuilt_to_the_bit(family, merged):
    assert rebuild(str(family / "merged"), folder=family).shards == merged.shards


def test_first_tensor_that_differs_is_named(family, merged):
    path = next(p for p in (family / "merged").glob("*.safetensors") if "layer.1.weight" in load_file(p))
    tensors = load_file(path)
    tensors["layer.1.weight"][2, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OutputError) as caught:
        rebuild(str(family / "merged"), folder=family)
    assert "tensor 'layer.1.weight': element 35 is not what" in str(caught.value)


def test_tensor_that_was_added_is_named(family, merged):
    path = min((family / "merged").glob("*.safetensors"))
    save_file(load_file(path) | {"extra": torch.ones(2)}, path, metadata={"format": "pt"})
    index = json.loads((family / "merged" / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = path.name
    (family / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OutputError, match="'extra'"):
        rebuild(str(family / "merged"), folder=family)


def test_source_that_changed_is_named(family, merged):
    write_checkpoint(family / "b", make_tensors(5, shapes={"other": (2,)}))
    with pytest.raises(LockError, match=r"\./b"):
        rebuild(str(family / "merged"), folder=family)


def test_folder_that_no_merge_made_cannot_be_rebuilt(family):
    with pytest.raises(LockError, match="what the model was made from is not known"):
        rebuild(str(family / "base"), folder=family)


def test_published_model_is_rebuilt_from_the_hub_after_its_sources_moved(hub, tmp_path):
    write_family(tmp_path, "ab")
    prefix = f"me/rebuild{next(_numbers)}"
    for name in ("base", "a", "b"):
        hub.add_repo(f"{prefix}-{name}", folder=tmp_path / name)
    tasks = [{"name": name, "model": f"{prefix}-{name}"} for name in "ab"]
    from hub_magmax.recipe import parse_recipe

    recipe = parse_recipe(recipe_values(base_model=f"{prefix}-base", tasks=tasks), folder=tmp_path)
    merge(plan(recipe))
    push(tmp_path / "merged", f"{prefix}-merged")
    hub.add_repo(f"{prefix}-a", folder=write_checkpoint(tmp_path / "moved", make_tensors(8)))
    rebuild(f"{prefix}-merged")
