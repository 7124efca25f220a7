"""Adapters that were trained after tokens were added to the vocabulary."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import ARCHITECTURES
from hub_magmax.errors import MismatchError
from hub_magmax.merging.execution import merge
from hub_magmax.merging.in_memory import InMemoryMerger
from hub_magmax.pipeline import lock, plan
from hub_magmax.planning.summary import notices
from hub_magmax.recipe.lockfile import read_lock
from tests.test_checkpoints_adapter_ties import recipe_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.self_attn.q_proj"
WORDS = [f"w{number}" for number in range(64)]


def draw(*shape, seed=1):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_base(folder, architecture="llama"):
    model = ARCHITECTURES[architecture].build(0)
    model.save_pretrained(folder)
    return model


def write_adapter(folder, whole, tokens=None, seed=1):
    """Write an adapter with factors of one layer, and tensors that it holds whole."""
    factors = {f"{LAYER}.lora_A.weight": draw(2, 32, seed=seed), f"{LAYER}.lora_B.weight": draw(32, 2)}
    folder.mkdir(parents=True)
    stored = {f"base_model.model.{name}": tensor for name, tensor in {**factors, **whole}.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if tokens is not None:
        vocabulary = {token: row for row, token in enumerate([*WORDS, *tokens])}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def resized(model, num_rows, seed=1):
    """Return embedding and head of a model with more rows, all moved a little."""
    tensors = {EMBEDDING: model.model.embed_tokens.weight, HEAD: model.lm_head.weight}
    return {
        name: torch.cat([tensor.detach(), draw(num_rows - 64, 32, seed=seed)])
        + 0.1 * draw(num_rows, 32, seed=seed)
        for name, tensor in tensors.items()
    }


def merged(folder, model, *names, **changes):
    made = plan(recipe_of(folder, *names, **changes))
    merge(made, folder / "out")
    return made, type(model).from_pretrained(folder / "out")


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)


def test_merged_model_has_the_added_rows(tmp_path):
    model = write_base(tmp_path / "base")
    whole = resized(model, 70)
    write_adapter(tmp_path / "a", whole)
    made, found = merged(tmp_path, model, "a")
    close(found.model.embed_tokens.weight, whole[EMBEDDING])
    close(found.lm_head.weight, whole[HEAD])
    assert found.config.vocab_size == 70
    assert any("a was trained with added tokens" in line for line in notices(made))


@pytest.mark.parametrize("method", ["average", "tunable_magmax", "ties"])
def test_tasks_that_lack_the_added_rows_do_not_count_in_them(tmp_path, method):
    model = write_base(tmp_path / "base")
    whole = resized(model, 70)
    write_adapter(tmp_path / "a", whole)
    other = type(model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.1 * draw(64, 32, seed=5)
    other.save_pretrained(tmp_path / "b")
    made, found = merged(tmp_path, model, "a", "b", method=method)
    close(found.model.embed_tokens.weight[64:], whole[EMBEDDING][64:])
    close(found.lm_head.weight[64:], whole[HEAD][64:])
    if method == "average":
        own = other.model.embed_tokens.weight.detach()
        close(found.model.embed_tokens.weight[:64], (whole[EMBEDDING][:64] + own) / 2)
    with InMemoryMerger(made.recipe, made.lock) as merger:
        held = merger.merge(made.lock.method, made.lock.weights).weights(made.lock.method["scaling"])
    assert held[EMBEDDING].equal(found.model.embed_tokens.weight)


def test_added_rows_of_the_same_tokens_are_averaged(tmp_path):
    model = write_base(tmp_path / "base")
    one, two = resized(model, 70, 1), resized(model, 67, 2)
    write_adapter(tmp_path / "a", one, [f"<{number}>" for number in range(6)])
    write_adapter(tmp_path / "b", two, [f"<{number}>" for number in range(3)])
    _, found = merged(tmp_path, model, "a", "b")
    close(found.model.embed_tokens.weight[:67], (one[EMBEDDING][:67] + two[EMBEDDING]) / 2)
    close(found.model.embed_tokens.weight[67:], one[EMBEDDING][67:])


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [((None, None), "may be other tokens"), ((["<a>"], ["<b>"]), "are other tokens in each")],
    ids=["unknown", "other"],
)
def test_added_rows_of_other_tokens_are_refused_with_the_step(tmp_path, tokens, reason):
    model = write_base(tmp_path / "base")
    for seed, (name, added) in enumerate(zip("ab", tokens, strict=True), 1):
        write_adapter(tmp_path / name, resized(model, 65, seed), added)
    with pytest.raises(MismatchError, match=rf"rows 64 to 64 {reason}.*resize_token_embeddings\(65\)"):
        lock(recipe_of(tmp_path, "a", "b"))


def test_head_without_the_added_rows_is_refused(tmp_path):
    model = write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", {EMBEDDING: resized(model, 70)[EMBEDDING]})
    reason = rf"'{re.escape(EMBEDDING)}' has 70 rows, 6 for added tokens, and '{re.escape(HEAD)}' has not"
    with pytest.raises(MismatchError, match=reason):
        lock(recipe_of(tmp_path, "a"))


def test_biases_of_logits_without_the_added_rows_are_refused(tmp_path):
    model, weights = write_base(tmp_path / "base"), tmp_path / "base" / "model.safetensors"
    save_file(load_file(weights) | {"final_logits_bias": torch.zeros(1, 64)}, weights)
    write_adapter(tmp_path / "a", resized(model, 70))
    with pytest.raises(MismatchError, match="'final_logits_bias' has not"):
        lock(recipe_of(tmp_path, "a"))


def test_modules_as_they_were_before_training_are_left_aside(tmp_path):
    model = write_base(tmp_path / "base")
    whole = resized(model, 70)
    before = {name.replace(".weight", ".original_module.weight"): torch.zeros(70, 32) for name in whole}
    write_adapter(tmp_path / "a", whole | before)
    _, found = merged(tmp_path, model, "a")
    close(found.lm_head.weight, whole[HEAD])


def test_rule_of_the_recipe_goes_before(tmp_path):
    model = write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", resized(model, 70))
    rules = [{"match": name, "take": "base_model"} for name in (EMBEDDING, HEAD)]
    _, found = merged(tmp_path, model, "a", tensors=rules)
    close(found.lm_head.weight, model.lm_head.weight.detach())
    assert found.config.vocab_size == 64


def test_classifier_with_more_classes_is_no_vocabulary(tmp_path):
    model = write_base(tmp_path / "base", "roberta")
    layer = "roberta.encoder.layer.0.attention.self.query"
    factors = {f"{layer}.lora_A.weight": draw(2, 32), f"{layer}.lora_B.weight": draw(32, 2)}
    (tmp_path / "a").mkdir()
    rows = model.classifier.out_proj.weight.shape[0] + 1
    stored = {**factors, "classifier.out_proj.weight": draw(rows, 32), "classifier.out_proj.bias": draw(rows)}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in stored.items()},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert lock(recipe_of(tmp_path, "a")).tasks["a"].added_rows is None


def test_added_rows_are_locked(tmp_path):
    model = write_base(tmp_path / "base")
    write_adapter(tmp_path / "a", resized(model, 70))
    locked = lock(recipe_of(tmp_path, "a"))
    assert locked.tasks["a"].added_rows == {EMBEDDING: 70, HEAD: 70}
    (tmp_path / "lock.json").write_text(locked.to_json())
    assert read_lock(tmp_path / "lock.json") == locked
