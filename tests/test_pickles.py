"""The commands that messages give for pickled weights are run as a person would copy them."""

import json
import re
import warnings
from contextlib import chdir

import pytest
import torch
from safetensors.torch import load_file

from hub_magmax.errors import CheckpointError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from tests.families import read_merged, recipe_values


@pytest.mark.parametrize("num_files", [1, 3])
def test_command_in_the_message_converts_pickled_weights(tmp_path, num_files):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=8))
    model.save_pretrained(tmp_path / "base")
    trained = {
        name: tensor + 0.002 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    pickled(trained, tmp_path / "base", tmp_path / "a", num_files)
    recipe = parse_recipe(recipe_values(names=("a",), method="average"), folder=tmp_path)
    with pytest.raises(CheckpointError, match="never loaded") as caught:
        lock(recipe)
    run_told(caught.value, tmp_path)
    tasks = [{"name": "a", "model": "./OUT"}]
    made = plan(parse_recipe(recipe_values(tasks=tasks, method="average"), folder=tmp_path))
    merge(made, tmp_path / "out")
    found, base = read_merged(tmp_path / "out"), read_merged(tmp_path / "base")
    assert all(torch.allclose(found[name], trained[name], atol=1e-6) for name in base.keys() | found.keys())


def pickled(state, config_from, folder, num_files):
    """Write pickled weights as transformers did, in one file or in several with an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes((config_from / "config.json").read_bytes())
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = dict(list(state.items())[number::num_files])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def run_told(error, folder):
    """Run the code of the command that a message names, in this process, which has loaded what it imports."""
    (code,) = re.findall(r'python -c "(.*)"', str(error))
    with chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries
        exec(compile(code, "command in the message", "exec"), {"__name__": "__main__"})


def test_command_in_the_message_does_without_a_class_that_config_json_does_not_name(family):
    """Configs of 2019 have no `architectures`, and no `model_type`."""
    tensors = load_file(family / "a" / "model.safetensors")
    (family / "a" / "model.safetensors").unlink()
    torch.save(tensors, family / "a" / "pytorch_model.bin")
    (family / "a" / "config.json").write_text('{"hidden_size": 8}')
    recipe = parse_recipe(recipe_values(), folder=family)
    with pytest.raises(CheckpointError, match="never loaded") as caught:
        lock(recipe)
    run_told(caught.value, family / "a")
    assert lock(recipe).tasks["a"].files[0].path == "model.safetensors"
    converted = load_file(family / "a" / "model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())


def test_command_in_the_message_converts_a_pickle_of_tensors(family):
    torch.save(load_file(family / "a" / "model.safetensors"), family / "a" / "weights.pt")
    (family / "a" / "model.safetensors").unlink()
    recipe = parse_recipe(recipe_values(), folder=family)
    with pytest.raises(CheckpointError, match=r"only pickled weights \(weights.pt\)") as caught:
        lock(recipe)
    run_told(caught.value, family / "a")
    assert lock(recipe).tasks["a"].files[0].path == "model.safetensors"


def test_command_in_the_message_joins_pickles_of_a_trainer_with_shared_tensors(family):
    tensors = load_file(family / "a" / "model.safetensors")
    names = sorted(tensors)
    (family / "a" / "model.safetensors").unlink()
    tied = {"state_dict": {name: tensors[name] for name in names[:2]}}
    torch.save(tied | {"epoch": 3}, family / "a" / "first.ckpt")
    torch.save(
        {name: tensors[name].view(tensors[name].shape) for name in names[2:]}, family / "a" / "second.pt"
    )
    recipe = parse_recipe(recipe_values(), folder=family)
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        lock(recipe)
    run_told(caught.value, family / "a")
    found = load_file(family / "a" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_parts_of_metas_checkpoints_are_not_put_beside_each_other(family):
    (family / "a" / "model.safetensors").unlink()
    for number in range(2):
        torch.save({"w": torch.ones(2)}, family / "a" / f"consolidated.0{number}.pth")
    with pytest.raises(CheckpointError, match=r"convert_llama_weights_to_hf\.py"):
        lock(parse_recipe(recipe_values(), folder=family))


def test_command_in_the_message_names_the_commit_on_the_hub(hub, family):
    config = b'{"model_type": "bert", "architectures": ["BertModel"]}'
    files = {"sub/pytorch_model.bin": b"x", "sub/config.json": config}
    commit = hub.add_repo("me/pickled", files=files)
    tasks = [{"name": "a", "model": "hf://me/pickled/sub"}]
    with pytest.raises(CheckpointError) as caught:
        lock(parse_recipe(recipe_values(tasks=tasks), folder=family))
    place = f"from_pretrained('me/pickled', revision='{commit}', subfolder='sub')"
    assert str(caught.value).count(place) == 2
