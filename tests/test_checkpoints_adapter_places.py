"""Adapters whose base model's files have other names for layers than the model class."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import ARCHITECTURES, Architecture
from hub_magmax.checkpoints.adapters.adapter import AdapterSource
from hub_magmax.checkpoints.names.conversion_tables import model_names
from hub_magmax.checkpoints.source import MemorySource
from hub_magmax.checkpoints.storage.local import LocalSource
from hub_magmax.errors import MismatchError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.families import recipe_values

_BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip

#: Architectures that transformers 5 renamed, and some whose files hold several layers side by side.
RENAMED = {
    **{
        name: ARCHITECTURES[name]
        for name in ("vit", "deit", "beit", "dinov2", "swin", "segformer", "llava", "qwen2-vl", "gemma3")
    },
    "nomic-bert": Architecture("encoder, fused in files", "NomicBertModel", _BERT),
    "gte": Architecture("encoder, fused in files", "GteModel", _BERT),
}


def write_base(folder, name, **options):
    model = RENAMED[name].build(0)
    model.save_pretrained(folder, **options)
    return model


def layers_of(model):
    """Return the linear layers of a model, by the names that PEFT has for them; no tied heads."""
    tied = model.all_tied_weights_keys
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in tied
    }


def write_adapter(folder, layers, seed, extra=None):
    """Write an adapter of rank 2 and scale 3 for some layers; return the products by layer."""
    generator = torch.Generator().manual_seed(seed)
    stored, products = {}, {}
    for name, layer in layers.items():
        out, width = layer.weight.shape
        first = torch.randn(2, width, generator=generator)
        second = torch.randn(out, 2, generator=generator)
        stored[f"base_model.model.{name}.lora_A.weight"] = first
        stored[f"base_model.model.{name}.lora_B.weight"] = second
        products[name] = (second @ first) * 3.0
    folder.mkdir(parents=True)
    save_file({**stored, **(extra or {})}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return products


def recipe_of(folder, names="a", **changes):
    tasks = [{"name": name, "model": f"./{name}"} for name in names]
    return parse_recipe(recipe_values(tasks=tasks, method="average") | changes, folder=folder)


def loaded(folder, model):
    return type(model).from_pretrained(folder).state_dict()


@pytest.mark.parametrize("original", [True, False], ids=["files as before", "files as the class"])
@pytest.mark.parametrize("name", RENAMED)
def test_products_are_added_to_the_layers_that_they_were_trained_for(tmp_path, name, original):
    model = write_base(tmp_path / "base", name, save_original_format=original)
    products = write_adapter(tmp_path / "a", layers_of(model), 1)
    merge(plan(recipe_of(tmp_path)), tmp_path / "out", chunk_elements=100)
    expected, found = model.state_dict(), loaded(tmp_path / "out", model)
    for layer, product in products.items():
        assert found[f"{layer}.weight"].equal(expected[f"{layer}.weight"] + product)
    changed = {f"{layer}.weight" for layer in products}
    assert all(found[key].equal(value) for key, value in expected.items() if key not in changed)


def test_adapter_with_the_names_of_transformers_4_fits_files_of_transformers_5(tmp_path):
    model = write_base(tmp_path / "base", "vit", save_original_format=False)
    model.save_pretrained(tmp_path / "old")
    names = model_names(model.config.to_dict(), load_file(tmp_path / "old" / "model.safetensors"))
    layers = {
        names.of_model[f"{name}.weight"].removesuffix(".weight"): layer
        for name, layer in layers_of(model).items()
    }
    assert "vit.encoder.layer.0.attention.attention.query" in layers
    products = write_adapter(tmp_path / "a", layers, 1)
    merge(plan(recipe_of(tmp_path)), tmp_path / "out")
    found, expected = loaded(tmp_path / "out", model), model.state_dict()
    for layer, product in products.items():
        name = names.of_file[f"{layer}.weight"]
        assert found[name].equal(expected[name] + product)


def test_adapter_of_the_bare_model_fits_one_with_a_head(tmp_path):
    model = write_base(tmp_path / "base", "vit")
    bare = {name.removeprefix("vit."): layer for name, layer in layers_of(model.vit).items()}
    products = write_adapter(tmp_path / "a", bare, 1)
    merge(plan(recipe_of(tmp_path)), tmp_path / "out")
    found, expected = loaded(tmp_path / "out", model), model.state_dict()
    for layer, product in products.items():
        assert found[f"vit.{layer}.weight"].equal(expected[f"vit.{layer}.weight"] + product)


def test_whole_tensors_of_renamed_layers_replace_the_base_models(tmp_path):
    model = write_base(tmp_path / "base", "vit")
    layers = {name: layer for name, layer in layers_of(model).items() if name.endswith("v_proj")}
    whole = {"vit.layers.1.attention.v_proj.bias": torch.ones(32), "classifier.bias": torch.ones(2)}
    extra = {f"base_model.model.{name}": value for name, value in whole.items()}
    write_adapter(tmp_path / "a", layers, 1, extra)
    rules = [{"match": "*.bias", "take": "a"}]
    merge(plan(recipe_of(tmp_path, tensors=rules)), tmp_path / "out")
    found = loaded(tmp_path / "out", model)
    assert all(found[name].equal(value) for name, value in whole.items())


def test_rows_of_a_joint_tensor_cannot_be_replaced(tmp_path):
    model = write_base(tmp_path / "base", "nomic-bert")
    extra = {"base_model.model.layers.0.self_attn.v_proj.weight": torch.ones(32, 32)}
    write_adapter(tmp_path / "a", {"layers.0.self_attn.q_proj": model.layers[0].self_attn.q_proj}, 1, extra)
    with pytest.raises(MismatchError, match=r"v_proj.weight' is trained whole, .*merge_and_unload"):
        plan(recipe_of(tmp_path))


def test_one_layer_may_be_several_tensors_of_the_base_model(tmp_path):
    layer = torch.nn.Linear(8, 100)
    products = write_adapter(tmp_path / "a", {"mlp.gate_up": layer}, 1)
    base = {"mlp.gate.weight": torch.randn(70, 8), "mlp.up.weight": torch.randn(30, 8)}
    places = {"mlp.gate_up.weight[0:70]": "mlp.gate.weight", "mlp.gate_up.weight[70:100]": "mlp.up.weight"}
    source = AdapterSource(MemorySource.from_tensors(base), LocalSource(tmp_path / "a"), places)
    for name, rows in (("mlp.gate.weight", slice(0, 70)), ("mlp.up.weight", slice(70, 100))):
        found = source.read(name, 0, base[name].numel()).view_as(base[name])
        torch.testing.assert_close(found, base[name] + products["mlp.gate_up"][rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "llava", "nomic-bert"])
def test_merged_adapter_is_what_whole_weights_are(tmp_path, name):
    model = write_base(tmp_path / "base", name)
    for seed, task in enumerate("ab", 1):
        write_adapter(tmp_path / task, layers_of(model), seed)
    for kind in ("adapter", "weights"):
        recipe = recipe_of(tmp_path, "ab", preference={"geometric": {"ratio": 2}}, output={"format": kind})
        merge(plan(recipe), tmp_path / kind)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found, base = loaded(tmp_path / "weights", model), model.state_dict()
    for layer in layers_of(model):
        name = f"base_model.model.{layer}.lora_{{}}.weight"
        product = stored[name.format("B")] @ stored[name.format("A")]
        torch.testing.assert_close(found[f"{layer}.weight"], base[f"{layer}.weight"] + product)


def test_places_are_locked(tmp_path):
    model = write_base(tmp_path / "base", "nomic-bert")
    write_adapter(tmp_path / "a", layers_of(model), 1)
    locked = lock(recipe_of(tmp_path))
    places = locked.tasks["a"].places
    assert places["layers.1.self_attn.k_proj.weight"] == "encoder.layers.1.attn.Wqkv.weight[32:64]"
    (tmp_path / "lock.json").write_text(locked.to_json())
    assert read_lock(tmp_path / "lock.json") == locked
    assert locked.base_model.places is None


def test_names_that_fit_are_not_looked_up(tmp_path):
    model = write_base(tmp_path / "base", "vit", save_original_format=False)
    write_adapter(tmp_path / "a", layers_of(model), 1)
    assert lock(recipe_of(tmp_path)).tasks["a"].places is None


def test_layer_that_the_class_lacks_is_refused(tmp_path):
    write_base(tmp_path / "base", "vit")
    write_adapter(tmp_path / "a", {"vit.layers.7.attention.q_proj": torch.nn.Linear(32, 32)}, 1)
    with pytest.raises(
        MismatchError, match=r"the adapter changes 'vit.layers.7.attention.q_proj', and there"
    ):
        plan(recipe_of(tmp_path))
