"""Merged models are loaded and run by transformers, as people do it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hub_magmax.checkpoints.locations import ModelPlace
from hub_magmax.evaluation.evaluators.loading import load_model
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import plan
from hub_magmax.recipe.loading import load_recipe
from tests.families import accepted, write_recipe


def write_llamas(folder: Path, *, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)


def merged(folder: Path, **changes: object) -> Path:
    merge(accepted(plan(load_recipe(write_recipe(folder, **changes)))))
    return folder / "merged"


@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_loads_with_every_weight_in_its_place(tmp_path, tied):
    write_llamas(tmp_path, tied=tied)
    model, loading = AutoModelForCausalLM.from_pretrained(
        merged(tmp_path, method="single_task", preference={"weights": {"b": 1}}), output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied(tmp_path):
    write_llamas(tmp_path, tied=True)
    model = AutoModelForCausalLM.from_pretrained(merged(tmp_path, method="average"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_head_that_only_one_checkpoint_unties_is_merged_and_the_output_untied(tmp_path):
    write_llamas(tmp_path, tied=True)
    torch.manual_seed(9)
    config = LlamaConfig.from_pretrained(tmp_path / "b", tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(merged(tmp_path, method="average"))
    heads = [AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in "abc"]
    torch.testing.assert_close(model.lm_head.weight, sum(heads) / 3)
    assert model.config.tie_word_embeddings is False


def test_folder_and_variant_of_a_repository_are_loaded_for_scoring(tmp_path, hub):
    write_llamas(tmp_path, tied=False)
    files = {f"parts/{path.name}": path.read_bytes() for path in (tmp_path / "a").iterdir()}
    files["config.json"] = (tmp_path / "b" / "config.json").read_bytes()
    files["model.fp16.safetensors"] = (tmp_path / "b" / "model.safetensors").read_bytes()
    commit = hub.add_repo("me/parts-to-score", files=files)
    for part, name in (("parts", "a"), ("model.fp16.safetensors", "b")):
        place = ModelPlace("me/parts-to-score", commit, part)
        found = load_model(place, "AutoModelForCausalLM", "AutoConfig", "a test").network.state_dict()
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(found[key].equal(expected[key]) for key in expected)
