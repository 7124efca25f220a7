"""Adapters of tied models: what they train apart is a parameter of its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import ARCHITECTURES
from hub_magmax.checkpoints.adapters.ties import untie
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.lockfile import read_lock
from tests.families import recipe_values

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LAYER = "model.layers.0.self_attn.q_proj"


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_base(folder, architecture="llama-tied"):
    model = ARCHITECTURES[architecture].build(0)
    model.save_pretrained(folder)
    return model


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True)
    stored = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))


def embedding_factors(name, seed=1):
    """Return factors of an embedding of 64 tokens, 32 wide, and what they add to it."""
    first, second = draw(2, 64, seed=seed), draw(32, 2, seed=seed + 10)
    return {f"{name}.lora_embedding_A": first, f"{name}.lora_embedding_B": second}, (second @ first).T * 3


def linear_factors(name, seed=1, rows=64):
    first, second = draw(2, 32, seed=seed), draw(rows, 2, seed=seed + 10)
    return {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}, (second @ first) * 3


def recipe_of(folder, *names, **changes):
    tasks = [{"name": name, "model": f"./{name}"} for name in names]
    return parse_recipe(recipe_values(tasks=tasks, method="average") | changes, folder=folder)


def merged(folder, model, *names, **changes):
    """Merge, and return the plan and the parameters of the loaded model by name, tied ones by each name."""
    made = plan(recipe_of(folder, *names, **changes))
    merge(made, folder / "out")
    return made, type(model).from_pretrained(folder / "out").state_dict()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def is_said_tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


PARTS = {
    "embedding": ((EMBEDDING,), embedding_factors),
    "head": ((HEAD,), linear_factors),
}


@pytest.mark.parametrize("part", PARTS)
def test_product_of_one_of_two_tied_layers_leaves_the_other_one(tmp_path, part):
    model = write_base(tmp_path / "base")
    ((name,), factors) = PARTS[part]
    stored, product = factors(name)
    write_adapter(tmp_path / "a", stored)
    made, found = merged(tmp_path, model, "a")
    base = model.state_dict()
    for layer in (EMBEDDING, HEAD):
        change = product if layer == name else torch.zeros(64, 32)
        close(found[f"{layer}.weight"], base[f"{EMBEDDING}.weight"] + change)
    assert is_said_tied(tmp_path / "out") is False
    assert any("tied weights" in line and "a trained it apart" in line for line in notices(made))


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=str)
def test_whole_layers_replace_those_that_they_are(tmp_path, names):
    model = write_base(tmp_path / "base")
    whole = {f"{name}.weight": draw(64, 32, seed=seed) for seed, name in enumerate(names)}
    write_adapter(tmp_path / "a", whole | linear_factors(LAYER, rows=32)[0])
    _, found = merged(tmp_path, model, "a")
    for layer in (EMBEDDING, HEAD):
        close(
            found[f"{layer}.weight"], whole.get(f"{layer}.weight", model.state_dict()[f"{EMBEDDING}.weight"])
        )
    assert is_said_tied(tmp_path / "out") is False


@pytest.mark.parametrize("stored_twice", [False, True])
def test_layers_that_were_trained_as_one_stay_tied(tmp_path, stored_twice):
    model = write_base(tmp_path / "base")
    if stored_twice:
        path = tmp_path / "base" / "model.safetensors"
        tensors = load_file(path)
        copied = {f"{HEAD}.weight": tensors[f"{EMBEDDING}.weight"].clone()}
        save_file(tensors | copied, path, metadata={"format": "pt"})
    factors, product = embedding_factors(EMBEDDING)
    copies = {
        f"{HEAD}.lora_A.weight": factors[f"{EMBEDDING}.lora_embedding_B"].T.contiguous(),
        f"{HEAD}.lora_B.weight": factors[f"{EMBEDDING}.lora_embedding_A"].T.contiguous(),
    }
    write_adapter(tmp_path / "a", factors | copies, ensure_weight_tying=True)
    _, found = merged(tmp_path, model, "a")
    for layer in (EMBEDDING, HEAD):
        close(found[f"{layer}.weight"], model.state_dict()[f"{EMBEDDING}.weight"] + product)
    assert is_said_tied(tmp_path / "out") is True
    assert (f"{HEAD}.weight" in load_file(tmp_path / "out" / "model.safetensors")) is stored_twice


def test_adapter_that_trains_no_tied_layer_leaves_the_tie(tmp_path):
    model = write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", linear_factors(LAYER, rows=32)[0])
    made, _ = merged(tmp_path, model, "a")
    assert is_said_tied(tmp_path / "out") is True
    assert f"{HEAD}.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert not any("tied" in line for line in notices(made))
    assert made.lock.base_model.ties is None and made.lock.tasks["a"].ties is None


def test_tied_tasks_count_with_their_one_tensor_for_both(tmp_path):
    model = write_base(tmp_path / "base")
    factors, product = embedding_factors(EMBEDDING)
    write_adapter(tmp_path / "a", factors)
    write_adapter(tmp_path / "b", linear_factors(LAYER, rows=32)[0])
    other = type(model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.01 * draw(64, 32)
    other.save_pretrained(tmp_path / "c")
    _, found = merged(tmp_path, model, "a", "b", "c")
    base, own = (m.state_dict()[f"{EMBEDDING}.weight"] for m in (model, other))
    close(found[f"{EMBEDDING}.weight"], (base + product + base + own) / 3)
    close(found[f"{HEAD}.weight"], (base + base + own) / 3)


def test_in_sequence_what_one_adapter_trained_apart_stays_apart(tmp_path):
    model = write_base(tmp_path / "base")
    factors, product = embedding_factors(EMBEDDING)
    write_adapter(tmp_path / "a", factors)
    write_adapter(tmp_path / "b", linear_factors(LAYER, rows=32)[0])
    _, found = merged(tmp_path, model, "a", "b", adapters="sequence", method="last_task")
    base = model.state_dict()[f"{EMBEDDING}.weight"]
    close(found[f"{EMBEDDING}.weight"], base + product)
    close(found[f"{HEAD}.weight"], base)


def test_embeddings_of_an_encoder_and_a_decoder_are_trained_apart(tmp_path):
    model = write_base(tmp_path / "base", "t5")
    encoder, one = embedding_factors("encoder.embed_tokens", 1)
    decoder, two = embedding_factors("decoder.embed_tokens", 2)
    write_adapter(tmp_path / "a", encoder | decoder)
    _, found = merged(tmp_path, model, "a")
    base = model.state_dict()["shared.weight"]
    close(found["encoder.embed_tokens.weight"], base + one)
    close(found["decoder.embed_tokens.weight"], base + two)
    close(found["shared.weight"], base)
    close(found["lm_head.weight"], base)


def test_head_of_a_tied_model_is_merged_into_an_adapter(tmp_path):
    model = write_base(tmp_path / "base")
    products = {}
    for seed, name in enumerate("ab", 1):
        factors, products[name] = linear_factors(HEAD, seed)
        write_adapter(tmp_path / name, factors)
    merge(plan(recipe_of(tmp_path, "a", "b", output={"format": "adapter"})), tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    name = f"base_model.model.{HEAD}.lora_{{}}.weight"
    close(stored[name.format("B")] @ stored[name.format("A")], (products["a"] + products["b"]) / 2)
    _, found = merged(tmp_path, model, "a", "b")
    close(
        found[f"{HEAD}.weight"],
        model.state_dict()[f"{EMBEDDING}.weight"] + (products["a"] + products["b"]) / 2,
    )


def test_ties_are_locked(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", embedding_factors(EMBEDDING)[0])
    locked = lock(recipe_of(tmp_path, "a"))
    assert locked.base_model.ties == {f"{HEAD}.weight": f"{EMBEDDING}.weight"}
    assert locked.tasks["a"].ties == {}
    (tmp_path / "lock.json").write_text(locked.to_json())
    assert read_lock(tmp_path / "lock.json") == locked


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ((), None),
        (("other",), None),
        (("shared",), {"decoder": "encoder", "head": "encoder"}),
        (("head",), {"encoder": "shared", "decoder": "shared"}),
        (("encoder", "decoder"), {"head": "shared"}),
        (("shared", "encoder", "decoder", "head"), {}),
    ],
    ids=str,
)
def test_what_is_not_trained_stays_one_parameter(trained, expected):
    ties = {"encoder": "shared", "decoder": "shared", "head": "shared"}
    assert untie(ties, trained) == expected
