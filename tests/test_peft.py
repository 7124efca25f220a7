"""Adapters that PEFT makes, as the checkpoints that PEFT makes of them."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.tiny_models import ARCHITECTURES
from hub_magmax.checkpoints.model_facts import CheckpointFacts
from hub_magmax.checkpoints.opening import open_checkpoints
from hub_magmax.errors import CheckpointError
from hub_magmax.merging.execution import merge
from hub_magmax.pipeline import lock, plan
from hub_magmax.recipe.importing.other_tools import import_text
from hub_magmax.recipe.loading import parse_recipe
from hub_magmax.recipe.schema import Recipe
from tests.families import recipe_values

peft = pytest.importorskip("peft", reason="the package peft is not installed")

#: Architecture and configuration, by what is special.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "expression": ("llama", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3},
        },
    ),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "biases": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "own biases": ("opt", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "encoder-decoder": ("t5", {"target_modules": ["q", "wi", "wo"]}),
    "convolution": ("clip", {"target_modules": ["patch_embedding", "token_embedding", "text_projection"]}),
    "renamed": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "renamed biases": ("swin", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "renamed whole": ("llava", {"target_modules": ["q_proj"], "modules_to_save": ["linear_1"]}),
}


def write_adapter(folder: Path, architecture: str, config: Any, num_rows: int = 0) -> tuple[Any, Any]:
    """Write a base model and a random adapter for it; return its class and the model with the adapter."""
    model = ARCHITECTURES[architecture].build(0)
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    if num_rows:
        base.resize_token_embeddings(num_rows)
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "a")
    return type(model), adapted.eval()


def recipe_of(folder: Path) -> Recipe:
    return parse_recipe(recipe_values(tasks=[{"name": "a", "model": "./a"}], method="average"), folder=folder)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore")
def test_adapter_is_the_checkpoint_that_peft_merges(tmp_path: Path, name: str) -> None:
    architecture, options = CONFIGURATIONS[name]
    model_class, adapted = write_adapter(
        tmp_path, architecture, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)
    )
    recipe = recipe_of(tmp_path)
    with open_checkpoints(recipe, lock(recipe)) as sources:
        weights = {
            key: sources["a"].read(key, 0, info.num_elements).view(info.shape)
            for key, info in sources["a"].index.tensors.items()
        }
    config = model_class.config_class.from_pretrained(tmp_path / "base")
    found = model_class.from_pretrained(None, config=config, state_dict=weights).state_dict()
    expected = adapted.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not found[key].equal(value)] == []


#: Adapters of tied layers. `merge_and_unload` adds products to what is tied to their layers, too.
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "as one": ("llama-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "whole": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both whole": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "whole as one": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "encoder and decoder": ("t5", {"target_modules": ["embed_tokens", "q"]}),
    "positions": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "masked": ("bert", {"target_modules": ["word_embeddings", "decoder"]}),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.filterwarnings("ignore")
def test_adapter_of_tied_layers_computes_what_peft_computes_with_it(tmp_path: Path, name: str) -> None:
    architecture, options = TIED[name]
    model_class, adapted = write_adapter(
        tmp_path, architecture, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)
    )
    merge(plan(recipe_of(tmp_path)), tmp_path / "out")
    inputs = ARCHITECTURES[architecture].inputs()
    with torch.no_grad():
        found, expected = (
            model(**inputs).logits for model in (model_class.from_pretrained(tmp_path / "out"), adapted)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


#: Adapters trained after tokens were added.
RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "by itself": ("llama", {"target_modules": ["q_proj"]}),
    "factors": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "untied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.filterwarnings("ignore")
def test_adapter_with_added_tokens_computes_what_peft_computes_with_it(tmp_path: Path, name: str) -> None:
    architecture, options = RESIZED[name]
    model_class, adapted = write_adapter(
        tmp_path, architecture, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options), num_rows=70
    )
    merge(plan(recipe_of(tmp_path)), tmp_path / "out")
    inputs = {"input_ids": torch.tensor([[3, 66, 5, 69, 1]])}
    with torch.no_grad():
        found, expected = (
            model(**inputs).logits for model in (model_class.from_pretrained(tmp_path / "out"), adapted)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


#: Adapters that are refused, and the line of the message merges.
LINES = {
    "dora": lambda: peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "tokens": lambda: peft.LoraConfig(
        trainable_token_indices=[3, 5], target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "pissa": lambda: peft.LoraConfig(
        init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
@pytest.mark.filterwarnings("ignore")
def test_line_of_the_message_makes_the_checkpoint(tmp_path: Path, name: str) -> None:
    model_class, adapted = write_adapter(tmp_path, "llama", LINES[name]())
    inputs = ARCHITECTURES["llama"].inputs()
    with pytest.raises(CheckpointError) as raised:
        lock(recipe_of(tmp_path))
    code = re.search(r'python -c "([^"]*)"', str(raised.value))
    assert code is not None
    line = code[1].replace("BASE", "base").replace("ADAPTER", "a").replace("OUT", "merged")
    with chdir(tmp_path), pytest.MonkeyPatch.context() as offline:
        offline.setenv("HF_HUB_OFFLINE", "1")  # PEFT reads it; huggingface_hub read it when it was imported
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        exec(compile(line, "line of the message", "exec"), {"__name__": "__main__"})
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "merged").rename(tmp_path / "a")
    merge(plan(recipe_of(tmp_path)), tmp_path / "out")
    with torch.no_grad():
        found, expected = (
            model(**inputs).logits for model in (model_class.from_pretrained(tmp_path / "out"), adapted)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 3], ids=["widest", "stated"])
@pytest.mark.filterwarnings("ignore")
def test_imported_products_that_are_cut_to_a_rank_are_those_of_peft(tmp_path: Path, rank: int | None) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    for name in "ab":
        model.save_pretrained(tmp_path, selected_adapters=[name])
    written = {"svd_rank": rank} if rank else {}
    arguments = {"adapters": ["./a", "./b"], "weights": [0.7, -0.4], "combination_type": "svd"} | written
    (tmp_path / "combine.yaml").write_text(json.dumps({"base_model": "./base", **arguments}))
    imported = import_text(
        (tmp_path / "combine.yaml").read_text(), "combine.yaml", CheckpointFacts(tmp_path, tmp_path)
    )
    assert imported.recipe["output"]["rank"] == (rank or 4) and imported.verdict == "rounding"
    found = merge(plan(parse_recipe(imported.recipe, folder=tmp_path)), tmp_path / "out")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", combination_type="svd", **written)
    model.set_adapter("both")
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        expected = model(**inputs).logits
        again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        ours = peft.PeftModel.from_pretrained(again, tmp_path / "out")(**inputs).logits
    assert found.shards
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
